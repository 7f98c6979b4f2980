"""The endpoints, one HTTP noun a file. Every route needs a key, but for ``health.public``."""

from fastapi import APIRouter, Depends

from ..auth import require_key
from . import chat, completions, health, models, openapi, requests, responses, sessions, tokens

private = APIRouter(dependencies=[Depends(require_key)])
for noun in (chat, completions, responses, tokens, models, requests, sessions, openapi, health):
    private.include_router(noun.router)
admin = APIRouter(dependencies=[Depends(require_key)])
admin.include_router(health.admin)
public = health.public

__all__ = ["admin", "private", "public"]
