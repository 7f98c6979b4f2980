"""/v1/responses: OpenAI's Responses API, its state kept in sessions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pacellm.errors import NotFound, RequestError, UnsupportedParameter
from pacellm.types import GenerationRequest

from ...auth import Caller, tenant_of
from ...body import parsed
from ...response_store import Key
from ...service import Service
from ...writing import responding
from .schema import ResponseRequest, parse_response
from .state import ConversationState
from .wire import Responses, named

router = APIRouter(prefix="/v1/responses")


@router.post("")
async def create_response(request: Request) -> Response:
    """An answer to new input, alone, behind an earlier response, or in a conversation; streamed or not."""
    service: Service = request.app.state.service
    received, body = await parsed(request, parse_response)
    if "x-session-id" in request.headers:
        raise UnsupportedParameter("name a conversation in the body instead", param="X-Session-ID")
    caller = Caller.of(request, received.size, body.timeout)

    async def start() -> Response:
        try:
            responses = await _submit(service, body, caller)
            if body.stream:
                return await responses.stream()
            return await responding.whole(request, responses, responses.whole(), lambda: responses.headers)
        except RequestError as error:
            raise named(error) from None

    return await service.idempotency.answer(request, caller, received.digest, start)


@router.get("/{response_id}")
async def show_response(request: Request, response_id: str) -> Response:
    """A stored response."""
    service: Service = request.app.state.service
    entry = service.response_store.get(_key(request, response_id))
    if entry is None or entry.answer is None:
        raise _absent()
    return Response(entry.answer, media_type="application/json")


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a stored response; those that went on from it stay."""
    service: Service = request.app.state.service
    key = _key(request, response_id)
    entry = service.response_store.get(key)
    if entry is None or entry.answer is None:
        raise _absent()
    service.response_store.drop(key)
    service.delete_later(key)
    return {"id": response_id, "object": "response", "deleted": True}


def _key(request: Request, response_id: str) -> Key:
    """Refuses what these endpoints have no meaning for, as a stream of a stored response."""
    for name in request.query_params:
        raise UnsupportedParameter(f"{name[:80]} is not a parameter of this endpoint", param=name[:80])
    return tenant_of(request), response_id


def _absent() -> NotFound:
    return NotFound("there is no such response, or it is no longer kept", param="response_id")


async def _submit(service: Service, body: ResponseRequest, caller: Caller) -> Responses:
    """Find the place, render, tokenise, check and queue.

    Raises:
        PaceError: it is refused; nothing was queued and nothing is left.
    """
    service.check_generation(body)
    continuation = ConversationState(service, body, caller.tenant)
    try:
        messages = continuation.prompt_messages()
        turn = await service.turn(
            lambda: body.turn(messages), body.sampling(), continuation.scope, continuation.source, caller,
            continuation.size,
        )  # fmt: skip
        constraint = await service.compile(turn.grammar, caller.tenant)
        await continuation.open()
        request = GenerationRequest(
            request_id=continuation.id,
            prompt=turn.prompt,
            sampling=turn.sampling,
            session=continuation.session,
            tenant=caller.tenant,
            pa=body.pacellm.pa or "on",
            commit=body.is_stored,
            ce_density=body.pacellm.ce_density,
            experts=body.pacellm.experts,
            priority=body.priority,
            constraint=constraint,
            outline=turn.outline,
        )
        generation = await service.submit(request, caller)
    except BaseException:
        continuation.close()
        raise
    return Responses(continuation, generation, turn.readers[0], body, service)
