"""A session's history as later requests see it: how it ends, what a prompt has of it, and prompts that append to it.

The log says which ids were fed. Where the history ends is another matter: the last sampled token was never fed, an
opening of an answer that was never made is no part of it, and neither is the text of a stop string. No torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

from pacellm.engine.sequence import Sequence
from pacellm.errors import NotAppendable, RequestError, SessionConflict, SessionLost, SessionNotFound
from pacellm.sessions.ending import Ending
from pacellm.sessions.session import Session
from pacellm.sessions.turn import common_prefix
from pacellm.text.stream import TextStream
from pacellm.types import FinishReason, Kinship


def ending_of(sequence: Sequence, text: TextStream | None, end_tokens: Collection[int]) -> Ending | None:
    """How the history ends once a complete request is committed; None where nobody knows.

    Args:
        text: of its answer.
        end_tokens: the model's own.
    """
    outline, turn, generated = sequence.request.outline, sequence.fed(), sequence.generated
    if not generated:
        if outline.end is None:
            return None
        return Ending(outline.end, turn.prompt_end - outline.opening, (), sequence.tools)
    count = len(generated)
    if text is not None and text.stopped_by is not None:
        count = text.num_tokens
    elif _has_end_mark(sequence, end_tokens):
        count -= 1  # the template writes its own
    fed = turn.end - turn.prompt_end
    return Ending(outline.answered, turn.prompt_end + min(count, fed), tuple(generated[fed:count]), sequence.tools)


def _has_end_mark(sequence: Sequence, end_tokens: Collection[int]) -> bool:
    """The last token ended the answer and is no part of it."""
    if sequence.finish_reason is not FinishReason.STOP:
        return False
    is_own = sequence.generated[-1] in end_tokens and not sequence.request.sampling.ignore_eos
    return is_own or isinstance(sequence.stop_reason, int)


def kinship(prompt: array[int], session: Session | None) -> Kinship:
    """What a prompt has of a session's history."""
    if session is None or not session.context:
        return Kinship()
    shared = common_prefix(prompt, session.context)
    known = session.ending
    history = len(session.context) if known is None else min(known.kept, len(session.context))
    dropped = max(0, history - shared)
    return Kinship(history, dropped, bool(dropped) and 2 * shared < session.log[-1].prompt_end)


def bind(sequence: Sequence, session: Session | None, *, was_lost: bool) -> None:
    """Give a request that appends its prompt, out of its session's history as it is now.

    Args:
        was_lost: there was a session of this name whose log is gone.

    Raises:
        RequestError: there is nothing to append to, or no way to.
    """
    request, append = sequence.request, sequence.request.append
    assert append is not None
    assert request.session is not None
    session = _present(session, request.session[1], was_lost=was_lost)
    if sequence.bound == session.generation:
        return
    if sequence.generated:
        raise SessionConflict("the session was changed while this request was in progress", param="session_id")
    if not session.commits:
        sequence.prompt = array("i", _ids(append.whole))
    else:
        ending = _known(session)
        if append.needs_tools and request.outline.tools != ending.tools:
            raise NotAppendable("the session's history was made with other tools, and appending cannot change them; "
                                "send the whole history without pacellm.append", param="tools")  # fmt: skip
        tail = _ids(append.tails[ending.end])
        sequence.prompt = session.context[: ending.kept] + array("i", (*ending.rest, *tail))
        if append.needs_tools or not request.outline.tools:
            sequence.tools = ending.tools
    sequence.bound = session.generation


def _present(session: Session | None, name: str, *, was_lost: bool) -> Session:
    if session is not None and (session.commits or session.kept):
        return session
    if was_lost or (session is not None and session.status == "lost"):
        raise SessionLost(
            f"session {name!r} is lost: its log gave way, expired or was damaged; send the whole history without "
            "pacellm.append",
            param="session_id",
        )
    raise SessionNotFound(
        f"no session {name!r} to append to; begin it without pacellm.append, or with POST /v1/sessions",
        param="session_id",
    )


def _known(session: Session) -> Ending:
    if not session.context:
        raise NotAppendable(
            "the session's log had grown beyond four contexts and was folded: its banks are there, its context is "
            "not; send what is to be known without pacellm.append",
            param="pacellm.append",
        )
    ending = session.ending
    if ending is None or ending.kept > len(session.context):
        raise NotAppendable(
            "how the session's history ends is not known: its last requests were lost with their server, or another "
            "version wrote it; send the whole history without pacellm.append, once",
            param="pacellm.append",
        )
    return ending


def _ids(found: list[int] | RequestError) -> list[int]:
    if isinstance(found, RequestError):
        raise found
    return found
