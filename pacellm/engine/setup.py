"""What an engine is made of, as far as config, model and machine decide it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pacellm.config import EngineConfig
from pacellm.errors import ConfigError
from pacellm.memory.pool import BankPool, bytes_per_row
from pacellm.memory.snapshot import fingerprint
from pacellm.model.experts import attach, why_no_sets
from pacellm.model.load import LoadedModel
from pacellm.model.patch import patch

_MAX_SESSION_ROWS = 256


def new_pool(model: LoadedModel, config: EngineConfig) -> BankPool:
    """Patch the model and make room for its banks.

    Raises:
        ConfigError: pa_memory is too small. ModelError: the model cannot be patched.
    """
    shapes = patch(model.module, (config.pa_layers or ()) if config.pa else ())
    experts: tuple[int, int] | None = None
    if model.layout is not None and why_no_sets(model.module) is None:
        attach(model.module, model.layout)
        experts = len(model.layout.layers), model.layout.num_experts
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
    return BankPool(
        config.bank,
        shapes,
        num_rows=config.max_num_seqs + session_rows,
        num_stages=config.max_num_seqs,
        dtype=model.dtype,
        device=model.device,
        experts=experts,
    )


def fingerprint_of(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> str:
    """What sessions are only good with: weights, banks' config, tokenizer. The weights are hashed."""
    text = tokenizer.to_str() if tokenizer is not None else ""
    facts = {
        "pa": dataclasses.asdict(config.bank) if config.pa else None,
        "pa_layers": config.pa_layers if config.pa else None,
        "layout": model.layout.digest if model.layout is not None else None,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "kv_shapes": model.kv_shapes,
        "rope": getattr(model.module.config, "rope_parameters", None),
        "dtype": str(model.dtype),
    }
    weights = ((name.replace(".original.", "."), w) for name, w in model.module.named_parameters())
    return fingerprint(weights, facts)


def host_memory(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes of host memory for sessions: on a CPU none beside the device's own."""
    if config.session_host_memory is not None:
        return config.session_host_memory
    return 0 if model.device.type == "cpu" else config.session_memory or 0


def available_memory(device: torch.device) -> int:
    """Bytes that may be used: 90 % of what is free on a GPU, half of what is available on a host."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return available * 1024 // 2
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
