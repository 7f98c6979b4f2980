"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pacellm.errors import ContextLengthExceeded, RequestError

from ... import sse
from ...auth import tenant_of
from ...body import parsed
from ...reading.rendering import check_characters, rendered_chat
from ...reading.text import check_text, text_limit
from ...service import Service
from .schema import DetokenizeRequest, TokenizeRequest, parse_detokenize, parse_tokenize

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Ids of a text or of a conversation as the model would get it."""
    service: Service = request.app.state.service
    size, body = await parsed(request, parse_tokenize)
    service.check_model(body.model)
    answer = await service.off_loop(_tokens, service, body, size=size, key=tenant_of(request))
    return Response(answer, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of ids, special tokens included."""
    service: Service = request.app.state.service
    _, body = await parsed(request, parse_detokenize)
    service.check_model(body.model)
    answer = await service.off_loop(_text, service, body, size=len(body.tokens), key=tenant_of(request))
    return Response(answer, media_type="application/json")


def _tokens(service: Service, body: TokenizeRequest) -> bytes:
    """The answer. Many ids take a while to write, so the event loop has no part in it."""
    ids = _ids(service, body)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.config.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = service.tokenizer.texts(ids)
    return sse.to_json(answer).encode("utf-8", "replace")


def _text(service: Service, body: DetokenizeRequest) -> bytes:
    if max(body.tokens, default=0) >= service.engine.model.vocab_size:
        raise RequestError("tokens has an id outside the vocabulary", param="tokens")
    return sse.to_json({"prompt": service.tokenizer.decode(body.tokens)}).encode("utf-8", "replace")


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    tokenizer, limit = service.tokenizer, text_limit(service.engine.config.max_model_len)
    if body.prompt is not None:
        check_text(body.prompt, "prompt")
        try:
            return tokenizer.encode(body.prompt, limit=limit, add_special_tokens=body.add_special_tokens)
        except ContextLengthExceeded as error:
            error.param = "prompt"
            raise
    check_characters(tokenizer, body.messages or (), limit)
    rendered = rendered_chat(
        tokenizer, body.messages or (), body.tools or (), add_generation_prompt=body.add_generation_prompt
    )
    return tokenizer.encode_chat(rendered, limit=limit)
