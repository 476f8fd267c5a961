"""Files on disk: written whole, one run a folder, leftovers of killed runs, digests, schemas."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from fastvq import _files
from fastvq._files import lock_folder, remove_leftovers, write_atomically
from fastvq._json import any_of, list_of, nothing, number, parse_json, read_json, record, text, whole, write_json
from fastvq.training.log import write_line

HOLD = f"""
import sys, time
sys.path.insert(0, {str(_files.Path(_files.__file__).parents[1])!r})
from fastvq._files import lock_folder
with lock_folder("test", sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match=rf"another run \(process {first.pid} on .*\) is writing to")
        with refused, lock_folder("op", tmp_path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert (tmp_path / _files.LOCK).exists()  # a killed run leaves the file, without the lock
    with lock_folder("op", tmp_path):
        assert (tmp_path / _files.LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_nests_in_its_own_run_alone(tmp_path):
    refused = []

    def other():
        try:
            with lock_folder("op", tmp_path):
                pass
        except ValueError as error:
            refused.append(error)

    with lock_folder("op", tmp_path), lock_folder("op", tmp_path / "." / "x" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other()
    assert len(refused) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    reading, writing = os.pipe()
    with lock_folder("op", tmp_path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the test ends
            os._exit(0)
    try:
        with lock_folder("op", tmp_path):
            pass
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


def test_a_folder_without_locks_is_used_without(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(_files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock_folder("op", tmp_path):
        write_atomically(tmp_path / "a", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_part_of_a_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "a" / "log.jsonl"
    write_line(path, {"n": 1})
    write_line(path, {"n": 2})
    with path.open("a") as file:
        file.write('{"n": ')
    write_line(path, {"n": 3})
    assert path.read_text().splitlines() == ['{"n": 1}', '{"n": 2}', '{"n": ', '{"n": 3}']


def test_leftovers_of_killed_writes_go_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "a", [b"whole", memoryview(b" file")])
    leftover = tmp_path / f".a.12345678{_files.TEMPORARY}"
    mine = [tmp_path / ".a.12345678", tmp_path / f"a{_files.TEMPORARY}", tmp_path / ".hidden", tmp_path / "a"]
    for path in (leftover, *mine[:3]):
        path.write_bytes(b"x")
    (tmp_path / f".folder{_files.TEMPORARY}").mkdir()
    handle, living = _files._temporary(tmp_path / "b")
    with lock_folder("op", tmp_path):
        assert not leftover.exists()
    assert os.path.exists(living) and all(path.exists() for path in mine)
    os.close(handle)
    remove_leftovers(tmp_path)
    assert not os.path.exists(living) and (tmp_path / f".folder{_files.TEMPORARY}").is_dir()
    assert (tmp_path / "a").read_bytes() == b"whole file"
    remove_leftovers(tmp_path / "none")


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    lock, seen = _files._lock, []

    def late(handle):
        if not seen:  # another process looks for leftovers before the lock is taken
            seen.extend(tmp_path.iterdir())
            seen[0].unlink()
        return lock(handle)

    monkeypatch.setattr(_files, "_lock", late)
    write_atomically(tmp_path / "a", b"x")
    assert len(seen) == 1 and (tmp_path / "a").read_bytes() == b"x"


def test_a_long_name_can_be_written(tmp_path):
    for name in ("n" * 255, "あ" * 85):
        with contextlib.suppress(OSError):
            (tmp_path / name).touch()  # what this file system allows
            write_atomically(tmp_path / name, b"x")
            assert (tmp_path / name).read_bytes() == b"x"


def test_a_changed_json_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"name": "ünï", "pair": (1, 2.5)}, seal=True)
    assert read_json("op", path, record({"name": text, "pair": list_of(number)})) == {"name": "ünï", "pair": [1, 2.5]}
    path.write_text(path.read_text().replace("2.5", "3.5"))
    with pytest.raises(ValueError, match=r"op: .*a\.json was changed .*remove its entry __sha256__"):
        read_json("op", path)
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "__sha256__"}
    write_json(path, kept)
    assert read_json("op", path)["pair"] == [1, 3.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        ("[" * 100_000, "nesting is too deep"),
        ('{"n": NaN}', "NaN, which is no JSON"),
        ("9" * 5000, "must be JSON"),
        ("null", "must be an object with n, got None"),
        ("{}", "must be an object with n"),
        ('{"n": true}', "n must be a whole number in 1 .. 9, got True"),
        ('{"n": 10}', "n must be a whole number in 1 .. 9, got 10"),
        ('{"n": 1.0}', "n must be a whole number"),
        ('{"n": 1, "x": 1e999}', "x must be null, got inf"),
        ('{"n": 1, "y": {}}', r"nothing else, got \['y'\]"),
        ('{"n": 1, "list": ["a", 2]}', r"list\[1\] must be a string, got 2"),
    ],
)
def test_json_of_something_else_is_one_line(content, message):
    kind = record({"n": whole(1, 9)}, {"x": any_of(number, nothing), "list": list_of(text)})
    with pytest.raises(ValueError, match=message) as error:
        parse_json("op", "file", content, kind)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
