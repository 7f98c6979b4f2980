"""Requests to the app itself, whose clients go, or which the server cancels, at a chosen one of their await points."""

import asyncio
import contextvars
import inspect
import itertools
import json
from collections.abc import Coroutine

_visited = contextvars.ContextVar("visited", default=None)


class _Counted(Coroutine):
    """A coroutine that tells each time it waits."""

    def __init__(self, inner, visited):
        self._inner, self._visited = inner, visited
        self.__name__, self.__qualname__ = inner.__name__, inner.__qualname__

    def send(self, value):
        result = self._inner.send(value)
        self._visited()
        return result

    def throw(self, *error):
        result = self._inner.throw(*error)
        self._visited()
        return result

    def close(self):
        self._inner.close()

    def __await__(self):
        return self._inner.__await__()


def counting(loop, inner, **options):
    """A task factory under which the tasks of a visit tell each time they wait."""
    visited = _visited.get()
    is_own = visited is not None and inspect.iscoroutine(inner)  # not the end of a generator that nobody reads any more
    return asyncio.Task(_Counted(inner, visited) if is_own else inner, loop=loop, **options)


class Visit:
    """One request.

    Args:
        app: the ASGI app.
        at: number of the await point at which its client goes; None stays to the end.
        is_cancelled: the server's shutdown cancels it there instead.
    """

    def __init__(self, app, method, path, body=None, headers=(), *, at=None, is_cancelled=False):
        self._app, self._at, self._is_cancelled = app, at, is_cancelled
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        cuts = (0, len(data) // 3, 2 * len(data) // 3, len(data))
        self._parts = [data[start:stop] for start, stop in itertools.pairwise(cuts)]
        path, _, query = path.partition("?")
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                        (b"content-length", str(len(data)).encode()), *headers],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        self.points, self.status, self.content = 0, 0, b""
        self._gone = asyncio.Event()

    async def run(self):
        """Until it is over; itself."""
        _visited.set(self._visit)
        self._task = asyncio.get_running_loop().create_task(self._app(self._scope, self._receive, self._send))
        _visited.set(None)
        try:
            await self._task
        except asyncio.CancelledError:
            assert self._is_cancelled
        return self

    def json(self):
        """The answer."""
        return json.loads(self.content)

    def _visit(self):
        self.points += 1
        if self.points == self._at:
            if self._is_cancelled:
                asyncio.get_running_loop().call_soon(self._task.cancel)
            else:
                self._gone.set()

    async def _receive(self):
        if not self._gone.is_set():
            await asyncio.sleep(0)
            if self._parts:
                return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts)}
            await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        await asyncio.sleep(0)
        if self._gone.is_set():
            return  # as uvicorn does
        self.status = message.get("status", self.status)
        self.content += message.get("body", b"")
