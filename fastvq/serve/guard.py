"""Refuses requests of foreign pages, and adds the security headers to every answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LOOPBACK", "PREFIX", "Guard", "error_answer", "shown"]

PREFIX = "fastvq edit --serve"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(:\d*)?")  # a name, or an IPv6 address in brackets, and a port
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Adds security headers, and refuses requests to a foreign name and those that a page of another site makes."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = {host.strip("[]").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        refused = self._refuse(Request(scope))
        await (refused or self.app)(scope, receive, send_with_headers)

    def _refuse(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        found = HOST.fullmatch(host)
        name = found[1].strip("[]").lower() if found else ""
        if "*" not in self.hosts and name not in self.hosts:
            return error_answer(400, f"the page is not served under the name {name[:80]!r}; allow it with --allow-host")
        if request.method == "POST" and origin and origin.partition("://")[2].lower() != host.lower():
            return error_answer(403, f"a page of {origin[:80]} must not edit here")
        return None


def error_answer(status: int, message: str) -> Response:
    return JSONResponse({"error": shown(message)}, status)


def shown(message: str | None) -> str | None:
    """A message without the name of the command, which the reader of the page knows."""
    return message and message.removeprefix(f"{PREFIX}: ")
