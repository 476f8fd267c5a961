"""Tar archives for tests, byte by byte where ``tarfile`` would not write them, and a web server with faults."""

import contextlib
import http.server
import io
import tarfile
import threading

import numpy as np
from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)


def png(seed=0, size=(16, 16)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def header(name, size, kind=b"0"):
    """One header. ``size`` may be the 12 bytes of its field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(BLOCK)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name.encode(), b"0000644\0", field, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def archive(members, end=END):
    return b"".join(header(name, len(data)) + padded(data) for name, data in members) + end


def with_tarfile(members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@contextlib.contextmanager
def server(answer):
    """The address of a web server of this machine that calls ``answer(handler)`` for each GET."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}/set.tar"
        finally:
            running.shutdown()


def send(handler, data, promised=None, status=200, **headers):
    """An answer that promises ``promised`` bytes and ends after ``data``."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data) if promised is None else promised))
    handler.end_headers()
    handler.wfile.write(data)
    handler.close_connection = True
