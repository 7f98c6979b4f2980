"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .. import answer
from ..body import parsed, session_of
from ..callers import Caller
from ..chunks import Chunks, fold
from ..schema.chat import parse_chat
from ..service import Service

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One turn of a conversation, streamed or not."""
    service: Service = request.app.state.service
    raw, body = await parsed(request, parse_chat)
    caller = Caller.of(request, len(raw), body.timeout)
    session = session_of(request, body.session_id)

    async def start() -> Response:
        generation, turn = await service.submit_chat(body, caller, session)
        chunks = Chunks(generation, turn.readers, body, service)
        if body.stream:
            return await answer.streamed(service, generation, chunks, wants_usage=body.wants_usage())
        return await answer.whole(request, generation, fold(chunks()), lambda: chunks.headers)

    return await service.idempotency.answer(request, caller, raw, start)
