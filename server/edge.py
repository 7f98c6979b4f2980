"""The outermost layer: request ids, what browsers may do, and one log line a request. It never looks into bodies."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pacellm.errors import ForeignOrigin, PaceError, RequestError

from . import logs
from .errors import response_of

logger = logging.getLogger("pacellm.access")
REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"
MAX_HEADERS = 128
_LONGEST_PATH = 100  # characters of one that nobody answers to, in the log
_PROBES = frozenset(("/health", "/ready", "/metrics", "/version"))
_PAGES = ("/", "/docs")  # links from elsewhere may lead here; what they do is asked for by their own origin
_FOR_ALL = frozenset(("/health", "/ready", "/metrics"))  # probes and scrapes come by a pod's address or any name


class Edge:
    """ASGI middleware around the whole app.

    Args:
        app: what answers.
        allowed_hosts: names that the Host header may have beside IP addresses, ``*.example.org`` for subdomains; empty
            lets all pass. An address is no name that a web page's owner could point here.
        origins: whose pages may use the server; its own always may.
        count: called with the status of every answer, but for those to probes and scrapes.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        count: Callable[[int], None] | None = None,
    ) -> None:
        self._app, self._hosts = app, tuple(host.lower() for host in allowed_hosts)
        self._origins, self._count = frozenset(origins), count
        self._routes = tuple(_flat(getattr(app, "routes", ())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"], state["arrival"] = request_id, started
        # whoever has a GET has a HEAD too: the same head, without the body, which the connection leaves out
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            problem = _problem(headers) or self._stranger(scope["path"], headers)
            app = self._app if problem is None else response_of(problem)
            await app(inner, receive, answer)
        finally:
            if status and self._count is not None and scope["path"] not in _PROBES:
                self._count(status)
            self._log(scope["method"], inner, status, time.monotonic() - started)
            logs.request_id.reset(token)

    def _stranger(self, path: str, headers: Headers) -> PaceError | None:
        """Refuse what a web page of someone else's may have sent."""
        if path in _FOR_ALL:
            return None
        host = headers.get("host", "")
        if self._hosts and not self._is_allowed(_host(host)):
            return RequestError(
                f"this server has no name {_host(host)[:80]!r}; start it with --allowed-host NAME", param="Host",
                code="invalid_host",
            )  # fmt: skip
        if path not in _PAGES and self._is_foreign(headers, host):
            return ForeignOrigin(
                "pages of other origins may not use this server; start it with --cors-origin ORIGIN", param="Origin"
            )
        return None

    def _is_allowed(self, host: str) -> bool:
        if _is_address(host) or "*" in self._hosts:
            return True
        return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self._hosts)

    def _is_foreign(self, headers: Headers, host: str) -> bool:
        """A browser sent it for a page that is not this server's own. Whatever else sends requests has none of this."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins or "*" in self._origins:
            return False
        if site is not None:  # pages cannot set it
            return site not in ("same-origin", "none")
        return origin is not None and origin.partition("://")[2].lower() != host.lower()

    def _log(self, method: str, scope: Scope, status: int, seconds: float) -> None:
        """Method, route and outcome; neither the query nor anything from a body. Probes and scrapes that go well are
        said at the level debug."""
        fields = {
            "method": method if method.isalpha() else "?",
            "route": self._route(scope),
            "status": status,
            "duration_ms": round(1000 * seconds, 1),
            "tenant": scope.get("state", {}).get("tenant"),
        }
        level = logging.DEBUG if scope["path"] in _PROBES and status < 400 else logging.INFO
        logger.log(level, "%(method)s %(route)s %(status)s %(duration_ms)s ms", fields, extra={"fields": fields})

    def _route(self, scope: Scope) -> str:
        """The route's path, without what callers put into it; a path that has no route as it came, up to a length."""
        route = scope.get("route")
        if route is None:  # there is none, or the request was refused before it was looked for
            route = next((one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path", None) or quote(scope["path"])[:_LONGEST_PATH]


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Routes with those of the routers among them."""
    for route in routes:
        router = getattr(route, "original_router", None)
        yield from [route] if router is None else _flat(router.routes)


def _request_id(headers: Headers) -> str:
    """The one that the client gave, or a new one where it gave none that can go into logs and headers as it is."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(REQUEST_ID, given) else uuid.uuid4().hex


def _problem(headers: Headers) -> RequestError | None:
    if len(headers) > MAX_HEADERS:
        return RequestError(f"more than {MAX_HEADERS} headers", code="too_many_headers")
    return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host(header: str) -> str:
    """The name without the port; IPv6 addresses without brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().removesuffix(".")
