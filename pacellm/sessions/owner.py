"""``owner.json``: who owns a session's folder and what is known of it, by a schema and under a keyed digest."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

MAX_BYTES = 2**20
MAX_RANKS = 128  # turns
_STRICT = ConfigDict(strict=True, extra="forbid")
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Rank = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seen = tuple[str, int, int]
"""(server, epoch, generation): tells one ``owner.json`` of a session from every other."""


class OwnerRefused(Exception):
    """``owner.json`` is damaged, or another session's; says what is wrong."""


@dataclass(config=_STRICT)
class About:
    """What a list of sessions shows without opening their logs.

    Attributes:
        tokens: of the context.
        created, last_used: seconds since 1970; None where nobody knew. ``ttl``: seconds it lives unused.
        kept: created by itself, so it stays without a commit.
        stored: tokens of this generation's KV on disk, of its window alone where it is beyond its budget.
           ``saved``: generation whose log is there.
        banks: per layer, fill and reads so far.
        ranks: effective rank of the keys by layer after each of the last commits.
        parent: id of the session that it was forked from.
    """

    tokens: Count = 0
    created: Seconds | None = None
    last_used: Seconds | None = None
    ttl: Seconds | None = None
    commits: Count = 0
    kept: bool = False
    stored: Count | None = None
    saved: Count | None = None
    banks: dict[int, dict[str, Count]] = field(default_factory=dict)
    ranks: dict[int, Annotated[list[Rank], Field(max_length=MAX_RANKS)]] = field(default_factory=dict)
    parent: Annotated[str, Field(max_length=256)] | None = None


@dataclass(config=_STRICT)
class Owner:
    """Contents of ``owner.json``.

    Attributes:
        server: id of the owning server.
        epoch: how often the session has changed hands.
        generation: commits, resets and deletes so far, whether or not their log was written.
        deleted: the rest is a tombstone. ``expired``: its time had come.
        changed: when it was written, seconds since 1970.
    """

    tenant: str
    id: str
    server: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    epoch: Count = 1
    generation: Count = 0
    deleted: bool = False
    expired: bool = False
    changed: Seconds = field(default_factory=time.time)
    about: About = field(default_factory=About)

    @property
    def seen(self) -> Seen:
        """What tells it from others."""
        return self.server, self.epoch, self.generation

    def to_json(self) -> str:
        """For a log's metadata, which has a digest of its own."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def to_bytes(self, secret: bytes) -> bytes:
        """The file."""
        text = self.to_json()
        return f'{{"owner":{text},"tag":"{_tag(text, secret)}"}}'.encode()


_SCHEMA = TypeAdapter(Owner)


def parse_owner(text: str | bytes) -> Owner:
    """What :meth:`Owner.to_json` wrote.

    Raises:
        OwnerRefused: it did not.
    """
    try:
        return _SCHEMA.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise OwnerRefused(f"{where}: {first['msg']}") from None


def read_owner(data: bytes, secret: bytes) -> Owner:
    """The file's contents. Those of before there was a digest are taken as they are, where the schema lets them.

    Raises:
        OwnerRefused: damaged, or written under another key.
    """
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OwnerRefused(f"it is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict) or "owner" not in found:
        return parse_owner(data)
    if found.keys() != {"owner", "tag"} or not isinstance(found["tag"], str):
        raise OwnerRefused("it has no tag")
    text = json.dumps(found["owner"], sort_keys=True, separators=(",", ":"))
    if not hmac.compare_digest(_tag(text, secret).encode(), found["tag"].encode("utf-8", "surrogatepass")):
        raise OwnerRefused("it is damaged or was not written under this directory's key (its tag does not match)")
    return parse_owner(text)


def _tag(text: str, secret: bytes) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
