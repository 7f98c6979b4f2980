"""``/``, ``/docs`` and the files that they are made of. None of it needs a key, and nothing of it is from elsewhere."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pacellm.errors import NotFound

router = APIRouter(include_in_schema=False)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class File:
    """A file that is sent: its content, its media type, and a tag that is another where the content is."""

    data: bytes
    type: str
    tag: str


@cache
def known() -> dict[str, File]:
    """All of them by name; other names are not looked for on the disk."""
    return dict(_below(files(__package__).joinpath("static"), ""))


def _below(folder: Traversable, prefix: str) -> list[tuple[str, File]]:
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _below(entry, f"{prefix}{entry.name}/")
        else:
            data = entry.read_bytes()
            suffix = entry.name[entry.name.rfind(".") :]
            kind = _TYPES.get(suffix) or mimetypes.guess_type(entry.name)[0] or "text/plain"
            kind += "; charset=utf-8" if kind.startswith("text/") else ""
            found.append((prefix + entry.name, File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"')))
    return found


def _sent(request: Request, name: str) -> Response:
    """A file, or that the browser has it already.

    Raises:
        NotFound: there is none of that name.
    """
    found = known().get(name)
    if found is None:
        raise NotFound("the page has no such file")
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": found.tag,
    }
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.type, headers=headers)


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _sent(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API's document, readable and to be tried out."""
    return _sent(request, "docs.html")


@router.get("/page/{name:path}")
async def file(request: Request, name: str) -> Response:
    """What the two are made of."""
    return _sent(request, name)
