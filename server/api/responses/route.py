"""/v1/responses: OpenAI's Responses API, its state kept in sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from pacellm.errors import NotFound, RequestError, UnsupportedParameter
from pacellm.types import GenerationRequest

from ... import sse
from ...auth import Caller, tenant_of
from ...body import answered
from ...event_queue import EventQueue
from ...reading.chat_prompt import ChatPrompt
from ...response_store import StoredResponse
from ...service import Service
from ...writing import responding
from ...writing.answer import Answer
from ...writing.places import Sent
from ..submitting import chat_prompt, check_generation
from .item_list import input_items, page
from .schema import Includable, ResponseRequest, parse_response
from .state import ConversationState
from .wire import ResponseFold, ResponsesWire, named

router = APIRouter(prefix="/v1/responses")
_Include = Annotated[Sequence[Includable], Query(alias="include[]")]  # as openai's clients write it


@router.post("")
async def create_response(request: Request) -> Response:
    """An answer to new input, alone, behind an earlier response, or in a conversation; streamed or not."""
    service: Service = request.app.state.service
    if "x-session-id" in request.headers:
        raise UnsupportedParameter("name a conversation in the body instead", param="X-Session-ID")

    async def respond(size: int, body: ResponseRequest) -> Response:
        try:
            answer, wire = await _submit(service, body, Caller.of(request, size, body.timeout))
            if body.stream:
                return await responding.streamed(service, answer, wire)
            return await responding.whole(request, answer, ResponseFold())
        except RequestError as error:
            raise named(error) from None

    return await answered(request, parse_response, respond)


@router.get("/{response_id}")
async def show_response(request: Request, response_id: str, include: _Include = ()) -> Response:
    """A stored response."""
    entry = _stored(request, response_id, "include")
    return Response(entry.answer, media_type="application/json")


@router.get("/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=512)] = None,
    include: _Include = (),
) -> Response:
    """The items that a stored response was made of, those of its conversation before it included, in pages."""
    service: Service = request.app.state.service
    transcript = _stored(request, response_id, "limit", "order", "after", "include").transcript

    def made() -> bytes:
        return sse.to_json(page(input_items(transcript), limit=limit, after=after, order=order)).encode()

    answer = await service.off_loop(made, size=transcript.total_bytes, key=tenant_of(request))
    return Response(answer, media_type="application/json")


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a stored response; those that went on from it stay."""
    service: Service = request.app.state.service
    _stored(request, response_id)
    key = (tenant_of(request), response_id)
    service.response_store.drop(key)
    service.delete_later(key)
    return {"id": response_id, "object": "response", "deleted": True}


def _stored(request: Request, response_id: str, *known: str) -> StoredResponse:
    """A stored response. Refuses what an endpoint has no meaning for, as a stream of one.

    Args:
        known: names of query parameters.

    Raises:
        RequestError: there is another parameter, or no such response.
    """
    for name in request.query_params:
        if name.removesuffix("[]") not in known:
            raise UnsupportedParameter(f"{name[:80]} is not a parameter of this endpoint", param=name[:80])
    service: Service = request.app.state.service
    entry = service.response_store.get((tenant_of(request), response_id))
    if entry is None or entry.answer is None:
        raise NotFound("there is no such response, or it is no longer kept", param="response_id")
    return entry


async def _submit(service: Service, body: ResponseRequest, caller: Caller) -> tuple[Answer, ResponsesWire]:
    """Find the place, render, tokenise, check and queue.

    Raises:
        PaceError: it is refused; nothing was queued and nothing is left.
    """
    check_generation(service, body)
    state = ConversationState(service, body, caller.tenant)
    try:
        prompt, request = await _engine_request(service, body, caller, state)
        events = EventQueue()
        generation = service.submit(request, caller, events)
    except BaseException:
        state.close()
        raise
    wire = ResponsesWire(state, request, body, service.settings.model_name)
    answer = Answer(
        service, [generation], events, prompt.parsers, wire,
        with_progress=bool(body.stream and body.return_progress), is_lost=state.is_lost, outlives=body.is_stored,
        also_close=state.close, sent=[Sent("input", body.texts())],
    )  # fmt: skip
    return answer, wire


async def _engine_request(
    service: Service, body: ResponseRequest, caller: Caller, state: ConversationState
) -> tuple[ChatPrompt, GenerationRequest]:
    messages = state.prompt_messages()
    prompt = await chat_prompt(
        service, lambda: body.chat_input(messages), body.sampling(), state.scope, state.source, caller, state.size
    )
    constraint = await service.compile(prompt.grammar, caller.tenant)
    await state.open()
    request = GenerationRequest(
        request_id=state.id,
        prompt=prompt.ids,
        sampling=prompt.sampling,
        session=state.session,
        tenant=caller.tenant,
        commit=body.is_stored,
        priority=body.priority,
        constraint=constraint,
        outline=prompt.outline,
        **body.pacellm.engine_options(),
    )
    return prompt, request
