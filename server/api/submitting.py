"""Bodies of the generating endpoints to requests to the engine."""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Callable

from pacellm import modes
from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.types import GenerationRequest, SamplingParams

from ..auth import Caller
from ..reading.chat_input import ChatInput
from ..reading.chat_prompt import ChatPrompt, RenderedChat
from ..response_store import Key
from ..service import Service
from .fields import GenerationFields, SamplingFields


def check_options(service: Service, body: SamplingFields, session: str | None) -> None:
    """Refuse what this server does not do, before any work.

    Raises:
        RequestError: names the field.
    """
    check_generation(service, body)
    if body.truncate_prompt_tokens is not None and session is not None:
        raise RequestError("a session's prompt cannot be truncated", param="truncate_prompt_tokens")
    if body.pacellm.append and session is None:
        raise RequestError("pacellm.append needs a session: name one with session_id or X-Session-ID",
                           param="pacellm.append", code="invalid_value")  # fmt: skip


def check_generation(service: Service, body: GenerationFields) -> None:
    """Refuse another model, banks where there are none, and what would make answers worse unasked.

    Raises:
        RequestError: names the field.
    """
    service.check_model(body.model)
    config = service.engine.config
    if body.pacellm.pa not in (None, "off") and not config.pa:
        raise UnsupportedParameter("this server runs with --no-pa", param="pacellm.pa")
    if service.gate is not None:
        mode = modes.resolve(body.pacellm.pa or "on", config.bank.preset) if config.pa else "off"
        service.gate.check_request(modes.preset_of(mode), body.pacellm.ce_density)


async def chat_prompt(
    service: Service,
    asked: Callable[[], ChatInput],
    sampling: SamplingParams,
    scope: str | None,
    session: Key | None,
    caller: Caller,
    size: int = 0,
) -> ChatPrompt:
    """What a conversation comes to: one trip to the thread pool, and another one where the prompt has texts of special
    tokens that its session may have generated as such, which the engine is asked for between the two.

    Args:
        asked: called off the event loop.
        scope: as for :meth:`RenderedChat.tokenized`.
        session: that it goes on.
        size: characters of the conversation that are not in the caller's body.

    Raises:
        RequestError: names the field.
    """
    limit = service.engine.config.max_model_len

    def read() -> RenderedChat | ChatPrompt:
        rendered = RenderedChat(service.tokenizer, service.grammars, asked(), limit)
        needs_log = session is not None and rendered.needs_log
        return rendered if needs_log else rendered.tokenized(sampling, scope, None)

    found = await service.off_loop(read, size=caller.size + size, key=caller.tenant)
    if isinstance(found, ChatPrompt):
        return found
    assert session is not None
    logged = await service.operate(service.engine.ops.context(session))
    return await service.off_loop(found.tokenized, sampling, scope, logged, size=found.size, key=caller.tenant)


def new_request(
    kind: str,
    body: SamplingFields,
    prompt: array[int],
    sampling: SamplingParams,
    caller: Caller,
    session: Key | None,
    n: int,
) -> GenerationRequest:
    """The engine's request; its id begins with ``kind``."""
    return GenerationRequest(
        request_id=f"{kind}-{uuid.uuid4().hex}",
        prompt=prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :],
        sampling=sampling,
        session=session,
        tenant=caller.tenant,
        n=n,
        commit=body.pacellm.commit,
        priority=body.priority,
        **body.pacellm.engine_options(),
    )
