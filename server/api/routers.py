"""All routes. Every one needs a key, but for ``health.public``."""

from fastapi import APIRouter, Depends

from ..auth import require_key
from . import config, health, models, requests
from .chat import route as chat
from .completions import route as completions
from .openapi import route as openapi
from .responses import route as responses
from .sessions import route as sessions
from .tokens import route as tokens

private = APIRouter(dependencies=[Depends(require_key)])
for noun in (chat, completions, responses, tokens, models, config, requests, sessions, openapi, health):
    private.include_router(noun.router)
admin = APIRouter(dependencies=[Depends(require_key)])
admin.include_router(health.admin)
public = health.public
