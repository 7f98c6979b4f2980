"""Who is calling. A key names a tenant; a tenant's name is the namespace of its sessions, so a key can be rotated."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from pacellm.errors import ConfigError, InvalidApiKey, RequestError

DEFAULT_TENANT = "default"
_MIN_KEY = 8
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")  # what a proxy on this machine says of others


class Keys:
    """API keys by the tenant that each stands for. Without any, every caller is the default tenant.

    Args:
        tenants: tenant names by key.
    """

    def __init__(self, tenants: Mapping[str, str]) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in tenants.items()]

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def names(self, tenant: str) -> bool:
        """A key stands for this tenant."""
        return any(tenant == known for _, known in self._tenants)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key, None for a wrong one. Every known key is compared, each in constant time."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def read_keys(keys: Iterable[str], file: Path | None) -> Keys:
    """Keys from the flags.

    Args:
        keys: each a tenant of its own, named by the key's hash.
        file: lines of ``tenant: key``; empty lines and those that begin with # are skipped. Several keys may name one
            tenant.

    Raises:
        ConfigError: an unreadable file or a line that is none of these; the key is not shown.
    """
    tenants = {key: f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}" for key in keys}
    if file is not None:
        tenants |= _read_file(file)
    if not all(map(_is_key, tenants)):
        raise ConfigError(f"an API key needs at least {_MIN_KEY} printable ASCII characters", param="api_key")
    return Keys(tenants)


def _read_file(file: Path) -> dict[str, str]:
    """Tenants by key."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {file}: {error}", param="api_key_file") from error
    tenants = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        tenant, colon, key = (part.strip() for part in line.partition(":"))
        if not (tenant and colon and key):
            raise ConfigError(f"{file}, line {number} is not 'tenant: key'", param="api_key_file")
        tenants[key] = tenant
    return tenants


def _is_key(text: str) -> bool:
    return len(text) >= _MIN_KEY and text.isascii() and text.isprintable() and " " not in text


async def require_key(request: Request) -> None:
    """Route dependency: let a request in whose bearer key is known, and note its tenant.

    Raises:
        InvalidApiKey: there is none, or it is wrong.
    """
    keys: Keys = request.app.state.keys
    if not keys:
        request.state.tenant = DEFAULT_TENANT
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    tenant = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
    if tenant is None:
        raise InvalidApiKey("a valid API key is needed: Authorization: Bearer KEY")
    request.state.tenant = tenant


def tenant_of(request: Request) -> str:
    """The caller's tenant, once :func:`require_key` has let it in."""
    return request.state.tenant


def lister_of(request: Request) -> str:
    """The tenant whose sessions and requests may be listed. Without keys a session's name is all that guards it, so
    only this machine is told names.

    Raises:
        RequestError: there are no keys, and the caller is on another machine.
    """
    if not request.app.state.keys and not _is_near(request):
        raise RequestError(
            "this server has no API keys, so everybody's sessions and requests are in one namespace and are listed to "
            "this machine alone; start it with --api-key",
            code="api_keys_needed",
        )
    return tenant_of(request)


def _is_near(request: Request) -> bool:
    """It came from this machine, as far as can be told."""
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Caller:
    """Who asks, under which name, and until when.

    Attributes:
        tenant: namespace of the sessions.
        request_id: the X-Request-ID.
        arrival: monotonic seconds.
        size: bytes of the request's body.
        timeout: what the request allows itself, in seconds from arrival.
        traceparent: the span that the request belongs to, as its header names it.
    """

    tenant: str
    request_id: str
    arrival: float
    size: int = 0
    timeout: float | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, request: Request, size: int, timeout: float | None = None) -> Caller:
        """The caller of an HTTP request that was let in."""
        parent = request.headers.get("traceparent")
        return cls(tenant_of(request), request.state.request_id, request.state.arrival, size, timeout, parent)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
