"""A response's place in the state: what it goes on from, the session it works on, and how it is kept.

A stored response is a session named by the response's id, so that a later one can fork it however far the
conversation has gone meanwhile. A conversation is a session too; its responses are forks of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from typing import Any

from pacellm.errors import Conflict, NotFound, PaceError, RequestError, SessionNotFound

from ...response_store import Key, Message, StoredResponse, Transcript
from ...schema import RESPONSE_PREFIX
from ...service import Service
from .schema import ResponseRequest


class ConversationState:
    """One response, from the moment its history is known.

    Args:
        service: the engine's.
        body: what the client asked for.
        tenant: whose it is.

    Raises:
        NotFound: what it is to go on from, or an item that is referred to, is not there (any more), or another
            tenant's.
        Conflict: another response of its conversation is being made.
    """

    def __init__(self, service: Service, body: ResponseRequest, tenant: str) -> None:
        self.id = f"{RESPONSE_PREFIX}{uuid.uuid4().hex}"
        self.is_lost = False  # the session it goes on from was gone; its messages were not
        self._service, self._body, self._tenant = service, body, tenant
        self._previous = self._known()
        self._new = body.messages(self._item)
        self._session: Key | None = None
        self._made: Key | None = None  # a session that goes if this response is not kept
        self._is_over = False
        self._keeping: asyncio.Future[None] | None = None
        if self._conversation is not None:
            if self._conversation in service.conversations:
                raise Conflict("another response of this conversation is being made", param="conversation",
                               code="conversation_locked")  # fmt: skip
            service.conversations.add(self._conversation)

    @property
    def scope(self) -> str | None:
        """Whose texts these are for the tokenizer's memory; None where nothing is kept."""
        if self._previous is not None:
            return self._previous.transcript.scope
        if not self._body.is_stored:
            return None
        return f"{self._tenant}/{self._body.conversation_id or self.id}"

    @property
    def session(self) -> Key | None:
        """The session that it works on."""
        return self._session

    @property
    def source(self) -> Key | None:
        """The session that it goes on from, where there is one; it may be gone."""
        name = self._body.previous_response_id or self._body.conversation_id
        return None if name is None else (self._tenant, name)

    @property
    def _conversation(self) -> Key | None:
        name = self._body.conversation_id
        return None if name is None else (self._tenant, name)

    @property
    def size(self) -> int:
        """Bytes of what was said before."""
        return 0 if self._previous is None else self._previous.transcript.total_bytes

    def prompt_messages(self) -> list[Message]:
        """The whole conversation: instructions, which hold for this response alone, what was said, and what is new."""
        said = self._previous.transcript.all() if self._previous is not None else []
        instructions = self._body.instructions
        first = [] if instructions is None else [{"role": "system", "content": instructions}]
        return [*first, *said, *self._new]

    def _item(self, item_id: str) -> dict[str, Any] | None:
        return self._service.response_store.item(self._tenant, item_id)

    def _known(self) -> StoredResponse | None:
        body, response_store = self._body, self._service.response_store
        if body.previous_response_id is not None:
            entry = response_store.get((self._tenant, body.previous_response_id))
            if entry is None or entry.answer is None:
                raise NotFound("there is no such response, or it is no longer kept", param="previous_response_id",
                               code="previous_response_not_found")  # fmt: skip
            return entry
        if self._conversation is None:
            return None
        if response_store.was_dropped(self._conversation):
            raise _forgotten()
        return response_store.get(self._conversation)

    async def open(self) -> None:
        """Find or make the session; just before the request is queued.

        Raises:
            NotFound: a session of the conversation's name has content whose messages are not known here.
        """
        ops, body = self._service.engine.ops, self._body
        ttl = self._service.settings.response_ttl
        if self._conversation is not None:
            if self._previous is None:
                await self._check_unused(self._conversation)
            self._session = self._conversation
            return
        before = None if self._previous is None else (self._tenant, str(body.previous_response_id))
        if not body.is_stored:
            self._session = before
            return
        self._session = self._made = (self._tenant, self.id)
        if before is not None:
            try:
                await self._service.operate(ops.fork(before, self._session, ttl))
                return
            except SessionNotFound:
                self.is_lost = True
        await self._service.operate(ops.create(self._session, ttl))

    async def _check_unused(self, key: Key) -> None:
        try:
            shown = await self._service.operate(self._service.engine.ops.show(key))
        except SessionNotFound:
            return
        if shown["commits"]:
            raise _forgotten()

    async def keep(self, answer: dict[str, Any], message: Message) -> None:
        """The response is complete: from now on it can be read and gone on from, as ``message`` says it. Its session
        has it already, so this runs to its end also where the client goes meanwhile."""
        if self._body.is_stored:
            self._keeping = self._keeping or asyncio.ensure_future(self._keep(answer, message))
            await asyncio.shield(self._keeping)

    async def _keep(self, answer: dict[str, Any], message: Message) -> None:
        if self._conversation is not None:
            with contextlib.suppress(PaceError):  # its messages are enough to go on from
                fork = self._service.engine.ops.fork(
                    self._conversation, (self._tenant, self.id), self._service.settings.response_ttl
                )
                await self._service.operate(fork)
        scope = self.scope
        assert scope is not None
        messages = (*self._new, message)
        before = self._previous.transcript if self._previous is not None else None
        transcript = Transcript(messages, before, scope, tuple(item["id"] for item in answer["output"]))
        self._made = None
        if self._conversation is not None:
            self._service.response_store.put(self._conversation, transcript)
        self._service.response_store.put(
            (self._tenant, self.id), transcript, json.dumps(answer, ensure_ascii=False).encode(),
            [item["id"] for item in answer["output"]],
        )  # fmt: skip

    def close(self) -> None:
        """It is over; what was not kept leaves nothing behind."""
        if self._is_over:
            return
        self._is_over = True
        if self._keeping is None or self._keeping.done():
            self._leave()
        else:
            self._keeping.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        if self._conversation is not None:
            self._service.conversations.discard(self._conversation)
        if self._made is not None:
            self._service.delete_later(self._made)
            if self._previous is None and self.scope is not None:
                self._service.tokenizer.forget(self.scope)


def _forgotten() -> RequestError:
    return NotFound(
        "what this conversation has said is no longer kept; delete its session to begin again",
        param="conversation", code="conversation_not_found",
    )  # fmt: skip
