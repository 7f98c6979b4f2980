"""Ports, TLS and the run of the whole: the main app, and the admin app beside it where that has a port of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import uvicorn

from pacellm.errors import ConfigError
from server.app import create_admin_app, create_app
from server.auth import Keys
from server.service import Service

_MAX_HEADER_BYTES = 64 * 1024  # of all headers together; h11 refuses more with 400


def run(
    service: Service,
    keys: Keys,
    *,
    host: str,
    port: int,
    log_level: str,
    shutdown_timeout: int,
    tls: tuple[Path | None, Path | None] = (None, None),
) -> None:
    """Serve until told to stop.

    Args:
        shutdown_timeout: seconds that running requests get to end.
        tls: certificate chain and key, both or none.

    Raises:
        ConfigError: TLS files that are not there.
    """
    certificate, key = tls
    if (certificate is None) != (key is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together", param="ssl_certfile")
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise ConfigError(f"there is no file {path}", param="ssl_certfile")

    def config(app, port: int) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            host=host,
            port=port,
            http="h11",
            ws="none",
            log_config=None,
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=shutdown_timeout,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )

    main = uvicorn.Server(config(create_app(service, keys), port))
    admin_port = service.settings.admin_port
    if admin_port is None:
        main.run()
        return
    admin = uvicorn.Server(config(create_admin_app(service, keys), admin_port))
    asyncio.run(_both(main, admin))


async def _both(main: uvicorn.Server, admin: uvicorn.Server) -> None:
    """The admin server lives as long as the main one, which alone answers signals."""
    beside = asyncio.create_task(admin._serve())
    try:
        await main.serve()
    finally:
        admin.should_exit = True
        await beside
