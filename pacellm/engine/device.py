"""What an engine has on its device: kernels, banks and the runner, as config, model and machine decide."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from pacellm.config import EngineConfig
from pacellm.engine.sizing import available_memory
from pacellm.errors import ConfigError
from pacellm.experts.forward import attach, why_no_kernel, why_no_sets
from pacellm.memory.pool import BankPool, bytes_per_row
from pacellm.model.attention import choice as kernel_choice
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.fixed_rows import fix_rows
from pacellm.model.linear import Products, choose
from pacellm.model.load import LoadedModel
from pacellm.model.loops import make_even
from pacellm.model.patch import patch
from pacellm.model.retrieval import Coder
from pacellm.model.retrieval import detach as detach_codes
from pacellm.rows import ROWS
from pacellm.run import parallel
from pacellm.run.runner import Runner

logger = logging.getLogger("pacellm.engine")
_MAX_SESSION_ROWS = 256


def new_pool(model: LoadedModel, config: EngineConfig) -> BankPool:
    """Patch the model and make room for its banks.

    Raises:
        ConfigError: pa_memory is too small. ModelError: the model cannot be patched.
    """
    layers = (config.pa_layers or ()) if config.pa else ()
    if model.ranks is not None:
        parallel.tell(model.ranks, parallel.Patch(layers))
    shapes = patch(model.module, layers, model.ranks)
    heat = _attach_experts(model)
    experts = None if heat is None else (len(heat), heat.shape[1])
    num_rows = config.max_num_seqs + _session_rows(config, bytes_per_row(config.bank, shapes, model.dtype, experts))
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


def _attach_experts(model: LoadedModel) -> Tensor | None:
    """Let decoded tokens use working sets, where there is a layout and the model has gated FFNs; [L, E] of which
    experts are active of themselves."""
    if model.layout is None or why_no_sets(model.module) is not None:
        return None
    attach(model.module, model.layout)
    if (problem := why_no_kernel(model.module, model.layout)) is not None:
        logger.warning("decoded tokens use all experts here: %s", problem)
    return torch.stack([model.layout.layers[layer].heat for layer in range(len(model.layout.layers))])


def _session_rows(config: EngineConfig, row_bytes: int) -> int:
    """Rows of banks for sessions, beside those of running requests.

    Raises:
        ConfigError: pa_memory holds none.
    """
    each = max(1, row_bytes)
    if config.pa_memory is None:
        return min(_MAX_SESSION_ROWS, max(1, (config.session_memory or 0) // 8 // each))
    rows = config.pa_memory // each - config.max_num_seqs
    if rows < 1:
        raise ConfigError(
            f"pa_memory of {config.pa_memory:,} bytes holds no session beside {config.max_num_seqs} "
            f"running requests (max_num_seqs); {each:,} bytes each, so at least "
            f"{each * (config.max_num_seqs + 1):,}",
            param="pa_memory",
        )
    return rows


def _begin(
    config: EngineConfig, num_rows: int, num_blocks: int = 0, kernel: PrefillKernel | None = None
) -> parallel.Begin:
    name = None if kernel is None else kernel.name
    return parallel.Begin(config.bank, num_rows, config.max_num_seqs, num_blocks, config.deterministic, name)


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


def linear_products(model: LoadedModel, config: EngineConfig) -> Products:
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
    detach_codes(model.module)
    uses_codes = config.budget is not None and "activity" in (config.working_memory_index or ())
    coder = coder_of(model) if uses_codes else None
    runner = kind(
        model, pool, num_blocks, config.bank, deterministic=config.deterministic, kernel=kernel, rows=rows,
        coder=coder,
    )  # fmt: skip
    start_decoder(runner, config)
    return runner


def coder_of(model: LoadedModel) -> Coder | None:
    """What makes codes of a model's activity, wherever a layout has put its neurons."""
    book = model.retrieval.book if model.retrieval is not None else None
    if book is None:
        return None
    return Coder(book, model.device, None if model.layout is None else model.layout.layers[book.layer].permutation)


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
        tokens = config.working_memory or config.max_model_len or 0
        runner.use_static_decode(max_seqs=config.max_num_seqs, max_tokens=tokens, capture=True)
        logger.info("decode steps as CUDA graphs")
