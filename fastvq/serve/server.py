"""The HTTP side of the editing page: routes, limits and errors. Whatever needs the model becomes a job of the worker.

========  =========================================  =====================================================
method    path                                       answer
========  =========================================  =====================================================
GET       /api/runs                                  the trained runs
POST      /api/open?run=&name=&index=&size=          a job; its result is the session of the uploaded picture
                                                     (the body), or of a held-out one (no body)
GET       /api/jobs/{id}                             state, progress, result
POST      /api/jobs/{id}/cancel                      asks the job to end
GET       /api/sessions/{id}                         what the page shows of a session
POST      /api/sessions/{id}/source?name=&index=     a job: the picture to transplant from
POST      /api/sessions/{id}/edit                    a job: an edit (the body is JSON, ``EDIT`` below)
POST      /api/sessions/{id}/choose, .../undo        the session
GET       /api/sessions/{id}/views/{view}            a PNG picture, by the name of the view
GET       /api/sessions/{id}/picture.png, ids.json   downloads
========  =========================================  =====================================================
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fastvq._json import Kind, any_of, list_of, nothing, number, parse_json, record, text, whole
from fastvq.serve import views
from fastvq.serve.guard import LOOPBACK, PREFIX, Guard, error_answer, shown
from fastvq.serve.jobs import Busy, Job, Worker
from fastvq.serve.session import MAX_CANDIDATES, MAX_DRAFTS, MAX_SIDE, MAX_SOFT, LoadedRun, Run, Session, mask_of

__all__ = ["MAX_UPLOAD", "make_app"]

STATIC = Path(__file__).parent / "static"
MAX_UPLOAD = 32 << 20  # bytes of a picture
MAX_REQUEST = 4 << 20  # bytes of an edit's description
MAX_SESSIONS = 8  # pictures that are kept; the one that was used longest ago leaves first
ID = whole(0, 1 << 20)
EDIT = record(
    {"way": text},
    {
        "box": list_of(whole(0, MAX_SIDE)),
        "runs": list_of(whole(0, MAX_SIDE**2)),
        "label": any_of(nothing, ID),
        "temperature": number,
        "drafts": whole(1, MAX_DRAFTS),
        "candidates": whole(1, MAX_CANDIDATES),
        "seed": any_of(nothing, whole(0, 1 << 62)),
        "codes": list_of(any_of(nothing, ID)),
        "soft": whole(0, MAX_SOFT),
    },
)
WAYS = ("resample", "paint", "transplant")
MAX_DIGITS = 20  # of a number in an address


def make_app(runs: Sequence[Run], *, size: int | None = None, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The page as an ASGI application.

    Args:
        runs: the trained runs to choose from; each is loaded when its first picture is opened, and kept.
        size: side that pictures are scaled to unless the page asks for another; default: the run's training size.
        hosts: names that requests may address the server by, without a port ("*": any). Other names are
            refused, so that no page of another site can reach the server through a name that its owner points at this
            machine.
    """
    editor = Editor(runs, size)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        try:
            yield
        finally:
            await run_in_threadpool(editor.worker.close)

    return Starlette(
        routes=[
            Route("/", lambda _: FileResponse(STATIC / "index.html")),
            Route("/api/runs", endpoint(editor.list_runs)),
            Route("/api/open", endpoint(editor.open), methods=["POST"]),
            Route("/api/jobs/{id}", endpoint(editor.job)),
            Route("/api/jobs/{id}/cancel", endpoint(editor.cancel), methods=["POST"]),
            Route("/api/sessions/{id}", endpoint(editor.session)),
            Route("/api/sessions/{id}/source", endpoint(editor.source), methods=["POST"]),
            Route("/api/sessions/{id}/edit", endpoint(editor.edit), methods=["POST"]),
            Route("/api/sessions/{id}/choose", endpoint(editor.choose), methods=["POST"]),
            Route("/api/sessions/{id}/undo", endpoint(editor.undo), methods=["POST"]),
            Route("/api/sessions/{id}/views/{view}", endpoint(editor.view)),
            Route("/api/sessions/{id}/picture.png", endpoint(editor.download)),
            Route("/api/sessions/{id}/ids.json", endpoint(editor.ids)),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


class Editor:
    """The runs, the sessions and the worker of one application; its methods answer requests."""

    def __init__(self, runs: Sequence[Run], size: int | None) -> None:
        self.runs = {run.name: run for run in runs}
        self.size = size
        self.worker = Worker()
        self.loaded: dict[str, LoadedRun] = {}  # used in the worker's thread only
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.lock = threading.Lock()

    async def list_runs(self, request: Request) -> Response:
        return JSONResponse(
            {
                "runs": list(self.runs),
                "size": self.size,
                "max_side": MAX_SIDE,
                "max_upload": MAX_UPLOAD,
                "max_drafts": MAX_DRAFTS,
                "max_candidates": MAX_CANDIDATES,
                "max_soft": MAX_SOFT,
            }
        )

    async def open(self, request: Request) -> Response:
        name = request.query_params.get("run", "")
        if name not in self.runs:
            raise HTTPException(404, f"there is no run {name[:80]!r}; there are {', '.join(self.runs)}")
        size = _query(request, "size", 1, MAX_SIDE, None)
        self.worker.check_room()
        index, data, called = await _picture(request)

        def work(job: Job) -> dict[str, Any]:
            if name not in self.loaded:
                self.loaded[name] = self.runs[name].load()
            run = self.loaded[name]
            side = size or self.size or run.size
            session = Session.open(run, name, data=data, name=called, index=index, size=side)
            key = secrets.token_urlsafe(12)
            with self.lock:
                self.sessions[key] = session
                while len(self.sessions) > MAX_SESSIONS:
                    self.sessions.popitem(last=False)
            return describe(key, session)

        return self._submit(work)

    async def job(self, request: Request) -> Response:
        job = self._job(request)
        return JSONResponse(
            {
                "job": job.id,
                "state": job.state,
                "progress": round(job.progress, 4),
                "error": shown(job.error),
                "ahead": self.worker.ahead(job),
                "result": job.result if job.state == "done" else None,
            }
        )

    async def cancel(self, request: Request) -> Response:
        self._job(request).cancel()
        return JSONResponse({})

    async def session(self, request: Request) -> Response:
        return JSONResponse(describe(*self._session(request)))

    async def source(self, request: Request) -> Response:
        key, session = self._session(request)
        self.worker.check_room()
        index, data, called = await _picture(request)

        def work(job: Job) -> dict[str, Any]:
            session.set_source(data, called, index)
            return describe(key, session)

        return self._submit(work)

    async def edit(self, request: Request) -> Response:
        key, session = self._session(request)
        self.worker.check_room()
        asked = await _json(request, EDIT)
        way = asked.pop("way")
        if way not in WAYS:
            raise ValueError(f"{PREFIX}: way must be one of {', '.join(WAYS)}, got {way!r}")
        height, width = session.current.pixels.shape[1:]
        mask = mask_of(height, width, box=asked.pop("box", None), runs=asked.pop("runs", None))

        def work(job: Job) -> dict[str, Any]:
            session.edit(way, mask, job.report, **asked)
            return describe(key, session)

        return self._submit(work)

    async def choose(self, request: Request) -> Response:
        key, session = self._session(request)
        session.choose((await _json(request, record({"draft": whole(0, MAX_DRAFTS)})))["draft"])
        return JSONResponse(describe(key, session))

    async def undo(self, request: Request) -> Response:
        key, session = self._session(request)
        session.undo()
        return JSONResponse(describe(key, session))

    async def view(self, request: Request) -> Response:
        _, session = self._session(request)
        name, _, digits = request.path_params["view"].partition("-")
        at = int(digits) if digits.isdecimal() and len(digits) <= MAX_DIGITS else -1
        if name == "swatches" and 0 <= at < session.run.model.levels:
            job = self.worker.submit(lambda _: session.swatches(at))
            await run_in_threadpool(job.ended.wait)
            if job.state != "done":
                raise ValueError(job.error or "the server ends")
            pixels = job.result
        else:
            pixels = _view(session, name, at)
        return Response(views.png(pixels), media_type="image/png", headers={"cache-control": "private, max-age=600"})

    async def download(self, request: Request) -> Response:
        _, session = self._session(request)
        named = {"content-disposition": 'attachment; filename="edited.png"', "cache-control": "no-store"}
        return Response(views.png(session.current.pixels), media_type="image/png", headers=named)

    async def ids(self, request: Request) -> Response:
        _, session = self._session(request)
        body = {
            "run": session.run_name,
            "picture": session.name,
            "strides": session.run.model.strides,
            "codes": session.run.model.n_codes,
            "maps": [ids[0].tolist() for ids in session.current.maps],
        }
        named = {"content-disposition": 'attachment; filename="ids.json"', "cache-control": "no-store"}
        return Response(json.dumps(body), media_type="application/json", headers=named)

    def _submit(self, work: Callable[[Job], Any]) -> Response:
        return JSONResponse({"job": self.worker.submit(work).id}, 202)

    def _job(self, request: Request) -> Job:
        try:
            return self.worker.job(request.path_params["id"])
        except KeyError:
            raise HTTPException(404, "there is no such job; reload the page") from None

    def _session(self, request: Request) -> tuple[str, Session]:
        key = request.path_params["id"]
        with self.lock:
            if key not in self.sessions:
                raise HTTPException(404, f"this picture is open no longer ({MAX_SESSIONS} are kept); open it again")
            self.sessions.move_to_end(key)
            return key, self.sessions[key]


def describe(key: str, session: Session) -> dict[str, Any]:
    """What the page shows of a session."""
    with session.lock:  # of one moment
        return _describe(key, session)


def _describe(key: str, session: Session) -> dict[str, Any]:
    run, now = session.run, session.current
    return {
        "id": key,
        "run": session.run_name,
        "name": session.name,
        "label": session.label,
        "version": session.version,
        "channels": now.pixels.shape[0],
        "height": now.pixels.shape[1],
        "width": now.pixels.shape[2],
        "levels": [
            {"codes": k, "stride": stride, "columns": views.swatch_columns(k), "ids": ids[0].tolist()}
            for k, stride, ids in zip(run.model.n_codes, run.model.strides, now.maps, strict=True)
        ],
        "depth": run.model.depth,
        "classes": run.priors[0].n_classes if run.priors else None,
        "prior": run.priors is not None,
        "why_no_prior": run.why_no_prior,
        "held_out": 0 if run.held_out is None else len(run.held_out),
        "edits": len(session.states) - 1,
        "drafts": len(session.drafts),
        "chosen": session.chosen,
        "seed": session.seed,
        "source": session.source is not None,
    }


def _view(session: Session, name: str, at: int) -> Any:
    model = session.run.model
    with session.lock:  # a picture and the one before it, of one moment
        now, before, drafts = session.current, session.before, session.drafts
    if name in ("picture", "after"):
        return now.pixels
    if name == "reconstruction":
        return now.reconstruction
    if name == "before":
        return before.pixels
    if name == "difference":
        return views.difference(now.pixels, before.pixels)
    if name == "ids" and 0 <= at < model.levels:
        return views.id_colours(now.maps[at][0], model.n_codes[at])
    if name == "draft" and 0 <= at < len(drafts):
        return drafts[at].pixels
    if name == "source" and session.source is not None:
        return session.source
    raise HTTPException(404, f"there is no view {name[:80]!r} with number {at}")


def endpoint(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turns errors that the caller can mend into answers of one line."""

    @wraps(answer)
    async def checked(request: Request) -> Response:
        try:
            return await answer(request)
        except (ValueError, TypeError) as error:
            return error_answer(400, " ".join(str(error).split()))
        except Busy:
            return error_answer(503, "too many edits are waiting; try again in a moment")

    return checked


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_answer(error.status_code, error.detail)


def _query(request: Request, name: str, low: int, high: int, default: int | None) -> int | None:
    given = request.query_params.get(name, "")
    if not given:
        return default
    digits = given.isascii() and given.isdecimal() and len(given) <= MAX_DIGITS
    if not (digits and low <= int(given) <= high):
        raise ValueError(f"{PREFIX}: {name} must be a whole number in {low} .. {high}, got {given[:40]!r}")
    return int(given)


async def _picture(request: Request) -> tuple[int, bytes | None, str]:
    """(held-out index, the uploaded bytes or None, the picture's name)."""
    index = _query(request, "index", 0, 1 << 40, 0) or 0
    data = await _body(request, MAX_UPLOAD, "picture")
    return index, data or None, request.query_params.get("name", "")[:200] or "upload"


async def _json(request: Request, kind: Kind) -> Any:
    return parse_json(PREFIX, "the request ", await _body(request, MAX_REQUEST, "request"), kind)[0]


async def _body(request: Request, limit: int, what: str) -> bytes:
    """The body, refused as soon as it passes the limit."""
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > limit:
            raise HTTPException(413, f"the {what} must have at most {limit >> 20} MiB")
        parts.append(part)
    return b"".join(parts)
