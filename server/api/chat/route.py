"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...auth import Caller
from ...body import parsed, session_of
from ...service import Service
from ...writing import responding
from .schema import parse_chat
from .wire import Chunks, fold

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One turn of a conversation, streamed or not."""
    service: Service = request.app.state.service
    received, body = await parsed(request, parse_chat)
    caller = Caller.of(request, received.size, body.timeout)
    session = session_of(request, body.session_id)

    async def start() -> Response:
        generation, turn = await service.submit_chat(body, caller, session)
        chunks = Chunks(generation, turn.readers, body, service)
        if body.stream:
            return await responding.streamed(service, generation, chunks, wants_usage=body.wants_usage())
        return await responding.whole(request, generation, fold(chunks()), lambda: chunks.headers)

    return await service.idempotency.answer(request, caller, received.digest, start)
