"""What the GPU bench stands on: a model with random weights, the device's limits, engines in a known state."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import ContinuousBatchingConfig

from load_tests.ffn_bench import released as authors_module
from pacellm.config import EngineConfig, PAConfig
from pacellm.engine import pace
from pacellm.engine.engine import Engine
from pacellm.model.attention import dispatch as attention
from pacellm.model.fused import unfuse
from pacellm.model.load import LoadedModel, prepare
from pacellm.model.patch import unpatch
from pacellm.types import Event, Failed, GenerationRequest, SamplingParams
from pacellm.view import BLOCK

_SHAPE_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 300_000,
}  # fmt: skip
_SHAPE_SMALL = {
    "vocab_size": 997, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


MODES: dict[str, dict[str, Any]] = {
    "off": {"pa": False},
    "observed": {},
    "acting": {"bank": PAConfig(preset="reference")},
}
"""Settings of an engine by what the banks do."""


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall time of one call and what it started on the device."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Rig:
    """A model and the device that it lies on.

    Attributes:
        model: random weights, made on the device.
        small: sizes for a test on a CPU.
        folder: for a session directory.
    """

    model: LoadedModel
    small: bool
    folder: Path

    @property
    def is_cuda(self) -> bool:
        """The device is a GPU."""
        return self.model.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of one call and what it started on the device."""
        return seconds(self.model.device, work)

    def ids(self, length: int, seed: int) -> list[int]:
        """Random token ids."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.model.vocab_size, (length,), generator=generator).tolist()

    @contextmanager
    def engine(self, num_tokens: int, **changes: object) -> Iterator[Engine]:
        """An engine with KV memory for ``num_tokens``; its memory is given back at the end."""
        blocks = -(-num_tokens // BLOCK) + 2 * 64
        settings: dict[str, object] = {
            "kv_cache_memory": blocks * BLOCK * self.model.bytes_per_token,
            "session_memory": 0,
            "max_num_batched_tokens": 64 if self.small else 8192,
            "max_num_mixed_tokens": 64 if self.small else 8192,
            "max_num_seqs": 64,
            "pa_memory": None,
            "bank": PAConfig(bank_size=100, segment=64 if self.small else 1024),
            **changes,
        }
        engine = Engine(self.model, EngineConfig(**settings))  # type: ignore[arg-type]
        try:
            yield engine
        finally:
            engine.parts.recovery.survive(RuntimeError("the measurement is over"))
            engine.worker.close()
            unpatch(self.model.module)
            del engine
            self.collect()

    def collect(self) -> None:
        """Give unused memory back to the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def peer(self) -> Iterator[nn.Module]:
        """The same weights under transformers' own attention."""
        unpatch(self.model.module)
        unfuse(self.model.module)
        module = self.model.module
        module.set_attn_implementation("sdpa")  # type: ignore[operator]
        try:
            yield module
        finally:
            module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
            self.collect()

    @contextmanager
    def authors(self, released: Path, layers: tuple[int, ...]) -> Iterator[nn.Module]:
        """As :meth:`peer`, with the authors' module around the FFNs of ``layers``; ``released`` is a checkout of their
        released code."""
        with self.peer() as module:
            decoders: list[Any] = list(module.model.layers)  # type: ignore[union-attr,arg-type]
            own = {layer: decoders[layer].mlp for layer in layers}
            segment = 64 if self.small else 1024
            for layer, ffn in own.items():
                decoders[layer].mlp = authors_module(released, ffn, 100, segment)
            try:
                yield module
            finally:
                for layer, ffn in own.items():
                    decoders[layer].mlp = ffn

    # -- arithmetic ------------------------------------------------------------------------------------------

    @property
    def linear_weights(self) -> int:
        """Weights that every token is multiplied with, the head left out."""
        layers = self.model.module.model.layers.named_modules()  # type: ignore[union-attr,operator]
        return sum(module.weight.numel() for _, module in layers if isinstance(module, nn.Linear))

    def prefill_flops(self, tokens: int, start: int = 0) -> float:
        """Of ``tokens`` tokens behind ``start``: linear layers, and causal attention's two products."""
        config = self.model.module.config
        width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
        pairs = tokens * (start + (tokens + 1) / 2)
        return 2.0 * self.linear_weights * tokens + 4.0 * width * pairs * config.num_hidden_layers

    def decode_bytes(self, contexts: list[int], *, banks: int = 0, slots: int = 100, shared: int = 0) -> float:
        """Read by one step: all weights with the head, each sequence's KV and ``banks`` layers of banks.

        ``shared`` tokens of all contexts are one document, which is read once."""
        config, size = self.model.module.config, self.model.dtype.itemsize
        weights = (self.linear_weights + config.vocab_size * config.hidden_size) * size
        kv = (sum(contexts) - shared * (len(contexts) - 1)) * self.model.bytes_per_token
        each = slots * (config.intermediate_size + config.hidden_size) * size
        return float(weights + kv + banks * len(contexts) * each)


