"""Body of POST /v1/sessions and /v1/sessions/{name}/fork."""

from __future__ import annotations

import uuid
from typing import Annotated

from pydantic import Field

from ...schema import SESSION_ID, Strict, parse

_MAX_TTL = 10 * 365 * 86400


class NamedSession(Strict):
    """The new session's name, made up where it is missing, and its seconds to live."""

    session_id: Annotated[str, Field(pattern=SESSION_ID)] | None = None
    ttl: Annotated[float, Field(gt=0, le=_MAX_TTL)] | None = None

    @property
    def name(self) -> str:
        """The name; another one each time where the client gave none."""
        return uuid.uuid4().hex if self.session_id is None else self.session_id


def parse_named(body: bytes | bytearray) -> NamedSession:
    """A checked body; an empty one is an empty object.

    Raises:
        RequestError: names the field.
    """
    return parse(NamedSession, body if body.strip() else b"{}")
