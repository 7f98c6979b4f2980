"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import functools

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pacellm.errors import RequestError

from ...auth import Caller
from ...body import parsed, session_of
from ...reading.text import text_append, text_prompt
from ...service import Generation, Service
from ...writing import responding
from .schema import CompletionRequest, parse_completion
from .wire import Completions, fold

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Go on with one text or several, streamed or not; with ``echo`` and ``logprobs`` also score the prompts."""
    service: Service = request.app.state.service
    received, body = await parsed(request, parse_completion)
    caller = Caller.of(request, received.size, body.timeout)
    session = session_of(request, body.session_id)

    async def start() -> Response:
        generations = await _submit(service, body, caller, session)
        chunks = Completions(generations, body, service)
        if body.stream:
            return await responding.streamed(
                service, generations[0], chunks, wants_usage=body.wants_usage(), whole=chunks
            )
        return await responding.whole(request, chunks, fold(chunks()), lambda: chunks.headers)

    return await service.idempotency.answer(request, caller, received.digest, start)


async def _submit(service: Service, body: CompletionRequest, caller: Caller, session: str | None) -> list[Generation]:
    """A request to the engine for each prompt; where one is refused, none runs."""
    service.check_options(body, session)
    sampling, prompts = body.sampling(), body.prompts()
    if session is not None and len(prompts) > 1:
        raise RequestError("a session takes one prompt at a time", param="prompt")
    grammar = None if body.structured_outputs is None else body.structured_outputs.grammar()
    constraint = await service.compile(grammar, caller.tenant)
    limit = service.engine.config.max_model_len
    generations: list[Generation] = []
    try:
        for prompt in prompts:
            off_loop = functools.partial(service.off_loop, size=len(prompt), key=caller.tenant)
            ids = await off_loop(
                functools.partial(
                    text_prompt,
                    is_cut=body.truncate_prompt_tokens is not None,
                    add_special_tokens=body.add_special_tokens,
                ),
                service.tokenizer,
                prompt,
                limit,
            )
            request = service.request("cmpl", body, ids, sampling, caller, session, body.n or 1)
            append = None
            if body.pacellm.append:
                append = await off_loop(text_append, service.tokenizer, prompt, ids, limit)
            # a form holds for the answer by itself
            request = dataclasses.replace(request, constraint=constraint, append=append, continues=constraint is None)
            generations.append(await service.submit(request, caller))
    except BaseException as error:
        for generation in generations:
            generation.close()
        if isinstance(error, RequestError) and error.param == "messages":
            error.param = "prompt"
        raise
    return generations
