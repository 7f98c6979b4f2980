"""The endpoints."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import pacellm
from pacellm.errors import Aborted, BodyTooLarge, ModelNotFound, PaceError, RequestError
from server import sse
from server.auth import tenant_of
from server.chunks import Chunks, fold
from server.errors import body_of
from server.schema import SESSION_ID, ChatCompletionRequest, parse_chat
from server.service import Generation, Service

router = APIRouter()
_SMALL_BODY = 256 * 1024


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One turn of a conversation, streamed or not."""
    service: Service = request.app.state.service
    raw = await read_body(request, service.settings.max_body_bytes)
    body = parse_chat(raw) if len(raw) < _SMALL_BODY else await service.off_loop(parse_chat, raw)
    generation = await service.submit(body, session_of(request, body), tenant_of(request))
    chunks = Chunks(generation, body, service.settings.model_name, service.tokenizer)
    if body.stream:
        try:
            found = await generation.admitted(service.settings.header_wait)
        except BaseException:
            generation.close()
            raise
        headers = {"X-PaceLLM-Session": found.session if found is not None else "queued"}
        return sse.EventStream(stream(service, chunks, body), generation.close, headers)
    return await whole(request, generation, chunks)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models served: one."""
    return {"object": "list", "data": [model_card(request.app.state.service)]}


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    service: Service = request.app.state.service
    if model != service.settings.model_name:
        raise ModelNotFound(f"model {model!r} is not served here", param="model")
    return model_card(service)


@router.get("/health")
async def health(request: Request) -> Response:
    """Alive: the engine loop beats."""
    service: Service = request.app.state.service
    age = time.monotonic() - service.thread.heartbeat
    alive = service.thread.is_alive and age < service.settings.heartbeat_limit
    status = {"status": "ok" if alive else "dead", "heartbeat_age_seconds": round(age, 3)}
    return JSONResponse(status, status_code=200 if alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Ready: loaded, and not draining."""
    service: Service = request.app.state.service
    is_ready = service.thread.is_alive and not service.thread.is_draining
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, status_code=200 if is_ready else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": pacellm.__version__}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def stream(service: Service, chunks: Chunks, body: ChatCompletionRequest) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure after the head is an event too."""
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    try:
        async for chunk in chunks(service.settings.keep_alive_seconds):
            if chunk is None:
                yield sse.KEEP_ALIVE
            elif chunk["choices"] or "prompt_progress" in chunk or "pacellm" in chunk or wants_usage:
                yield sse.event(chunk)
        yield sse.DONE
    except PaceError as error:
        yield sse.event(body_of(error))


async def whole(request: Request, generation: Generation, chunks: Chunks) -> Response:
    """The answer in one piece, unless the client goes first."""
    answer = asyncio.create_task(fold(chunks()))
    gone = asyncio.create_task(sse.disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Aborted("the client disconnected")
        headers = {"X-PaceLLM-Session": chunks.found} if chunks.found is not None else {}
        return JSONResponse(answer.result(), headers=headers)
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        generation.close()


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is over the limit.

    Raises:
        BodyTooLarge: the declared or the real length is over ``limit`` bytes.
    """
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdigit() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    if size > limit:
        raise BodyTooLarge(f"the body is over the limit of {limit:,} bytes")
    return b"".join(parts)


def session_of(request: Request, body: ChatCompletionRequest) -> str | None:
    """The session that body or header name.

    Raises:
        RequestError: they name different ones, or the header's is malformed.
    """
    header = request.headers.get("x-session-id")
    if header is not None and not re.match(SESSION_ID, header):
        raise RequestError("X-Session-ID must be 1 to 256 of A-Z a-z 0-9 . _ : -", param="X-Session-ID")
    if header is not None and body.session_id is not None and header != body.session_id:
        raise RequestError("body and X-Session-ID name different sessions", param="session_id")
    return body.session_id or header


def model_card(service: Service) -> dict[str, Any]:
    """A model as OpenAI lists it, with its context length under both usual names."""
    length = service.engine.config.max_model_len
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "pacellm",
        "max_model_len": length,
        "context_length": length,
    }
