"""Ports, TLS and the run of the whole: the main app, and the admin app beside it where that has a port of its own."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import ASGIApp

from . import connection
from .app import create_admin_app, create_app
from .auth import Keys
from .listening import Sockets, TlsFiles
from .service import Service

logger = logging.getLogger("pacellm")
_LAST_EVENTS = 5  # seconds in which streams that are cut say so
_ADMIN_CONNECTIONS = 64
_HELD_BACK = 1024  # connections, by the kernel


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service that it ends: first that no request is taken any more, then that those
    that still run have had their time.

    Args:
        service: that its app answers from.
        shutdown_timeout: seconds that running requests get to end.
    """

    def __init__(self, config: uvicorn.Config, service: Service, shutdown_timeout: int) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = shutdown_timeout + _LAST_EVENTS
        self._service, self._seconds = service, shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Of the connections that the kernel holds back asyncio accepts as many in one go as it was told to let
        it hold back, so that is few (:func:`connection.room_for`), and the kernel is told of more afterwards."""
        await super().startup(sockets)
        for listener in (one for server in self.servers for one in server.sockets):
            with socket.fromfd(listener.fileno(), listener.family, listener.type) as same:
                same.listen(_HELD_BACK)
            host, port = listener.getsockname()[:2]
            scheme, host = "https" if self.config.is_ssl else "http", f"[{host}]" if ":" in host else host
            logger.info("running on %s://%s:%d (Ctrl-C ends it)", scheme, host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end; those that do not end with an error that says why."""
        self._service.drain()
        timer = asyncio.get_running_loop().call_later(self._seconds, self._service.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def config_of(
    app: ASGIApp,
    limits: connection.ConnectionLimits,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    log_level: str = "warning",
    tls: TlsFiles = (None, None),
) -> uvicorn.Config:
    """How an app is served.

    Args:
        limits: of its connections; ``most`` gives way to the descriptors that there are.
        tls: certificate chain and key, both or none.
    """
    limits.most, batch = connection.room_for(limits.most)
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=connection.limited(limits),
        ws="none",
        log_config=None,
        log_level=log_level,
        access_log=False,
        server_header=False,
        backlog=batch,
        timeout_keep_alive=int(limits.head_seconds) + 1,
        h11_max_incomplete_event_size=connection.MAX_HEAD_BYTES,
        ssl_certfile=tls[0],
        ssl_keyfile=tls[1],
    )


def run(
    service: Service,
    keys: Keys,
    *,
    sockets: Sockets,
    admin_sockets: Sockets,
    log_level: str,
    shutdown_timeout: int,
    tls: TlsFiles = (None, None),
) -> None:
    """Serve until told to stop.

    Args:
        sockets: bound. admin_sockets: for the admin app; empty where it has no port of its own.
        shutdown_timeout: seconds that running requests get to end.
        tls: certificate chain and key, both or none.
    """

    def config(app: ASGIApp, most: int) -> uvicorn.Config:
        limits = connection.ConnectionLimits(most, service.settings.head_seconds, service.settings.stall_seconds)
        return config_of(app, limits, log_level=log_level, tls=tls)

    settings = service.settings
    app = create_app(service, keys)
    main = Server(config(app, settings.max_connections), service, shutdown_timeout)
    if not admin_sockets:
        main.run(sockets)
        return
    admin = uvicorn.Server(config(create_admin_app(service, keys), _ADMIN_CONNECTIONS))
    asyncio.run(_both((main, sockets), (admin, admin_sockets)))


async def _both(main: tuple[uvicorn.Server, Sockets], admin: tuple[uvicorn.Server, Sockets]) -> None:
    """The admin server lives as long as the main one, which alone answers signals."""
    beside = asyncio.create_task(admin[0]._serve(admin[1]))
    try:
        await main[0].serve(main[1])
    finally:
        admin[0].should_exit = True
        await beside
