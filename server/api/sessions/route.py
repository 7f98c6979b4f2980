"""Sessions as things of their own: list, show, create, delete, reset, fork, snapshot."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from pacellm.errors import NotFound, RequestError, UnsupportedParameter

from ...auth import lister_of, tenant_of
from ...body import check_writable, timed_body
from ...schema import SESSION_ID
from ...service import Service
from .banks import bank_of
from .schema import parse_named

router = APIRouter(prefix="/v1/sessions")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,256}")
_MAX_BODY = 64 * 1024
_PAGE = 1000


@router.get("")
async def list_sessions(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=_PAGE)] = _PAGE,
    after: Annotated[str | None, Query(pattern=SESSION_ID)] = None,
) -> dict[str, Any]:
    """The caller's sessions: metadata only, most recently used first, in pages. Without API keys there is no caller to
    tell from another, and a session's name is all that guards it: they are listed to this machine alone."""
    service: Service = request.app.state.service
    found = await service.operate(service.engine.ops.list(lister_of(request), limit=limit + 1, after=after))
    page = found[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > limit}


@router.post("")
async def create_session(request: Request) -> Response:
    """An empty session, so that it has a time to live or is there before its first request."""
    service: Service = request.app.state.service
    name, ttl = await _named(request)
    service.check_room((tenant_of(request), name))
    made = await service.operate(service.engine.ops.create((tenant_of(request), name), ttl))
    return JSONResponse(made, status_code=201)


@router.delete("")
async def delete_sessions(request: Request) -> Response:
    """Erase all of the caller's sessions and everything else that is kept of its requests."""
    service: Service = request.app.state.service
    service.tokenizer.forget(f"{tenant_of(request)}/", below=True)
    service.response_store.drop_all(tenant_of(request))
    count, left = await service.operate(service.engine.ops.delete_all(tenant_of(request)))
    return _told({"object": "list.deleted", "deleted": count, **({"durable": False} if left else {})})


@router.get("/{name}")
async def show_session(request: Request, name: str) -> dict[str, Any]:
    """One session's metadata."""
    service: Service = request.app.state.service
    return await service.operate(service.engine.ops.show(_key(request, name)))


@router.get("/{name}/banks/{layer}")
async def show_bank(
    request: Request, name: str, layer: int, start: Annotated[int, Query(ge=0, lt=2**31)] = 0
) -> dict[str, Any]:
    """One layer's bank: how alike its keys are, use and age of its slots, and the tokens that last wrote them."""
    service: Service = request.app.state.service
    engine = service.engine
    if not engine.config.pa or layer not in (engine.config.pa_layers or ()):
        raise NotFound(f"there are no banks in layer {layer}; /v1/config names those with some", param="layer")
    if engine.model.ranks is not None:
        raise UnsupportedParameter("each process of a split model holds a part of the keys", param="layer")
    found = await service.operate(engine.ops.bank(_key(request, name), layer))
    return await service.off_loop(
        bank_of, name, layer, found, start, engine.config.bank, service.tokenizer.decode, key=tenant_of(request)
    )


@router.delete("/{name}")
async def delete_session(request: Request, name: str) -> Response:
    """Delete a session; requests that use it end with an error."""
    service: Service = request.app.state.service
    service.tokenizer.forget("/".join(_key(request, name)))
    service.response_store.drop(_key(request, name))
    return _told(await service.operate(service.engine.ops.delete(_key(request, name))))


@router.post("/{name}/reset")
async def reset_session(request: Request, name: str) -> Response:
    """Empty a session."""
    service: Service = request.app.state.service
    check_writable(name)
    shown = await service.operate(service.engine.ops.reset(_key(request, name)))
    service.response_store.drop(_key(request, name))
    return _told(shown)


@router.post("/{name}/fork")
async def fork_session(request: Request, name: str) -> Response:
    """A second session that goes on from this one's last commit."""
    service: Service = request.app.state.service
    target, ttl = await _named(request)
    key, new = _key(request, name), (tenant_of(request), target)
    service.check_room(new)
    made = await service.operate(service.engine.ops.fork(key, new, ttl))
    service.response_store.copy(key, new)
    return _told(made, 201)


@router.get("/{name}/snapshot")
async def get_snapshot(request: Request, name: str, kv: bool = False) -> Response:
    """The session as signed bytes: its log and banks, with ``?kv=true`` also its KV."""
    service: Service = request.app.state.service
    # hashes the weights when first asked
    await service.pools.bulk.run(tenant_of(request), lambda: service.engine.records)
    export = service.engine.snapshots.export(_key(request, name), kv=kv, limit=service.settings.max_snapshot_bytes)
    data = await service.operate(export)
    return Response(data, media_type="application/vnd.safetensors")


@router.put("/{name}/snapshot")
async def put_snapshot(request: Request, name: str) -> Response:
    """Make a snapshot the session's state; what is refused changes nothing."""
    service: Service = request.app.state.service
    key = _key(request, name)
    check_writable(name)
    service.check_room(key)
    with service.snapshots.claim(tenant_of(request)) as claim:
        data = await timed_body(request, service.settings.max_snapshot_bytes, claim)
        trusts, owner = service.settings.allow_unsigned_snapshots, tenant_of(request)
        tenant = None if trusts or service.settings.share_snapshots else owner
        checked = await service.pools.bulk.run(
            owner, lambda: service.engine.snapshots.check(data, trust_unsigned=trusts, tenant=tenant)
        )
        made = await service.operate(service.engine.snapshots.put(key, checked, None))
    service.response_store.drop(key)  # its messages are not what the session stands for any more
    return _told(made)


def _told(answer: dict[str, Any], status: int = 200) -> Response:
    """An answer; 202 where the disk does not have it yet."""
    return JSONResponse(answer, status_code=status if answer.get("durable", True) else 202)


def _key(request: Request, name: str) -> tuple[str, str]:
    if not _ID.fullmatch(name):
        raise RequestError("a session id is 1 to 256 of A-Z a-z 0-9 . _ : -", param="session_id")
    return tenant_of(request), name


async def _named(request: Request) -> tuple[str, float | None]:
    """Name and time to live of a new session, from a small body that may be empty.

    Raises:
        RequestError: names the field.
    """
    service: Service = request.app.state.service
    with service.bodies.claim(tenant_of(request)) as claim:
        body = parse_named(await timed_body(request, _MAX_BODY, claim))
    name = body.name
    check_writable(name)
    return name, body.ttl