def build(device: torch.device, *, small: bool, folder: Path | None = None) -> Rig:
    """Random weights at Qwen2.5-7B's shape in bfloat16, or a tiny model in float32."""
    config = Qwen2Config(**(_SHAPE_SMALL if small else _SHAPE_7B), eos_token_id=2, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            module = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Rig(prepare(module), small, folder or Path(tempfile.gettempdir()))


# -- the device's limits -------------------------------------------------------------------------------------


def limits(device: torch.device, *, small: bool, folder: Path | None = None) -> dict[str, float]:
    """Measured rates: matrix product (FLOP/s), copy on the device, from and to pinned host memory, disk (bytes/s)."""
    side = 256 if small else 8192
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    matrix = _best(device, lambda: a @ b)
    size = 2**20 if small else 4 * 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = _best(device, lambda: target.copy_(source))
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    part = source[: size // 4]
    up, down = _best(device, lambda: part.copy_(host)), _best(device, lambda: host.copy_(part))
    return {
        "matrix_flops": 2.0 * side**3 / matrix,
        "copy_bytes": 2.0 * size / copy,
        "host_to_device_bytes": size / 4 / up,
        "device_to_host_bytes": size / 4 / down,
        "disk_read_bytes": _disk_rate(folder or Path(tempfile.gettempdir()), host),
    }


def _best(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    work()
    return min(seconds(device, work) for _ in range(repeats))


def _disk_rate(folder: Path, host: torch.Tensor) -> float:
    """Bytes a second of reading back a file, after the page cache was asked to forget it."""
    path = folder / "pacellm-gpu-bench.bin"
    try:
        with path.open("wb") as file:
            host.numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(host.numpy().data):
                pass
        return host.nbytes / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


# -- work ------------------------------------------------------------------------------------------------------


def request(
    name: str, ids: list[int], new: int, session: str | None = None, pa: str = "on", temperature: float = 0.0
) -> GenerationRequest:
    """To its full length, greedy unless told otherwise."""
    sampling = SamplingParams(max_tokens=new, temperature=temperature, ignore_eos=True, seed=0)
    return sampled(name, ids, sampling, session, pa)


def sampled(
    name: str, ids: list[int], sampling: SamplingParams, session: str | None = None, pa: str = "on"
) -> GenerationRequest:
    """One request; without a session it shares nothing with others."""
    key = None if session is None else ("bench", session)
    return GenerationRequest(name, ids, sampling, session=key, tenant="bench" if session else name, pa=pa)  # type: ignore[arg-type]


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[Event]]:
    """To the end of all. Raises RuntimeError where one failed."""
    events: dict[str, list[Event]] = {}
    for item in requests:
        engine.add(item)
    while engine.has_work or engine.worker.num_open:
        for name, event in _checked(engine.step()):
            events.setdefault(name, []).append(event)
    return events


def _checked(events: list[tuple[str, Event]]) -> list[tuple[str, Event]]:
    for name, event in events:
        if isinstance(event, Failed):
            raise RuntimeError(f"request {name} failed: {event.error}")
    return events


def fill(engine: Engine, requests: list[GenerationRequest]) -> None:
    """Step until these requests, and those that run already, decode; prompts take whole steps."""
    count, share = len(engine.scheduler.running) + len(requests), pace.SHARE
    for item in requests:
        engine.add(item)
    pace.SHARE = 1e9
    try:
        while not only_decodes(engine, count):
            _checked(engine.step())
    finally:
        pace.SHARE = share


def only_decodes(engine: Engine, count: int) -> bool:
    """``count`` sequences run, and all of them decode."""
    running = engine.scheduler.running
    return len(running) == count and all(sequence.is_decoding for sequence in running)


def decode_seconds(rig: Rig, engine: Engine, steps: int, warm: int = 5) -> float:
    """Seconds of a step of an engine that only decodes, median of rounds of ten: each may run beside the next."""
    for _ in range(warm):
        _checked(engine.step())
    size = min(10, steps)
    rounds = [
        rig.seconds(lambda: [_checked(engine.step()) for _ in range(size)]) / size for _ in range(max(1, steps // size))
    ]
    return statistics.median(rounds)


def generate_seconds(rig: Rig, module: nn.Module, ids: list[int], new: int) -> float:
    """transformers' ``generate`` on one prompt."""
    prompt = torch.tensor([ids], device=rig.model.device)
    mask = torch.ones_like(prompt)
    return rig.seconds(
        lambda: module.generate(  # type: ignore[operator]
            prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
    )


def continuous_seconds(rig: Rig, module: nn.Module, prompts: list[list[int]], new: int) -> float:
    """transformers' continuous batching, everything at once."""
    blocks = sum(len(prompt) + new for prompt in prompts) // 256 + 2 * len(prompts)
    return rig.seconds(
        lambda: module.generate_batch(  # type: ignore[operator]
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=1024),
        )
    )
