"""What an answer says about its session, its banks and its time: the ``pacellm`` object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pacellm.text.detokenizer import Detokenizer, Vocabulary
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import BankTrace, Finished, GenerationRequest, Kinship, MemoryUse, Passage

from .places import NOTHING, Sent, place_of


def report(
    request: GenerationRequest,
    event: Finished,
    session: str,
    tokenizer: ChatTokenizer,
    sent: Sent = NOTHING,
) -> dict[str, Any]:
    """The object of a request that has ended well.

    Args:
        session: what became of it.
        tokenizer: of the model.
        sent: what its prompt was made of.
    """
    return {
        "session_id": request.session[1] if request.session is not None else None,
        "session": session,
        "note": "; ".join(note for note in (event.note, _left_out(event.kinship)) if note is not None) or None,
        "history_tokens": event.kinship.history_tokens,
        "dropped_tokens": event.kinship.dropped_tokens,
        "cached_tokens": event.usage.cached_tokens,
        "replayed_tokens": event.usage.replayed_tokens,
        "pa": event.pa,
        **(
            {"memory": _memory(event.memory, event.usage.prompt_tokens, tokenizer.decode, sent)}
            if event.memory is not None
            else {}
        ),
        "bank": dataclasses.asdict(event.bank) if event.bank is not None else None,
        **({"trace": _trace(event.trace, tokenizer.vocabulary)} if request.trace else {}),
        **({"experts": _rounded(event.experts)} if event.experts is not None else {}),
        "timings": {
            "queue_ms": round(1000 * event.queue_seconds, 1),
            "prefill_ms": round(1000 * event.prefill_seconds, 1),
            "decode_ms": round(1000 * event.decode_seconds, 1),
        },
    }


def _memory(use: MemoryUse, length: int, decode: Callable[[list[int]], str], sent: Sent) -> dict[str, Any]:
    """What was seen of the history, and the passages that were called back."""
    return {
        "view": bool(use.called_back),
        "budget_tokens": use.budget,
        "resident_tokens": use.resident,
        "called_back": [list(span) for span in use.called_back],
        "passages": [_passage(one, one.start / length, decode, sent) for one in use.passages],
    }


def _passage(one: Passage, position: float, decode: Callable[[list[int]], str], sent: Sent) -> dict[str, Any]:
    text = decode(list(one.token_ids))
    place = place_of(text, position, sent)
    return {
        "start": one.start,
        "end": one.end,
        "index": one.index,
        "vote": round(one.vote, 6),
        "text": text,
        **({} if place is None else {"in": place}),
    }


def _trace(found: BankTrace | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The answer's tokens, special ones included, and what each found in the banks; None where these are left alone."""
    if found is None or not found.layers:
        return None
    text, last = Detokenizer(vocabulary, skip_special=False), len(found.token_ids) - 1
    tokens = [text.push(token, is_last=place == last).text for place, token in enumerate(found.token_ids)]
    return {"tokens": tokens, "layers": found.layers, "left_out": found.left_out}


def _left_out(kinship: Kinship) -> str | None:
    """For prompts that left most of the history out; a last answer made anew, or written another way, is no news."""
    if not kinship.drops_most:
        return None
    shared = kinship.history_tokens - kinship.dropped_tokens
    return (
        f"the session's history had {kinship.history_tokens:,} tokens; this prompt begins with {shared:,} of them and "
        "leaves the others out"
    )


def _rounded(experts: dict[int, list[float]]) -> dict[int, list[float]]:
    """Tokens by layer and expert, to a thousandth."""
    return {layer: [round(tokens, 3) for tokens in found] for layer, found in experts.items()}
