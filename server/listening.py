"""Sockets and TLS files, looked at before a model is loaded. No uvicorn, no torch."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from pacellm.errors import ConfigError


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a host, not listening yet. Port 0 is any that is free, for all the same one.

    Raises:
        ConfigError: there is no such host here, or its port is taken; names which.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(socket.socket(family, kind, protocol))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind((address[0], port, *address[2:]))
            port = port or sockets[-1].getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host",
                          param="port") from error  # fmt: skip
    return sockets


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse one without the other.

    Raises:
        ConfigError: that, or files that are not there.
    """
    if (certificate is None) != (key is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together", param="ssl_certfile")
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise ConfigError(f"there is no file {path}", param="ssl_certfile")


def close(sockets: Sequence[socket.socket]) -> None:
    """Let them go."""
    for one in sockets:
        one.close()
