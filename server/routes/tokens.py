"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from pacellm.errors import RequestError
from server.auth import tenant_of
from server.body import parsed
from server.prompts import check_text, rendered_chat
from server.schema.tokens import TokenizeRequest, parse_detokenize, parse_tokenize
from server.service import Service

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """Ids of a text or of a conversation as the model would get it."""
    service: Service = request.app.state.service
    raw, body = await parsed(request, parse_tokenize)
    service.check_model(body.model)
    ids = await service.off_loop(_ids, service, body, size=len(raw), key=tenant_of(request))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.config.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = service.tokenizer.texts(ids)
    return answer


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    """Text of ids, special tokens included."""
    service: Service = request.app.state.service
    _, body = await parsed(request, parse_detokenize)
    service.check_model(body.model)
    if any(token >= service.engine.model.vocab_size for token in body.tokens):
        raise RequestError("tokens has an id outside the vocabulary", param="tokens")
    decode = service.tokenizer.decode
    return {"prompt": await service.off_loop(decode, body.tokens, size=len(body.tokens), key=tenant_of(request))}


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    if body.prompt is not None:
        check_text(body.prompt, "prompt")
        return service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    rendered = rendered_chat(
        service.tokenizer, body.messages or (), body.tools or (), add_generation_prompt=body.add_generation_prompt
    )
    return service.tokenizer.encode_chat(rendered)
