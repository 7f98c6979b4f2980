"""``pacellm serve``: from flags to a server that runs."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacellm.cli import values
from pacellm.config import ATTENTION_KERNELS, INDEXES, PRESETS, EngineConfig, PAConfig
from pacellm.errors import ConfigError, PaceError

if TYPE_CHECKING:
    from pacellm.calibration.file import Calibration
    from pacellm.calibration.gate import Gate
    from pacellm.model.load import LoadedModel
    from pacellm.run.launch import Team
    from pacellm.server.auth import Keys
    from pacellm.server.service import Service
    from pacellm.server.settings import Settings
    from pacellm.server.traces import Traces

logger = logging.getLogger("pacellm")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(options: argparse.Namespace) -> int:
    """Load a model and answer HTTP until told to stop. What needs no model is looked at first."""
    from pacellm.server import logs

    logs.configure(options.log_level, options.log_format)
    try:
        return _bound(options)
    except PaceError as error:
        if options.log_format == "text":
            raise
        logger.critical("%s", error)
        return 2


def _bound(options: argparse.Namespace) -> int:
    """What needs no model is looked at before one is loaded."""
    from pacellm.server import listening

    listening.check_tls(options.ssl_certfile, options.ssl_keyfile)
    sockets = listening.bind(options.host, options.port)
    admin_sockets = [] if options.admin_port is None else listening.bind(options.host, options.admin_port)
    try:
        return _serve(options, sockets, admin_sockets)
    finally:
        listening.close([*sockets, *admin_sockets])


def _serve(options: argparse.Namespace, sockets: list[socket.socket], admin_sockets: list[socket.socket]) -> int:
    service, keys, team = build(options)

    from pacellm.server.launcher import run  # after the options and the model's files were looked at: it loads torch

    if not keys and options.host not in _LOOPBACK:
        logger.warning("listening on %s without API keys: anyone who reaches it can use it", options.host)
    elif not keys:
        logger.warning("no API keys: everyone on this machine can use this server, in one namespace of sessions")
    _look_at_what_is_new()
    run(
        service,
        keys,
        sockets=sockets,
        admin_sockets=admin_sockets,
        log_level=options.log_level,
        shutdown_timeout=options.shutdown_timeout,
        tls=(options.ssl_certfile, options.ssl_keyfile),
    )
    if team is not None:
        team.close()
    return 0


def _look_at_what_is_new() -> None:
    """Let collections look at what requests leave only. What a server begins with is never garbage, and looking at its
    400,000 objects holds every stream up, for a tenth of a second and more."""
    gc.collect()
    gc.freeze()


def build(options: argparse.Namespace) -> tuple[Service, Keys, Team | None]:
    """The service of ``serve``'s options, its engine not yet running; who may use it; a split model's processes.

    Raises:
        PaceError: options, a model or a directory that cannot work.
    """
    from pacellm.demo import MODEL_PATH
    from pacellm.gguf.check import check_gguf
    from pacellm.real_models import resolve
    from pacellm.server.auth import read_keys

    keys = read_keys(options.api_key, options.api_key_file)
    config = engine_config(options)
    path = resolve(options.model) if options.model else MODEL_PATH
    header = check_gguf(path)  # before torch is loaded below: what is wrong with a file is said at once

    from pacellm.engine.describe import describe
    from pacellm.engine.engine import Engine
    from pacellm.model.checkpoint import check_directory
    from pacellm.server.service import Service
    from pacellm.text.tokenizer import ChatTokenizer

    name = options.served_model_name or ("pacellm-demo" if options.model is None else options.model)
    settings = server_settings(options, name, keys)
    if header is None:
        check_directory(path, allow_pickle=options.allow_pickle)
    else:
        logger.info("%s is dequantised at every start; `pacellm convert` keeps the result", header.file)
    traces = _traces(options.otlp_endpoint, name)
    tokenizer = ChatTokenizer(path, options.chat_template)
    model, config, gate, team = _calibrated(path, options, config)
    engine = Engine(model, config, tokenizer.backend)
    if not tokenizer.has_chat_template:
        logger.warning("%s has no chat template: chat requests are refused; give one with --chat-template FILE", path)
    describe(engine, str(path), config.max_model_len or model.context_length)
    return Service(engine, tokenizer, settings, traces, gate), keys, team


def _calibrated(
    path: Any, options: argparse.Namespace, config: EngineConfig
) -> tuple[LoadedModel, EngineConfig, Gate, Team | None]:
    """The model with its layout, the config with its layers, and what its calibration lets it do.

    Raises:
        PaceError: the model cannot be loaded, or would do harm that nobody has accepted.
    """
    from pacellm.calibration.gate import Gate
    from pacellm.calibration.retrieval import known as known_indexes
    from pacellm.experts.apply import apply_layout
    from pacellm.experts.layout import Layout

    model, team = _load(str(path), options)
    known = _calibration(path, options, model)
    if config.working_memory is not None and known[0] is not None:
        model = dataclasses.replace(model, retrieval=known_indexes(known[0].retrieval, model))
    if options.ce_layout is not None:
        model = apply_layout(model, Layout.load(options.ce_layout))
    digest = None if model.layout is None else model.layout.digest
    gate = Gate(*known, config.bank, (), digest, options.accept_worse_answers)
    if options.pa_layers == "auto" and config.pa:
        config = dataclasses.replace(config, pa_layers=gate.harmless_layers(config.bank.preset))
    layers = config.layers_of(model.num_layers, model.patchable_layers) if config.pa else ()
    gate = dataclasses.replace(gate, layers=tuple(sorted(set(layers))))
    gate.check_start(config.bank.preset if config.pa else None, config.ce_density)
    return model, config, gate, team


def _calibration(path: Any, options: argparse.Namespace, model: LoadedModel) -> tuple[Calibration | None, str]:
    """The model's, or why there is none. Before a layout moves its weights."""
    from pacellm.calibration.gate import find
    from pacellm.model.fingerprint import model_sample

    return find(path, options.calibration, lambda: None if model.ranks is not None else model_sample(model.module))


