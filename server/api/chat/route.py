"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...auth import Caller
from ...body import answered, session_header, session_of
from ...event_queue import EventQueue
from ...service import Service
from ...writing import responding
from ...writing.answer import Answer
from ...writing.places import Sent
from ..submitting import chat_prompt, check_options, new_request
from .schema import ChatCompletionRequest, parse_chat
from .wire import ChatFold, ChatWire

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One turn of a conversation, streamed or not."""
    service: Service = request.app.state.service
    header = session_header(request)

    async def respond(size: int, body: ChatCompletionRequest) -> Response:
        session = session_of(header, body.session_id)
        answer, wire = await _submit(service, body, Caller.of(request, size, body.timeout), session)
        if body.stream:
            return await responding.streamed(service, answer, wire)
        return await responding.whole(request, answer, ChatFold())

    return await answered(request, parse_chat, respond)


async def _submit(
    service: Service, body: ChatCompletionRequest, caller: Caller, session: str | None
) -> tuple[Answer, ChatWire]:
    """Render, tokenise, check and queue.

    Raises:
        PaceError: it is refused; nothing was queued.
    """
    check_options(service, body, session)
    scope = None if session is None else f"{caller.tenant}/{session}"
    key = None if session is None else (caller.tenant, session)
    prompt = await chat_prompt(service, body.chat_input, body.sampling(), scope, key, caller)
    constraint = await service.compile(prompt.grammar, caller.tenant)
    request = dataclasses.replace(
        new_request("chatcmpl", body, prompt.ids, prompt.sampling, caller, key, body.n or 1),
        constraint=constraint,
        outline=prompt.outline,
        append=prompt.append,
        continues=body.continue_final_message and constraint is None,  # a form holds for the answer by itself
    )
    events = EventQueue()
    generation = service.submit(request, caller, events)
    wire = ChatWire(request, body, service.settings.model_name, service.fingerprint)
    progress = bool(body.stream and body.return_progress)
    sent = [Sent("message", prompt.texts)]
    answer = Answer(service, [generation], events, prompt.parsers, wire, with_progress=progress, sent=sent)
    return answer, wire
