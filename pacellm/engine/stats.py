"""What the engine counted. Plain numbers, written by the engine thread and read by whoever scrapes."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from pacellm.config import Preset
from pacellm.engine.histogram import Histogram
from pacellm.engine.sequence import Sequence
from pacellm.memory.expert_counts import UNIT
from pacellm.memory.pool import BankPool
from pacellm.memory.state import COUNTERS
from pacellm.modes import PAMode, preset_of
from pacellm.types import BankReads, LayerReads

logger = logging.getLogger("pacellm.sessions")
_RANKS = (1.1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)  # 1 is computed as a little more
_AGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_SLOTS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def _by_layer(bounds: tuple[float, ...]) -> dict[int, Histogram]:
    return defaultdict(lambda: Histogram(bounds))


@dataclass
class EngineStats:
    """Totals since the start.

    Attributes:
        dropped_tokens: of sessions' histories, those that the next prompt did not begin with.
        dropped_histories: prompts that left most of their session's history out.
        recalls, recalled_tokens: requests that had a part of their history called back, and how much.
        steps: forward passes; steps_ahead: of them launched before the tokens of the last one were read.
        prompt_tokens, generation_tokens, cached_tokens: fed from prompts (replays included), sampled, not computed
            again.
        aborted, failed: requests that did not finish. finished: the others, by reason.
        modes: requests that finished, by how their banks took part.
        bank: per layer, preset and counter of ``COUNTERS``, from requests that finished.
        experts: [L, E] int64, expert activity of requests that finished; None without a layout.
        effective_rank, slot_age, filled: by layer, of banks as requests that finished have left them: directions of
            keys, mean writes since a slot was changed, slots in use.
    """

    steps: int = 0
    steps_ahead: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    dropped_tokens: int = 0
    dropped_histories: int = 0
    recalls: int = 0
    recalled_tokens: int = 0
    aborted: int = 0
    failed: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    modes: Counter[PAMode] = field(default_factory=Counter)
    bank: dict[tuple[int, Preset], Counter[str]] = field(default_factory=dict)
    effective_rank: dict[int, Histogram] = field(default_factory=lambda: _by_layer(_RANKS))
    slot_age: dict[int, Histogram] = field(default_factory=lambda: _by_layer(_AGES))
    filled: dict[int, Histogram] = field(default_factory=lambda: _by_layer(_SLOTS))
    experts: Tensor | None = None

    def count_dropped(self, sequence: Sequence) -> None:
        """A request has ended: what its prompt left out of its session's history."""
        kinship, key = sequence.kinship, sequence.request.session
        self.dropped_tokens += kinship.dropped_tokens
        if kinship.drops_most and key is not None:
            self.dropped_histories += 1
            logger.warning(
                "session %r of tenant %r: its history had %d tokens, and a prompt of %d begins with %d of them only; "
                "pacellm.append goes on from the history", key[1], key[0], kinship.history_tokens,
                len(sequence.prompt), kinship.history_tokens - kinship.dropped_tokens,
            )  # fmt: skip


def expert_activity(pool: BankPool | None, sequence: Sequence, stats: EngineStats) -> dict[int, list[float]]:
    """What a finishing request's prompt tokens made experts do; also added to the totals. {} without a layout."""
    if pool is None or sequence.row is None or sequence.before is None or sequence.before.activity is None:
        return {}
    now = pool.activity(sequence.row)
    assert now is not None
    done = (now - sequence.before.activity).cpu()
    stats.experts = done if stats.experts is None else stats.experts + done
    return per_layer(done)


def per_layer(activity: Tensor | None) -> dict[int, list[float]]:
    """[L, E] int64 counts as tokens by layer and expert."""
    return {} if activity is None else dict(enumerate((activity.double() / UNIT).tolist()))


def bank_reads(pool: BankPool | None, sequence: Sequence, stats: EngineStats) -> BankReads | None:
    """What a finishing request's own turn did to its banks, each token counted once whether it was computed for this
    request or found in the prefix cache, and no replay; also added to the totals. None without banks."""
    preset = preset_of(sequence.turn.pa)
    if pool is None or not pool.shapes or sequence.row is None or sequence.before is None or preset is None:
        return None
    totals: Counter[str] = Counter()
    layers: dict[int, LayerReads] = {}
    filled, ranks = pool.filled(sequence.row), pool.effective_ranks(sequence.row)
    for layer, counters in pool.counters(sequence.row).items():
        before = sequence.before.counters[layer]
        done = {name: now - then for name, now, then in zip(COUNTERS, counters, before, strict=True)}
        stats.bank.setdefault((layer, preset), Counter()).update(done)
        totals.update(done)
        layers[layer] = LayerReads(**done, filled=filled[layer], effective_rank=ranks[layer])
    ages = pool.slot_ages(sequence.row)
    for layer in layers:
        stats.effective_rank[layer].observe(ranks[layer])
        stats.slot_age[layer].observe(ages[layer])
        stats.filled[layer].observe(filled[layer])
    rank = sum(ranks.values()) / len(ranks)
    return BankReads(**totals, filled=sum(filled.values()), effective_rank=rank, layers=layers)