def _traces(endpoint: str | None, model_name: str) -> Traces | None:
    if endpoint is None:
        return None
    try:
        from pacellm.server.traces import Traces, exporter
    except ModuleNotFoundError:
        raise ConfigError(
            "--otlp-endpoint needs OpenTelemetry: pip install 'pacellm[otel]'", param="otlp_endpoint"
        ) from None
    return Traces(exporter(endpoint), model_name)


def _load(path: str, options: argparse.Namespace) -> tuple[LoadedModel, Team | None]:
    from pacellm.model.load import find_device, load
    from pacellm.server import logs

    logs.adopt()
    device = find_device(options.device)
    if options.tensor_parallel_size == 1:
        scaling, pickles = options.rope_scaling, options.allow_pickle
        return load(path, dtype=options.dtype, device=device, rope_scaling=scaling, allow_pickle=pickles), None
    from pacellm.run import launch

    for name in ("rope_scaling", "allow_pickle", "ce_layout"):
        if getattr(options, name):
            raise ConfigError(f"{name} is not for a model split over processes; leave it out", param=name)
    size = options.tensor_parallel_size
    prepare = partial(logs.configure, options.log_level, options.log_format)
    team = launch.start(path, size, dtype=options.dtype, device=device, on_lost=launch.end_service, prepare=prepare)
    return team.model, team


