"""Frozen configurations. What the model decides is filled in by one ``resolve`` call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from pacellm.errors import ConfigError
from pacellm.view import BLOCK, Budget

Preset = Literal["observe", "reference", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
Ties = Literal["index", "age"]
ATTENTION_KERNELS = ("auto", "flash", "cudnn", "flash-attn-2", "flash-attn-3")
IndexName = Literal["lexical", "activity", "attention"]
INDEXES: tuple[IndexName, ...] = get_args(IndexName)
_MAX_HISTORY = 1_000_000

_NUMBERS: dict[str, dict[str, float]] = {
    "observe": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.2},
    "reference": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.2},
    "paper": {"theta_high": 0.7, "theta_low": 0.3, "alpha": 1.0},
}


def _check(config: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, not {getattr(config, name)!r}", param=name)


@dataclass(frozen=True)
class PAConfig:
    """Persistent Activity (PaceLLM, arXiv 2506.17310, section 3.2.1 and Algorithm 1).

    ``preset`` chooses the authors' released code (``reference``), Algorithm 1 (``paper``), or the former without an
    effect on outputs (``observe``); numbers left at None are each preset's own. Unknown field names are a TypeError,
    impossible values a ConfigError.

    Attributes:
        preset: which reading of the method; of an engine, that of requests that name none.
        bank_size: slots M of one bank.
        segment: prompt tokens per segment; all of a segment reads the bank as it stood at its start.
        theta_high: similarity above which a read is a hit.
        theta_low: similarity up to which a read is a miss.
        top_k: most similar slots averaged by a read.
        bottom_k: least similar slots averaged by a read.
        negative_weight: weight λ of the least similar slots.
        fuse_weight: weight of the most similar slots in a fuse.
        alpha: how much of the output the memory replaces.
        momentum: how much of a merged slot stays.
        ties: which of equally used slots is replaced first: lowest ``index``, or longest untouched (``age``).
    """

    preset: Preset = "observe"
    bank_size: int = 100
    segment: int = 1024
    theta_high: float | None = None
    theta_low: float | None = None
    top_k: int = 5
    bottom_k: int = 2
    negative_weight: float = 0.1
    fuse_weight: float = 0.5
    alpha: float | None = None
    momentum: float = 0.5
    ties: Ties = "index"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}", param="preset")
        if self.ties not in ("index", "age"):
            raise ConfigError(f"ties must be 'index' or 'age', not {self.ties!r}", param="ties")
        for name in ("bank_size", "segment", "top_k"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "bottom_k", self.bottom_k >= 0, "at least 0")
        for name in ("momentum", "fuse_weight"):
            _check(self, name, 0.0 <= getattr(self, name) <= 1.0, "between 0 and 1")
        _check(self, "alpha", 0.0 <= self.mix <= 1.0, "between 0 and 1")
        _check(self, "negative_weight", abs(self.negative_weight) <= 1.0, "between -1 and 1")
        for preset in PRESETS:  # a number that is given holds for all of them, and any of them may be asked for
            high, low = self._number("theta_high", preset), self._number("theta_low", preset)
            if not -1.0 <= low <= high <= 1.0:
                raise ConfigError(
                    f"theta_low must be in -1 <= theta_low <= theta_high <= 1, not {low!r} with theta_high {high!r}",
                    param="theta_low",
                )

    def _number(self, name: str, preset: str) -> float:
        given = getattr(self, name)
        return _NUMBERS[preset][name] if given is None else given

    @property
    def high(self) -> float:
        """``theta_high``, the preset's own where none is given."""
        return self._number("theta_high", self.preset)

    @property
    def low(self) -> float:
        """``theta_low``, the preset's own where none is given."""
        return self._number("theta_low", self.preset)

    @property
    def mix(self) -> float:
        """``alpha``, the preset's own where none is given."""
        return self._number("alpha", self.preset)

    @property
    def acts(self) -> bool:
        """Outputs change; otherwise the bank is fed what they would have been."""
        return self.preset != "observe"

    @property
    def is_paper(self) -> bool:
        """Algorithm 1, not the released code."""
        return self.preset == "paper"

    def of(self, preset: Preset) -> PAConfig:
        """The same banks under another preset."""
        return _with_preset(self, preset)


