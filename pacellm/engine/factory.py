"""What an engine is made of, as far as config, model and machine decide it."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig, Preset
from pacellm.errors import ConfigError
from pacellm.experts.forward import attach, why_no_kernel, why_no_sets
from pacellm.kv.blocks import BLOCK
from pacellm.memory.pool import BankPool, bytes_per_row
from pacellm.model.attention import choice as kernel_choice
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.fixed_rows import fix_rows
from pacellm.model.linear import Products, choose
from pacellm.model.load import LoadedModel, probe_step
from pacellm.model.loops import make_even
from pacellm.model.patch import patch
from pacellm.rows import ROWS
from pacellm.run import parallel
from pacellm.run.runner import Runner
from pacellm.sessions.format import fingerprint

logger = logging.getLogger("pacellm.engine")
_MAX_SESSION_ROWS = 256
_MIN_BLOCKS = 2  # one for the prompt and one to go on


def memory_left(free: int, total: int, step: int, utilization: float) -> int:
    """Bytes for KV and banks.

    Args:
        free, total: of the device. step: bytes that the largest step takes beside them.
        utilization: share of ``total`` that may be in use.

    Raises:
        ConfigError: nothing is left.
    """
    left = int(utilization * total) - (total - free) - step
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization {utilization:g} of {total:,} bytes leaves nothing for KV: {total - free:,} are in "
            f"use and a step takes {step:,}; raise it, lower max_num_batched_tokens, or free the GPU",
            param="gpu_memory_utilization",
        )
    return left


def measured_step(model: LoadedModel, tokens: int) -> int:
    """Bytes that a forward pass of ``tokens`` tokens takes at its highest, as the device's allocator saw it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    probe_step(model, tokens)
    peak = torch.cuda.max_memory_allocated(model.device) - before
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def new_pool(model: LoadedModel, config: EngineConfig) -> BankPool:
    """Patch the model and make room for its banks.

    Raises:
        ConfigError: pa_memory is too small. ModelError: the model cannot be patched.
    """
    layers = (config.pa_layers or ()) if config.pa else ()
    if model.ranks is not None:
        parallel.tell(model.ranks, parallel.Patch(layers))
    shapes = patch(model.module, layers, model.ranks)
    heat: Tensor | None = None
    if model.layout is not None and why_no_sets(model.module) is None:
        attach(model.module, model.layout)
        if (problem := why_no_kernel(model.module, model.layout)) is not None:
            logger.warning("decoded tokens use all experts here: %s", problem)
        heat = torch.stack([model.layout.layers[layer].heat for layer in range(len(model.layout.layers))])
    experts = None if heat is None else (len(heat), heat.shape[1])
    each = max(1, bytes_per_row(config.bank, shapes, model.dtype, experts))
    if config.pa_memory is None:
        session_rows = min(_MAX_SESSION_ROWS, max(1, (config.session_memory or 0) // 8 // each))
    else:
        session_rows = config.pa_memory // each - config.max_num_seqs
    if session_rows < 1:
        raise ConfigError(
            f"pa_memory of {config.pa_memory:,} bytes holds no session beside {config.max_num_seqs} "
            f"running requests (max_num_seqs); {each:,} bytes each, so at least "
            f"{each * (config.max_num_seqs + 1):,}",
            param="pa_memory",
        )
    num_rows = config.max_num_seqs + session_rows
    if model.ranks is not None:
        return parallel.new_pool(model, shapes, _begin(config, num_rows), leads=True)
    return BankPool(
        config.bank,
        shapes,
        num_rows=num_rows,
        num_stages=config.max_num_seqs,
        dtype=model.dtype,
        device=model.device,
        heat=heat,
    )


def _begin(
    config: EngineConfig, num_rows: int, num_blocks: int = 0, kernel: PrefillKernel | None = None
) -> parallel.Begin:
    name = None if kernel is None else kernel.name
    return parallel.Begin(config.bank, num_rows, config.max_num_seqs, num_blocks, config.deterministic, name)


def check_parallel(config: EngineConfig) -> None:
    """Refuse what a tensor-parallel engine has not got: each rank holds only its part of a session's state.

    Raises:
        ConfigError: names the setting.
    """
    for name in ("session_dir", "session_host_memory"):
        if getattr(config, name):
            raise ConfigError(f"{name} is not there with tensor_parallel_size; leave it out", param=name)


def resolve(model: LoadedModel, config: EngineConfig) -> EngineConfig:
    """The config with everything filled in, fitting the model and the machine.

    Raises:
        ConfigError: names the setting.
    """
    config = config.resolve(
        context_length=model.context_length,
        num_layers=model.num_layers,
        bytes_per_token=model.bytes_per_token,
        available_memory=available_memory(model, config),
        patchable_layers=model.patchable_layers,
        is_host=model.device.type == "cpu",
    )
    memory, block_bytes = config.kv_cache_memory or 0, BLOCK * model.bytes_per_token
    if memory < _MIN_BLOCKS * block_bytes:
        raise ConfigError(
            f"kv_cache_memory of {memory:,} bytes holds no request; this model needs at least "
            f"{_MIN_BLOCKS * block_bytes:,}",
            param="kv_cache_memory",
        )
    # a context that KV memory cannot hold would fail in the middle of an answer
    config = dataclasses.replace(config, max_model_len=min(config.max_model_len or 0, memory // block_bytes * BLOCK))
    _check_disk_size(config)
    return config


def _check_disk_size(config: EngineConfig) -> None:
    """Refuse a session directory that holds no session.

    Raises:
        ConfigError: session_disk_size is less than the ids of one context, 4 bytes each.
    """
    least = 4 * (config.max_model_len or 0)
    if config.session_disk_size is not None and config.session_disk_size < least:
        raise ConfigError(
            f"session_disk_size of {config.session_disk_size:,} bytes holds no session's log; at least {least:,}",
            param="session_disk_size",
        )


def attention_kernel(model: LoadedModel, config: EngineConfig) -> PrefillKernel | None:
    """What attends prompts' chunks on a GPU; None on a CPU, which has one way.

    Raises:
        ConfigError: the one that is asked for cannot be used, or none can.
    """
    if model.device.type != "cuda":
        if config.attention_kernel != "auto":
            raise ConfigError(
                f"attention_kernel {config.attention_kernel} is for a GPU, and this model is on a {model.device.type}; "
                "leave it at auto",
                param="attention_kernel",
            )
        return None
    wanted = "flash" if config.deterministic else config.attention_kernel
    shapes = list(zip(model.query_heads, model.kv_shapes, strict=True))
    trial = kernel_choice.choose(wanted, shapes, model.dtype, model.device)
    torch.cuda.empty_cache()
    for name, problem in trial.refused.items():
        logger.info("prompt attention not by %s: %s", name, problem)
    times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in trial.seconds.items())
    logger.info(
        "prompt attention by %s%s",
        trial.kernel.name,
        f"; ms for {kernel_choice.QUERIES:,} tokens behind {kernel_choice.BEHIND:,}: {times}" if times else "",
    )
    return trial.kernel


def products(model: LoadedModel, config: EngineConfig) -> Products:
    """How linear layers are computed on a CPU; packed weights take at most half of what KV and banks would get.

    Raises:
        ConfigError: bits are to be given up where none are promised.
    """
    if model.device.type != "cpu" or model.ranks is not None:
        if not config.exact_products:
            why = (
                "is about a CPU; on a GPU leave deterministic off instead"
                if model.device.type != "cpu"
                else "is about one process; leave it as it is with tensor_parallel_size"
            )
            raise ConfigError(f"exact_products {why}", param="exact_products")
        return Products(is_exact=config.deterministic)
    make_even(model.module)
    found = choose(model.module, available_memory(model, config) // 2)
    return found if config.exact_products else dataclasses.replace(found, rows=1, is_exact=False)


def new_runner(
    model: LoadedModel,
    pool: BankPool | None,
    num_blocks: int,
    config: EngineConfig,
    kernel: PrefillKernel | None,
    rows: int = ROWS,
) -> Runner:
    """The engine's runner; with a tensor-parallel model the other ranks get theirs."""
    kind: type[Runner] = Runner
    if model.ranks is not None:
        if pool is None:
            parallel.tell(model.ranks, parallel.Patch(None))
        parallel.tell(model.ranks, _begin(config, pool.num_rows if pool is not None else 0, num_blocks, kernel))
        kind = parallel.LeadingRunner
    runner = kind(model, pool, num_blocks, config.bank, deterministic=config.deterministic, kernel=kernel, rows=rows)
    start_decoder(runner, config)
    return runner


def start_decoder(runner: Runner, config: EngineConfig) -> None:
    """On a GPU, run steps that only decode as CUDA graphs; products in fixed tiles where that is asked for."""
    model = runner.model
    if model.device.type != "cuda" or model.ranks is not None:
        return
    if config.deterministic:
        fix_rows(model.module)
    problem = attention_cuda.no_decode_kernel(model.kv_shapes, model.dtype, model.device)
    if problem is not None:
        logger.warning("decode attention by FlashAttention, without CUDA graphs: %s", problem)
    elif config.cuda_graphs:
        tokens = config.max_model_len or 0
        runner.use_static_decode(max_seqs=config.max_num_seqs, max_tokens=tokens, capture=True)
        logger.info("decode steps as CUDA graphs")


def fingerprint_of(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> str:
    """What sessions are only good with: weights, banks' config, tokenizer. The weights are hashed.

    How a turn mixed its banks is recorded in the log, so the preset is not part of it.
    """
    bank = dataclasses.asdict(config.bank)
    del bank["preset"]
    return fingerprint(_named_weights(model), _facts(model, config, tokenizer, bank))


def former_fingerprints(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> dict[str, Preset]:
    """The same as it was when the preset was part of it, for both presets that there were."""
    presets: tuple[Preset, ...] = ("reference", "paper") if config.pa else ()
    found: dict[str, Preset] = {}
    for preset in presets:
        bank = config.bank.of(preset)
        told = dataclasses.asdict(bank) | {"theta_high": bank.high, "theta_low": bank.low, "alpha": bank.mix}
        found[fingerprint(_named_weights(model), _facts(model, config, tokenizer, told))] = preset
    return found


def _facts(
    model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None, bank: dict[str, Any]
) -> dict[str, Any]:
    text = tokenizer.to_str() if tokenizer is not None else ""
    return {
        "pa": bank if config.pa else None,
        "pa_layers": config.pa_layers if config.pa else None,
        "layout": model.layout.digest if model.layout is not None else None,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "kv_shapes": model.kv_shapes,
        "rope": getattr(model.module.config, "rope_parameters", None),
        "dtype": str(model.dtype),
    }


def _named_weights(model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    return ((name.replace(".original.", "."), weight) for name, weight in model.module.named_parameters())


def host_memory(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes of host memory for sessions: on a CPU none beside the device's own."""
    if config.session_host_memory is not None:
        return config.session_host_memory
    return 0 if model.device.type == "cpu" or model.ranks is not None else config.session_memory or 0


def available_memory(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes for KV and banks: on a GPU what ``gpu_memory_utilization`` leaves beside what is in use and what the
    largest step takes, on a host half of what is available.

    Raises:
        ConfigError: a GPU has nothing left.
    """
    if model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(model.device)
        step = measured_step(model, config.max_num_batched_tokens)
        left = memory_left(free, total, step, config.gpu_memory_utilization)
        logger.info(
            "GPU memory: %.1f of %.1f GiB in use, %.2f GiB for the largest step, %.1f GiB for KV and banks",
            *(number / 2**30 for number in (total - free, total, step, left)),
        )
        return left
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return available * 1024 // 2
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
