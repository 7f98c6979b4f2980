"""What an HTTP request says of its session: whose it is, and its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from deploy.ray.table import digest
from pacellm.server.auth import DEFAULT_TENANT, Keys

_PATH = re.compile(r"/v1/sessions/([A-Za-z0-9._:-]{1,256})(?:/[a-z]+)?/?")
_HEADER = b"x-session-id"


def session_key(scope: dict[str, Any], keys: Keys) -> int | None:
    """The digest of the session that a request names in its header, or else in its path; None where it names none, or
    has a wrong key: any replica can say so."""
    headers: Iterable[tuple[bytes, bytes]] = scope.get("headers", ())
    names = {
        name.lower(): value.decode("latin-1") for name, value in headers if name.lower() in (_HEADER, b"authorization")
    }
    session = names.get(_HEADER) or _in_path(scope.get("path", ""))
    if not session:
        return None
    tenant = DEFAULT_TENANT if not keys else keys.tenant(_bearer(names.get(b"authorization", "")))
    return None if tenant is None else digest(tenant, session)


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _in_path(path: str) -> str | None:
    match = _PATH.fullmatch(path)
    return match[1] if match else None
