"""What a server says when it starts: what is served, and where the memory goes."""

from __future__ import annotations

import logging

from pacellm.config import EngineConfig
from pacellm.engine.engine import Engine
from pacellm.sessions.files import SessionFiles
from pacellm.view import BLOCK

logger = logging.getLogger("pacellm")


def describe(engine: Engine, path: str, wanted_context: int) -> None:
    """Log the model, the context, memory by use, tiers, experts and banks."""
    config, model = engine.config, engine.model
    logger.info("model %s: %d layers, %s on %s", path, model.num_layers, model.dtype, model.device)
    logger.info(
        "context %s tokens; KV memory %.2f GiB for %s tokens, %d bytes each",
        f"{config.max_model_len:,}",
        engine.num_blocks * engine.block_bytes / 2**30,
        f"{engine.num_blocks * BLOCK:,}",
        model.bytes_per_token,
    )
    if (config.max_model_len or 0) < wanted_context:
        logger.warning(
            "KV memory holds %s of the wanted %s tokens of context; raise --kv-cache-memory-bytes",
            f"{config.max_model_len:,}",
            f"{wanted_context:,}",
        )
    _describe_memory(engine)
    _describe_products(engine)
    _describe_tiers(engine)
    if model.layout is not None:
        logger.info(
            "Cortical Experts: %d a layer (%s on %s), decoded tokens use %g of them",
            model.layout.num_experts,
            model.layout.method,
            model.layout.features,
            config.ce_density,
        )
    if not config.pa:
        logger.info("Persistent Activity is off")
        return
    assert engine.pool is not None
    logger.info(
        "Persistent Activity %s: preset %s in layers %s, %d slots, segments of %d; %s bytes of banks a session, %.1f "
        "MiB for %d sessions beside %d running requests",
        "changes answers" if config.bank.acts else "is observed, answers are the plain model's",
        config.bank.preset,
        ",".join(map(str, config.pa_layers or ())),
        config.bank.bank_size,
        config.bank.segment,
        f"{engine.pool.bytes_per_row:,}",
        engine.pool.bytes_per_row * engine.pool.num_rows / 2**20,
        engine.pool.num_rows - config.max_num_seqs,
        config.max_num_seqs,
    )


def _describe_memory(engine: Engine) -> None:
    views, config = engine.parts.scheduling.cache.views, engine.config
    if views is None:
        return
    host, capacity = engine.mover.host.capacity, engine.mover.histories.capacity
    logger.info(
        "working memory: views of %s tokens, %s of them recent, %s called back by %s; %s bytes a token of history, "
        "%.1f GiB of host memory and %.1f GiB on disk for %s tokens of all sessions",
        f"{config.working_memory:,}",
        f"{config.working_memory_window:,}",
        f"{config.working_memory_recall:,}",
        " and ".join(config.working_memory_index or ()),
        f"{views.token_bytes:,}",
        host / 2**30,
        (capacity - host) / 2**30,
        f"{capacity // views.token_bytes:,}",
    )


def _describe_products(engine: Engine) -> None:
    if engine.model.device.type != "cpu":
        return
    products = engine.products
    logger.info(
        "linear layers by %s, steps in multiples of %d rows; %.2f GiB of packed weights",
        products.kernel,
        products.rows,
        products.packed / 2**30,
    )
    if not engine.config.exact_products:
        logger.warning("exact products are off: answers may depend on batch mates and chunk sizes")
    elif products.inexact:
        logger.warning(
            "on this machine the last bits of products of sizes %s depend on batch mates and chunk sizes, so answers "
            "may; OMP_NUM_THREADS=1 usually cures it",
            ", ".join(f"{size[0]} x {size[1]}" for size in products.inexact),
        )


def _describe_tiers(engine: Engine) -> None:
    config, files = engine.config, engine.mover.files
    logger.info(
        "idle sessions: %.2f GiB of KV on the device, %.2f GiB in host memory, %s",
        (config.session_memory or 0) / 2**30,
        engine.mover.host.capacity / 2**30,
        _describe_directory(config, files) if files is not None else "no directory: a restart forgets them",
    )


def _describe_directory(config: EngineConfig, files: SessionFiles) -> str:
    most = files.budget.limit
    limit = "" if most is None else f" of {most / 2**30:.2f}"
    synced = ", synced" if config.session_sync else ""
    held = f"{files.num_sessions} there in {files.usage.bytes / 2**30:.2f}{limit} GiB"
    return f"then {config.session_dir}, {held}{synced}"
