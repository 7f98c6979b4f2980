"""Sockets and TLS files, looked at before a model is loaded. No uvicorn, no torch."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pacellm.errors import ConfigError

Sockets = list[socket.socket]
TlsFiles = tuple[Path | None, Path | None]  # certificate chain and key


@contextmanager
def bound(host: str, port: int, *, param: str = "port") -> Iterator[Sockets]:
    """Sockets bound to a host's addresses, not listening yet; closed at the end.

    Args:
        port: 0 is any that is free, the same for all addresses.
        param: the setting that an error names.

    Raises:
        ConfigError: the host is not this machine's, or the port is taken.
    """
    with ExitStack() as opened:
        sockets: Sockets = []
        failed: OSError | None = None
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                try:
                    sockets.append(_socket(opened, family, (address[0], port, *address[2:])))
                except OSError as error:
                    failed = failed or error
                    if not _is_absent(error):
                        raise
                    continue
                port = port or sockets[-1].getsockname()[1]
            if not sockets and failed is not None:
                raise failed
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            flag = f"--{param.replace('_', '-')}"
            raise ConfigError(f"cannot listen on {host}, port {port}: {reason}; choose another {flag} or --host",
                              param=param) from error  # fmt: skip
        yield sockets


def _socket(opened: ExitStack, family: int, address: tuple[object, ...]) -> socket.socket:
    one = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    return one


def _is_absent(error: OSError) -> bool:
    """The machine has no such address or family: of a name with several, the others serve."""
    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


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
