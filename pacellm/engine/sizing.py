"""How large things are: the config with everything filled in that model and machine decide."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from pathlib import Path

import torch

from pacellm.config import INDEXES, EngineConfig, IndexName
from pacellm.errors import ConfigError
from pacellm.model.load import LoadedModel, probe_step
from pacellm.model.retrieval import Retrieval
from pacellm.view import BLOCK

logger = logging.getLogger("pacellm.engine")
_MIN_BLOCKS = 2  # one for the prompt and one to go on


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
    config = dataclasses.replace(config, working_memory_index=_indexes(model, config))
    memory, block_bytes = config.kv_cache_memory or 0, BLOCK * model.bytes_per_token
    if memory > total_memory(model):
        raise ConfigError(
            f"kv_cache_memory of {memory:,} bytes is more than the {total_memory(model):,} that {model.device} has; "
            "leave it out to take what is free",
            param="kv_cache_memory",
        )
    if memory < _MIN_BLOCKS * block_bytes:
        raise ConfigError(
            f"kv_cache_memory of {memory:,} bytes holds no request; this model needs at least "
            f"{_MIN_BLOCKS * block_bytes:,}",
            param="kv_cache_memory",
        )
    # a context that KV memory cannot hold would fail in the middle of an answer
    fitting = memory // block_bytes * BLOCK
    if config.working_memory is None:
        config = dataclasses.replace(config, max_model_len=min(config.max_model_len or 0, fitting))
    elif 2 * config.working_memory > fitting:
        raise ConfigError(
            f"kv_cache_memory of {memory:,} bytes holds {fitting:,} tokens; working_memory {config.working_memory:,} "
            f"needs twice that, so at least {2 * config.working_memory * model.bytes_per_token:,} bytes",
            param="kv_cache_memory",
        )
    _check_disk_size(config)
    return config


def _indexes(model: LoadedModel, config: EngineConfig) -> tuple[IndexName, ...]:
    """What votes: what was asked for, or the best that is known of the model.

    Raises:
        ConfigError: it needs what nobody has found out of the model.
    """
    known = model.retrieval or Retrieval()
    can = {"lexical": True, "activity": known.book is not None, "attention": bool(known.layers)}
    for name in config.working_memory_index or ():
        if not can.get(name):
            raise ConfigError(
                f"working_memory_index names {name}, which this model's calibration does not have, or found not to "
                "work; run `pacellm calibrate MODEL`, or use lexical",
                param="working_memory_index",
            )
    if config.working_memory is not None and any(can[name] for name in INDEXES[1:]) and not known.nulls.lengths:
        logger.warning("this calibration has no null questions, and without them attention and activity find less; "
                       "make it again with `pacellm calibrate MODEL`")  # fmt: skip
    if config.working_memory_index:
        return config.working_memory_index
    best: IndexName = known.best or ("attention" if known.layers else "activity")
    if can[best]:
        return "lexical", best
    if config.working_memory is not None:
        why = "nobody has calibrated this model's indexes (pacellm calibrate)"
        if model.retrieval is not None:
            why = "by its calibration neither attention nor activity finds what this model is asked about"
        logger.warning("what is called back is found by words alone: %s", why)
    return ("lexical",)


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


def check_parallel(config: EngineConfig) -> None:
    """Refuse what a tensor-parallel engine has not got: each rank holds only its part of a session's state.

    Raises:
        ConfigError: names the setting.
    """
    for name in ("session_dir", "session_host_memory", "working_memory"):
        if getattr(config, name):
            raise ConfigError(f"{name} is not there with tensor_parallel_size; leave it out", param=name)


def host_memory(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes of host memory for sessions: on a CPU none beside the device's own, or with working memory half of what is
    available."""
    if config.session_host_memory is not None:
        return config.session_host_memory
    if config.working_memory is not None and model.device.type == "cpu":
        return available_memory(model, config)
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


def total_memory(model: LoadedModel) -> int:
    """Bytes of memory of the device, free or not."""
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