@cache
def _with_preset(config: PAConfig, preset: Preset) -> PAConfig:
    return dataclasses.replace(config, preset=preset)


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use. Fields left at None are filled in by :meth:`resolve`.

    Attributes:
        max_model_len: longest context in tokens, prompt and answer together; with ``working_memory`` it is the history
            that may be so long, and None is a million.
        working_memory: tokens of a history that are seen at once and lie on the device; at most the model's context.
            None: contexts end where the model's does.
        working_memory_window: of them, those that are seen because they are recent.
        working_memory_index: what votes for blocks to be called back; several share them. None: what is known of the
            model decides.
        working_memory_block: tokens that are voted for together.
        working_memory_recall: tokens that are called back for a question, as far as the budget has room.
        max_num_batched_tokens: tokens of one step.
        max_num_seqs: requests that run at once.
        max_num_mixed_tokens: prefill tokens of a step that also decodes, so that streams keep flowing.
        max_waiting: queued requests before new ones are refused with 429.
        max_waiting_tokens: queued prompt tokens before new requests are refused with 429.
        kv_cache_memory: bytes for KV blocks.
        pa_memory: bytes of bank rows, those of running requests included.
        session_memory: bytes of idle sessions' KV kept on the device.
        session_log_memory: bytes of session logs kept in host memory.
        session_host_memory: bytes of KV, banks and histories in host memory, below the device. None: as much as
            ``session_memory`` beside a GPU, nothing where the device is the host; with working memory half of what is
            free there.
        session_dir: directory for sessions below that, and over restarts.
        session_disk_size: bytes of the files of this server's sessions in it. None: no limit.
        session_sync: write and sync a session's log before its request's final event.
        session_ttl: seconds that an unused session lives, where it has no time of its own.
        gpu_memory_utilization: share of a GPU's memory that weights, activations, KV and banks may take together.
        cuda_graphs: capture decode steps on a GPU; nothing elsewhere.
        async_scheduling: with CUDA graphs, launch a decode step before the tokens of the last one are read.
        deterministic: on a GPU products run in tiles of a fixed number of rows and attention splits by length alone, so
            that answers and banks do not depend on batch mates and budgets; on a CPU that always holds.
        attention_kernel: of prompts' chunks on a GPU, one of ``ATTENTION_KERNELS``; auto is the fastest that is right
            there, or flash where ``deterministic`` is set.
        exact_products: on a CPU steps have as many rows as products need for bits that do not depend on the company;
            without, one token is one row, and answers may depend on batch mates and chunk sizes.
        pa_layers: patched layers, counted from 0.
        ce_density: part of the experts that decoded tokens use; below 1 the model needs a layout.
    """

    max_model_len: int | None = None
    working_memory: int | None = None
    working_memory_window: int = 1024
    working_memory_index: tuple[IndexName, ...] | None = None
    working_memory_block: int = 64
    working_memory_recall: int = 512
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 16
    max_num_mixed_tokens: int = 256
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    kv_cache_memory: int | None = None
    session_memory: int | None = None
    session_log_memory: int = 256 * 2**20
    session_host_memory: int | None = None
    session_dir: str | None = None
    session_disk_size: int | None = None
    session_sync: bool = False
    session_ttl: float | None = None
    pa_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    async_scheduling: bool = True
    deterministic: bool = False
    attention_kernel: str = "auto"
    exact_products: bool = True
    pa: bool = True
    pa_layers: tuple[int, ...] | None = None
    ce_density: float = 1.0
    bank: PAConfig = PAConfig()
    check_integrity: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_num_mixed_tokens", "max_waiting"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_model_len", "max_waiting_tokens", "kv_cache_memory"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "at least 1")
        _check(self, "gpu_memory_utilization", 0.0 < self.gpu_memory_utilization <= 1.0, "above 0 and at most 1")
        _check(self, "ce_density", 1e-6 <= self.ce_density <= 1.0, "above 0 and at most 1")
        _check(self, "session_ttl", self.session_ttl is None or self.session_ttl > 0, "above 0")
        _check(
            self,
            "attention_kernel",
            self.attention_kernel in (ATTENTION_KERNELS[:2] if self.deterministic else ATTENTION_KERNELS),
            "auto or flash with deterministic" if self.deterministic else f"one of {', '.join(ATTENTION_KERNELS)}",
        )
        for name in ("session_sync", "session_disk_size"):
            _check(self, name, not getattr(self, name) or self.session_dir is not None, "used with session_dir")
        for name in ("session_memory", "session_log_memory", "session_host_memory", "pa_memory"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 0, "at least 0")

    def resolve(
        self,
        *,
        context_length: int,
        num_layers: int,
        bytes_per_token: int,
        available_memory: int,
        patchable_layers: tuple[int, ...] | None = None,
        is_host: bool = True,
    ) -> EngineConfig:
        """Fill in what the model and the machine decide.

        Args:
            context_length: the model's longest position + 1, in tokens.
            num_layers: decoder layers L.
            bytes_per_token: KV bytes of one token over all layers.
            available_memory: bytes of device memory that may be used.
            patchable_layers: layers that can have banks; None is all of them.
            is_host: the device is the host, whose memory is not for KV alone.

        Raises:
            ConfigError: a value that this model cannot serve, named in ``param``.
        """
        length = self.max_model_len or (context_length if self.working_memory is None else _MAX_HISTORY)
        if self.working_memory is not None:
            self._check_budget(context_length)
        elif length > context_length:
            raise ConfigError(
                f"max_model_len {length} is longer than the model's context of {context_length} tokens; "
                f"serve at most {context_length}, or a history of any length with working_memory",
                param="max_model_len",
            )
        layers = self.layers_of(num_layers, patchable_layers)
        kv = self.kv_cache_memory
        if kv is None:
            longest = min(length, context_length)
            kv = min(available_memory // 2, 4 * longest * bytes_per_token) if is_host else available_memory * 7 // 8
        return dataclasses.replace(
            self,
            max_model_len=length,
            max_waiting_tokens=self.max_waiting_tokens or 8 * length,
            pa_layers=tuple(sorted(set(layers))),
            kv_cache_memory=kv,
            session_memory=kv if self.session_memory is None else self.session_memory,
        )

    @property
    def longest_answer(self) -> int | None:
        """Tokens of an answer to a request that does not say; None is all that the context leaves."""
        return self.working_memory

    @property
    def budget(self) -> Budget | None:
        """Of what a token sees; None where it sees everything."""
        if self.working_memory is None:
            return None
        return Budget(self.working_memory, self.working_memory_window)

    def _check_budget(self, context_length: int) -> None:
        window, tokens = self.working_memory_window, self.working_memory or 0
        if window < BLOCK or window % BLOCK:
            raise ConfigError(
                f"working_memory_window must be a multiple of {BLOCK}, not {window}", param="working_memory_window"
            )
        block = self.working_memory_block
        if block < 1 or BLOCK % block:
            raise ConfigError(f"working_memory_block must divide {BLOCK}, not be {block}", param="working_memory_block")
        recall = self.working_memory_recall
        if recall < BLOCK or recall % BLOCK:
            raise ConfigError(
                f"working_memory_recall must be a multiple of {BLOCK}, not {recall}", param="working_memory_recall"
            )
        least = window + 3 * BLOCK
        if not least <= tokens <= context_length or tokens % BLOCK:
            raise ConfigError(
                f"working_memory must be a multiple of {BLOCK} from {least:,} (a window of {window:,} and room for "
                f"what is called back) to the model's context of {context_length:,} tokens, not {tokens:,}",
                param="working_memory",
            )

    def layers_of(self, num_layers: int, patchable: tuple[int, ...] | None) -> tuple[int, ...]:
        """The layers with banks in a model of ``num_layers``, of which ``patchable`` can have one (None: all).

        Raises:
            ConfigError: one is not there, or cannot have a bank.
        """
        able = tuple(range(num_layers)) if patchable is None else patchable
        if not self.pa:
            able = tuple(range(num_layers))
        elif not able:
            raise ConfigError(
                "every layer's FFN is routed experts alone, so no bank would see every token; serve this model with "
                "--no-pa",
                param="pa",
            )
        layers = self.pa_layers if self.pa_layers is not None else default_pa_layers(num_layers, able)
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise ConfigError(
                    f"pa_layers names layer {layer}; this model has layers 0 to {num_layers - 1}", param="pa_layers"
                )
            if layer not in able:
                raise ConfigError(
                    f"pa_layers names layer {layer}, whose FFN is routed experts alone, so no bank would see every "
                    f"token; layers that can have one: {', '.join(map(str, able))}",
                    param="pa_layers",
                )
        return layers


def default_pa_layers(num_layers: int, patchable: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The paper's layers 13 and 27 of 28 scaled to a model of L layers, counted from 0; of layers that cannot have a
    bank the nearest that can."""
    able = range(num_layers) if patchable is None else patchable
    wanted = [max(0, round(part * num_layers / 28) - 1) for part in (13, 27)]
    return tuple(sorted({min(able, key=lambda layer: (abs(layer - number), layer)) for number in wanted}))