def server_settings(options: argparse.Namespace, model_name: str, keys: Keys) -> Settings:
    """The HTTP side's settings from the flags. Without keys only names of this machine are served, so that no web page
    can reach the server under a name of its own.

    Raises:
        ConfigError: ``--metrics-tenant`` names a tenant without a key.
    """
    from pacellm.server.settings import Settings

    hosts = tuple(options.allowed_host)
    if not keys:
        hosts += tuple(dict.fromkeys((*_LOOPBACK, options.host, socket.gethostname())))
    if options.metrics_tenant is not None and not keys.names(options.metrics_tenant):
        raise ConfigError(f"no API key stands for the tenant {options.metrics_tenant!r}", param="metrics_tenant")
    return Settings(
        model_name=model_name,
        max_body_bytes=options.max_body_bytes,
        max_snapshot_bytes=options.max_snapshot_bytes,
        allow_unsigned_snapshots=options.allow_unsigned_snapshots,
        response_memory=options.response_memory,
        response_ttl=options.response_ttl,
        request_timeout=options.request_timeout,
        max_requests_per_key=options.max_requests_per_key,
        allowed_hosts=hosts,
        cors_origins=tuple(options.cors_origin),
        admin_port=options.admin_port,
        metrics_tenant=options.metrics_tenant,
        share_snapshots=options.share_snapshots,
        max_connections=options.max_connections,
        max_sessions_per_key=options.max_sessions_per_key or None,
        page=options.page,
    )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine's config from the flags.

    Raises:
        ConfigError: a value that cannot work.
    """
    return EngineConfig(
        max_model_len=options.max_model_len if options.working_memory is None else options.max_history,
        working_memory=options.working_memory,
        working_memory_window=options.working_memory_window,
        working_memory_recall=options.working_memory_recall,
        working_memory_index=options.working_memory_index,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory_bytes,
        session_memory=options.session_memory,
        session_host_memory=options.session_host_memory,
        session_dir=options.session_dir,
        session_disk_size=options.session_disk_size,
        session_sync=options.session_sync,
        session_ttl=options.session_ttl,
        gpu_memory_utilization=options.gpu_memory_utilization,
        cuda_graphs=options.cuda_graphs,
        async_scheduling=options.async_scheduling,
        deterministic=options.deterministic,
        attention_kernel=options.attention_kernel,
        exact_products=options.exact_products,
        pa_memory=options.pa_memory,
        pa=options.pa,
        pa_layers=None if options.pa_layers == "auto" else options.pa_layers,
        ce_density=options.ce_density,
        bank=PAConfig(preset=options.pa_preset, bank_size=options.pa_bank_size, segment=options.pa_segment),
    )


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm serve``."""
    defaults, bank = EngineConfig(), PAConfig()
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint directory, hub name, GGUF file, or smollm2 or gemma3-270m, which are "
        "fetched once (default: the bundled model)")  # fmt: skip
    add("--host", default="127.0.0.1")
    add("--port", type=values.port, default=8000, help="to listen on; 0 is any that is free (default: 8000)")
    add("--served-model-name", help="the name clients ask for (default: as MODEL is written, or pacellm-demo)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--chat-template", type=Path, help="file with a Jinja chat template (default: the checkpoint's)")
    add("--rope-scaling", type=values.json_object, help="lengthen the context, as "
        """'{"rope_type": "yarn", "factor": 4}'""")  # fmt: skip
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors; only from people you trust")
    add("--tensor-parallel-size", type=values.at_least_one, default=1, help="processes, one device each, that the "
        "model is split over")  # fmt: skip
    add("--max-model-len", type=values.size, help="longest context in tokens (default: the model's)")
    add("--working-memory", type=values.size, metavar="TOKENS", help="serve histories beyond the model's "
        "context: so many of their tokens are on the device and seen at once, recent ones and those that the question "
        "calls back")  # fmt: skip
    add("--working-memory-window", type=values.size, default=defaults.working_memory_window, metavar="TOKENS",
        help="of them, recent ones")  # fmt: skip
    add("--working-memory-recall", type=values.size, default=defaults.working_memory_recall, metavar="TOKENS",
        help="tokens that a question calls back")  # fmt: skip
    add("--working-memory-index", type=values.indexes, metavar="NAMES", help="what finds what is called back, with "
        f"commas between; of {', '.join(INDEXES)} (default: lexical, and of the others the better one by the model's "
        "calibration)")  # fmt: skip
    add("--max-history", type=values.size, default=1_000_000, metavar="TOKENS", help="longest history with "
        "--working-memory, prompt and answer together")  # fmt: skip
    add("--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, help="tokens of one step")
    add("--max-num-seqs", type=int, default=defaults.max_num_seqs, help="requests that run at once")
    add("--kv-cache-memory-bytes", type=values.size, help="bytes of KV memory, as 8G (default: from what is free)")
    add("--gpu-memory-utilization", type=float, default=defaults.gpu_memory_utilization, help="share of a GPU's memory "
        "for weights, steps, KV and banks together")  # fmt: skip
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="capture decode steps on a GPU")
    add("--async-scheduling", action=argparse.BooleanOptionalAction, default=True,
        help="with CUDA graphs, launch a decode step before the last one's tokens are read")  # fmt: skip
    add("--deterministic", action="store_true", help="answers independent of batch mates on a GPU too, at a cost; "
        "on a CPU they always are")  # fmt: skip
    add("--attention-kernel", default=defaults.attention_kernel, choices=ATTENTION_KERNELS, help="of prompts on a GPU "
        "(default: the fastest that is right there, found by a short measurement)")  # fmt: skip
    add("--exact-products", action=argparse.BooleanOptionalAction, default=True, help="on a CPU, pad steps so that "
        "answers do not depend on batch mates and chunk sizes")  # fmt: skip
    add("--session-memory", type=values.size, help="bytes of idle sessions' KV kept on the device (default: KV memory)")
    add("--session-host-memory", type=values.size, help="bytes of sessions in host memory, below the device "
        "(default: as --session-memory beside a GPU, else 0; with --working-memory half of what is free)")  # fmt: skip
    add("--session-dir", help="directory for sessions below that, and over restarts")
    add("--session-disk-size", type=values.size, help="bytes of their files there (default: no limit)")
    add("--session-sync", action="store_true", help="sync a session's log to disk before its request's last event")
    add("--session-ttl", type=float, help="seconds that an unused session lives (default: no limit)")
    add("--max-snapshot-bytes", type=values.size, default=2**30, help="largest session snapshot made or taken")
    add("--allow-unsigned-snapshots", action="store_true", help="take session snapshots that others made: their "
        "banks and logs are then whatever the client says")  # fmt: skip
    add("--share-snapshots", action="store_true", help="take session snapshots of other tenants' sessions")
    add(
        "--pa",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Persistent Activity: memory banks of sessions",
    )
    add("--pa-memory", type=values.size, help="bytes of banks, those of running requests included (default: for 256 "
        "sessions at most)")  # fmt: skip
    add("--pa-layers", type=values.layers_or_auto, help="patched layers from 0, as 1,3, or auto: harmless ones by the "
        "calibration (default: the paper's, scaled)")  # fmt: skip
    add("--pa-preset", default=bank.preset, choices=PRESETS, help="observe: banks are fed and counted, answers are the "
        "plain model's; reference (the authors' code) and paper (Algorithm 1) change answers; requests may choose "
        "another (default: observe)")  # fmt: skip
    add("--pa-bank-size", type=int, default=bank.bank_size, help="slots of a bank")
    add("--pa-segment", type=int, default=bank.segment, help="prompt tokens that read the bank as one")
    add("--ce-layout", type=Path, help="the model's Cortical Experts, from `pacellm cluster`")
    add("--ce-density", type=float, default=defaults.ce_density, help="part of the experts that decoded tokens use, "
        "chosen per session from its prompts (default: 1, all)")  # fmt: skip
    add("--calibration", type=Path, help="the model's, from `pacellm calibrate` (default: pacellm-calibration.json "
        "beside it)")  # fmt: skip
    add("--accept-worse-answers", action="store_true", help="serve presets and densities that make this model "
        "worse, or of which nobody has measured what they do")  # fmt: skip
    add("--max-body-bytes", type=values.size, default=64 * 2**20, help="larger request bodies are refused")
    add("--response-memory", type=values.size, default=256 * 2**20, help="bytes of stored responses and conversations")
    add("--response-ttl", type=values.seconds, default=30 * 86400.0, help="seconds that a stored response lives")
    add(
        "--request-timeout",
        type=values.seconds,
        help="seconds from arrival to the end of an answer (default: no deadline)",
    )
    add("--api-key", action="append", default=[], help="a key that lets callers in; repeatable, each its own tenant")
    add("--api-key-file", type=Path, help="lines of 'tenant: key'; a tenant is a namespace of sessions")
    add("--max-requests-per-key", type=int, help="requests that one tenant may have queued or running")
    add("--max-sessions-per-key", type=int, default=100_000, help="sessions that one tenant may have (0: no limit)")
    add("--max-connections", type=values.at_least_one, default=1024, help="connections that may be open at once")
    add("--allowed-host", action="append", default=[], help="name to serve beside IP addresses (without keys also "
        "beside this machine's), *.domain, or * for all; repeatable")  # fmt: skip
    add("--cors-origin", action="append", default=[], help="origin whose pages may use the server; repeatable")
    add("--metrics-tenant", metavar="TENANT", help="the tenant whose keys alone may read /metrics (default: all)")
    add("--admin-port", type=values.port, help="serve /metrics on this port and not on the main one")
    add("--page", action=argparse.BooleanOptionalAction, default=True, help="serve a page at / and the API's at /docs")
    add("--otlp-endpoint", metavar="URL", help="send a trace of every request to this OTLP collector, as "
        "http://127.0.0.1:4318; needs the extra otel")  # fmt: skip
    add("--ssl-certfile", type=Path, help="TLS certificate chain, PEM")
    add("--ssl-keyfile", type=Path, help="its private key, PEM")
    add("--log-format", default="text", choices=("text", "json"))
    add("--shutdown-timeout", type=int, default=60, help="seconds that running requests get to end")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.set_defaults(run=serve)
