"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
from array import array

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pacellm.errors import RequestError
from pacellm.types import Append, GenerationRequest

from ...auth import Caller
from ...body import answered, session_header, session_of
from ...event_queue import EventQueue
from ...generation import Generation
from ...reading.text import text_append, text_prompt
from ...service import Service
from ...writing import responding
from ...writing.answer import Answer
from ...writing.parsers import PlainParser
from ...writing.places import Sent
from ..submitting import check_options, new_request
from .schema import CompletionRequest, parse_completion
from .wire import CompletionsFold, CompletionsWire

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Go on with one text or several, streamed or not; with ``echo`` and ``logprobs`` also score the prompts."""
    service: Service = request.app.state.service
    header = session_header(request)

    async def respond(size: int, body: CompletionRequest) -> Response:
        session = session_of(header, body.session_id)
        try:
            answer, wire = await _submit(service, body, Caller.of(request, size, body.timeout), session)
        except RequestError as error:
            error.param = "prompt" if error.param == "messages" else error.param
            raise
        if body.stream:
            return await responding.streamed(service, answer, wire)
        return await responding.whole(request, answer, CompletionsFold())

    return await answered(request, parse_completion, respond)


async def _submit(
    service: Service, body: CompletionRequest, caller: Caller, session: str | None
) -> tuple[Answer, CompletionsWire]:
    """Tokenise, check and queue.

    Raises:
        PaceError: it is refused; nothing was queued.
    """
    check_options(service, body, session)
    requests = await _engine_requests(service, body, caller, session)
    events = EventQueue()
    generations = _queued(service, requests, caller, events)
    wire = CompletionsWire(requests, body, service.tokenizer, service.settings.model_name, service.fingerprint)
    parsers = [PlainParser() for one in requests for _ in range(one.n)]
    progress = bool(body.stream and body.return_progress)
    texts = [prompt if isinstance(prompt, str) else "" for prompt in body.prompts()]
    sent = [Sent("prompt", [text], number) for number, text in enumerate(texts)]
    return Answer(service, generations, events, parsers, wire, with_progress=progress, sent=sent), wire


async def _engine_requests(
    service: Service, body: CompletionRequest, caller: Caller, session: str | None
) -> list[GenerationRequest]:
    """One for each prompt."""
    sampling, prompts = body.sampling(), body.prompts()
    if session is not None and len(prompts) > 1:
        raise RequestError("a session takes one prompt at a time", param="prompt")
    grammar = None if body.structured_outputs is None else body.structured_outputs.grammar()
    constraint = await service.compile(grammar, caller.tenant)
    key = None if session is None else (caller.tenant, session)

    def read() -> list[GenerationRequest]:
        found = []
        for prompt in prompts:
            ids, append = _tokenized(service, body, prompt)
            request = new_request("cmpl", body, ids, sampling, caller, key, body.n or 1)
            # a form holds for the answer by itself
            continues = constraint is None
            found.append(dataclasses.replace(request, constraint=constraint, append=append, continues=continues))
        return found

    return await service.off_loop(read, size=sum(map(len, prompts)), key=caller.tenant)


def _tokenized(service: Service, body: CompletionRequest, prompt: str | list[int]) -> tuple[array[int], Append | None]:
    """A prompt's ids, alone and behind a session's history."""
    tokenizer, limit = service.tokenizer, service.engine.config.max_model_len
    is_cut = body.truncate_prompt_tokens is not None
    ids = text_prompt(tokenizer, prompt, limit, is_cut=is_cut, add_special_tokens=body.add_special_tokens)
    append = text_append(tokenizer, prompt, ids, limit) if body.pacellm.append else None
    return array("i", ids), append


def _queued(
    service: Service, requests: list[GenerationRequest], caller: Caller, events: EventQueue
) -> list[Generation]:
    """All of them; where one is refused, none runs."""
    generations: list[Generation] = []
    try:
        for number, request in enumerate(requests):
            generations.append(service.submit(request, caller, events, number))
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return generations
