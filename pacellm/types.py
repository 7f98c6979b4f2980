"""What goes into the engine and what comes out of it. Plain values; no torch, no HTTP."""

from __future__ import annotations

import enum
import math
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from pacellm.errors import PaceError, RequestError
from pacellm.modes import PAChoice, PAMode

if TYPE_CHECKING:
    import numpy as np

SessionStatus = Literal["none", "new", "resident", "restored", "replayed", "folded", "lost"]
End = Literal["text", "answer", "system", "user", "assistant", "tool"]
"""What a context ends with: plain text, an answer that nothing has closed yet, or a whole message of that role."""


def _require(name: str, holds: bool, wanted: str, value: object) -> None:
    if not holds:
        raise RequestError(f"{name} must be {wanted}, not {value!r}", param=name, code="invalid_value")


class FinishReason(enum.StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Ranges are vLLM's; a value outside raises RequestError naming the field.

    Attributes:
        max_tokens: tokens to generate at most; None: up to the model's context; 0: only feed the prompt.
        temperature: 0 is greedy.
        top_p, top_k, min_p: what is cut from the distribution; 1.0, 0 and 0.0 cut nothing.
        seed: same seed, same text, whatever else runs.
        presence_penalty, frequency_penalty: on generated tokens. repetition_penalty: also on the prompt's.
        stop: strings that end the answer and are cut from it.
        stop_token_ids: tokens that end the answer, beside the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: how many alternatives to report per token; None reports nothing.
        prompt_logprobs: the same for the prompt's tokens, all but the first.
        logit_bias: added to the logits of token ids.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def shapes_logits(self) -> bool:
        """Logits are changed before a token is chosen, by what was generated before or by a bias."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            _require(name, math.isfinite(value) and low <= value <= high, f"between {low:g} and {high:g}", value)
        _require("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1", self.top_p)
        _require("top_k", -1 <= self.top_k < 2**31, "-1 or 0 (off), or at least 1", self.top_k)
        finite = math.isfinite(self.repetition_penalty)
        _require("repetition_penalty", finite and 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100",
                 self.repetition_penalty)  # fmt: skip
        if self.max_tokens is not None:
            _require("max_tokens", 0 <= self.max_tokens < 2**31, "at least 0", self.max_tokens)
        if self.seed is not None:
            _require("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer", self.seed)
        if self.logprobs is not None:
            _require("top_logprobs", 0 <= self.logprobs <= 20, "between 0 and 20", self.logprobs)
        if self.prompt_logprobs is not None:
            _require("prompt_logprobs", 0 <= self.prompt_logprobs <= 20, "between 0 and 20", self.prompt_logprobs)
        _require("stop", len(self.stop) <= 16, "at most 16 strings", len(self.stop))
        for stop in self.stop:
            _require("stop", 0 < len(stop) <= 1024, "made of strings of 1 to 1,024 characters", len(stop))
        _require("logit_bias", len(self.logit_bias) <= 1024, "at most 1,024 entries", len(self.logit_bias))
        for token, bias in self.logit_bias:
            _require("logit_bias", token >= 0, "keyed by token ids of at least 0", token)
            _require("logit_bias", math.isfinite(bias) and -100 <= bias <= 100, "between -100 and 100", bias)


class Matcher(Protocol):
    """Where one sequence is in what its answer is constrained to."""

    def allowed(self, generated: list[int], size: int) -> np.ndarray:
        """[size] bool: the tokens that may follow what was generated."""

    def is_complete(self, generated: list[int]) -> bool:
        """Nothing may follow."""


class Constraint(Protocol):
    """What an answer must look like."""

    def new_matcher(self) -> Matcher:
        """At its beginning, for one sequence."""


@dataclass(frozen=True)
class Outline:
    """What the ids of a prompt do not tell. A session keeps it for requests that append.

    Attributes:
        end: what the prompt ends with, its opening apart; None where that is not known.
        opening: tokens at its end that only begin an answer.
        answered: what the context ends with once there is an answer.
        tools: digest of the tools that it shows, 0 for none.
        question: (tokens, tokens behind them) of what is asked, from the prompt's end; None where nobody knows: then it
            is what the prompt says last.
    """

    end: End | None = "text"
    opening: int = 0
    answered: End = "text"
    tools: int = 0
    question: tuple[int, int] | None = None


@dataclass(frozen=True)
class Append:
    """A prompt that begins with its session's history, whatever that is when its turn comes.

    Attributes:
        tails: ids that follow, by what the history ends with; an error where nothing can follow.
        whole: the prompt in a session that has no history yet.
        needs_tools: the outline's tools are in no tail, so the history must have been made with the same.
        param: the field that is at fault where the prompt becomes too long.
    """

    tails: Mapping[End, list[int] | RequestError]
    whole: list[int] | RequestError
    needs_tools: bool = False
    param: str = "messages"


@dataclass(frozen=True)
class GenerationRequest:
    """One request to the engine.

    Attributes:
        request_id: unique among the requests that run.
        prompt: token ids of the whole prompt; of its longest tail where it appends.
        sampling: how to generate.
        session: (tenant, session id), or None for a request that leaves nothing behind.
        tenant: whose request it is; cached prefixes are never shared between tenants. A session's tenant goes first.
        pa: by which preset banks are read, and whether they are written.
        commit: whether the session keeps what this request did.
        priority: lower goes first in the queue; equal ones go by arrival.
        constraint: what every choice must look like; its end tokens come only where that is complete.
        n: choices; each goes on from a copy of the state after the prompt, and the first is what a session keeps.
        ce_density: part of the experts that decoded tokens use; None is the engine's.
        experts: report expert activity.
        trace: report what each token of the answer found in the banks.
        memory: whether its history may outgrow what is seen at once; None is as the engine is.
        outline: of the prompt. append: makes the prompt out of the session's history.
        continues: the answer goes on from the prompt's text, so that a space in front of it belongs to it.
        arrival: monotonic seconds. deadline: when its answer is to be complete, None for no limit; what would be later
            is refused or goes last, and who submitted it aborts it then.
        is_checked: ``Engine.check`` let it pass, and made its prompt an array.
    """

    request_id: str
    prompt: list[int] | array[int]
    sampling: SamplingParams = SamplingParams()
    session: tuple[str, str] | None = None
    tenant: str = "default"
    pa: PAChoice = "on"
    commit: bool = True
    priority: int = 0
    n: int = 1
    constraint: Constraint | None = None
    ce_density: float | None = None
    experts: bool = False
    trace: bool = False
    memory: Literal["on", "off"] | None = None
    outline: Outline = Outline()
    append: Append | None = None
    continues: bool = False
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    is_checked: bool = False

    def __post_init__(self) -> None:
        if self.ce_density is not None:
            holds = 1e-6 <= self.ce_density <= 1.0
            _require("pacellm.ce_density", holds, "above 0 and at most 1", self.ce_density)


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability (natural log) and its best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LayerReads:
    """What a request did to the bank of one layer, and the bank's fill and its keys' effective rank afterwards."""

    hits: int = 0
    fuses: int = 0
    misses: int = 0
    empty: int = 0
    merges: int = 0
    replacements: int = 0
    filled: int = 0
    effective_rank: float = 0.0


@dataclass(frozen=True)
class BankReads:
    """What a request did to its banks: over all patched layers and by layer; keys' effective rank as the mean."""

    hits: int = 0
    fuses: int = 0
    misses: int = 0
    empty: int = 0
    merges: int = 0
    replacements: int = 0
    filled: int = 0
    effective_rank: float = 0.0
    layers: dict[int, LayerReads] = field(default_factory=dict)


@dataclass(frozen=True)
class BankTrace:
    """What the tokens of an answer found in the banks.

    Attributes:
        token_ids: of the answer's beginning.
        layers: by layer a letter for each of them that was fed: h(it), f(use), m(iss), e(mpty).
        left_out: tokens behind them.
    """

    token_ids: tuple[int, ...]
    layers: dict[int, str]
    left_out: int = 0


@dataclass(frozen=True)
class Passage:
    """A part of the history that was called back.

    Attributes:
        start, end: its positions.
        vote: of the index that called it, more is better; scales differ between indexes.
        token_ids: what it says.
    """

    start: int
    end: int
    vote: float
    index: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class MemoryUse:
    """What working memory did for a request.

    Attributes:
        budget: tokens that are seen at once. resident: of them, in use at its end.
        called_back: (start, end) of all that was called back, in order; () where the request saw all of its history.
        passages: of it what was voted for most, best first.
    """

    budget: int
    resident: int
    called_back: tuple[tuple[int, int], ...] = ()
    passages: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, ``completion_tokens`` of all its choices; ``replayed_tokens`` were fed to rebuild."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    replayed_tokens: int = 0


@dataclass(frozen=True)
class Kinship:
    """What a prompt has of its session's history.

    Attributes:
        history_tokens: the history's length before this request; 0 without a session.
        dropped_tokens: of them, those that the prompt does not begin with.
        drops_most: they are more than half of what the last prompt had, so it was not the last answer alone that was
            made anew, or written another way.
    """

    history_tokens: int = 0
    dropped_tokens: int = 0
    drops_most: bool = False


@dataclass(frozen=True)
class Admitted:
    """The request left the queue. ``cached_tokens`` of the prompt need not be computed again."""

    session: SessionStatus
    cached_tokens: int
    kinship: Kinship = Kinship()


@dataclass(frozen=True)
class Progress:
    """Prefill so far, in tokens of work (``total`` includes what is replayed)."""

    total: int
    processed: int


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt's next tokens, in order; the first token of a prompt has none."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Delta:
    """New text of a choice, maybe empty while a stop string or a split character is held back; ``is_last`` with the
    choice's last token."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class ChoiceEnded:
    """One of several choices has ended; Finished follows when all have."""

    index: int
    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request that went well. ``pa`` is how its banks took part; ``note`` names what was refused on
    the way to its session; ``experts`` are prompt tokens by layer and expert, and ``trace`` is there, where asked for;
    ``memory`` is there with working memory."""

    reason: FinishReason
    usage: Usage
    session: SessionStatus
    pa: PAMode
    bank: BankReads | None
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    stop_reason: str | int | None = None
    note: str | None = None
    experts: dict[int, list[float]] | None = None
    kinship: Kinship = Kinship()
    memory: MemoryUse | None = None
    trace: BankTrace | None = None


@dataclass(frozen=True)
class Failed:
    """The last event of a request that did not."""

    error: PaceError


Event = Admitted | Progress | PromptScores | Delta | ChoiceEnded | Finished | Failed
