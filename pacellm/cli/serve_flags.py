"""The flags of ``pacellm serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacellm.cli import values
from pacellm.cli.parser import CommandParser
from pacellm.cli.serve import serve
from pacellm.config import ATTENTION_KERNELS, INDEXES, PRESETS, EngineConfig, PAConfig

_SOURCES = """Each flag can also be a variable, PACELLM_MAX_MODEL_LEN for --max-model-len, or a key of the file of
--config, max-model-len. The flag goes before the variable, and that before the file."""
_Add = Callable[..., Any]


def add_serve(parser: CommandParser) -> None:
    """The flags of ``pacellm serve``."""
    parser.usage = "pacellm serve [MODEL] [FLAG ...]"
    parser.epilog, parser.has_sources = _SOURCES, True
    for title, add_flags in (
        ("model", _add_model),
        ("working memory: histories beyond the model's context", _add_working_memory),
        ("steps and memory", _add_steps),
        ("sessions", _add_sessions),
        ("Persistent Activity and experts", _add_banks),
        ("requests", _add_requests),
        ("network and keys", _add_network),
        ("logs and metrics", _add_logs),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    parser.set_defaults(run=serve)


def _add_model(add: _Add) -> None:
    add("model", nargs="?", metavar="MODEL", help="checkpoint directory, hub name, GGUF file, or smollm2 or "
        "gemma3-270m, which are fetched once (default: the bundled model)")  # fmt: skip
    add("--config", type=Path, metavar="FILE", help="YAML with these flags' names, as 'port: 8000'")
    add("--served-model-name", help="the name clients ask for (default: as MODEL is written, or pacellm-demo)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights, KV and banks")
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--chat-template", type=Path, help="file with a Jinja chat template (default: the checkpoint's)")
    add("--max-model-len", type=values.size, help="longest context in tokens (default: the model's)")
    add("--rope-scaling", type=values.json_object, help="lengthen the context, as "
        """'{"rope_type": "yarn", "factor": 4}'""")  # fmt: skip
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors; only from people you trust")
    add("--tensor-parallel-size", type=values.at_least_one, default=1, help="processes, one device each, that the "
        "model is split over")  # fmt: skip


def _add_working_memory(add: _Add) -> None:
    defaults = EngineConfig()
    add("--working-memory", type=values.size, metavar="TOKENS", help="tokens of a history that are on the device and "
        "seen at once: recent ones and those that the question calls back")  # fmt: skip
    add("--working-memory-window", type=values.size, default=defaults.working_memory_window, metavar="TOKENS",
        help="of them, recent ones")  # fmt: skip
    add("--working-memory-recall", type=values.size, default=defaults.working_memory_recall, metavar="TOKENS",
        help="tokens that a question calls back")  # fmt: skip
    add("--working-memory-index", type=values.indexes, metavar="NAMES", help="what finds what is called back, with "
        f"commas between; of {', '.join(INDEXES)} (default: lexical, and of the others the better one by the model's "
        "calibration)")  # fmt: skip
    add("--max-history", type=values.size, default=1_000_000, metavar="TOKENS", help="longest history with "
        "--working-memory, prompt and answer together")  # fmt: skip


def _add_steps(add: _Add) -> None:
    defaults = EngineConfig()
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


def _add_sessions(add: _Add) -> None:
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


def _add_banks(add: _Add) -> None:
    defaults, bank = EngineConfig(), PAConfig()
    add("--pa", action=argparse.BooleanOptionalAction, default=True, help="memory banks of sessions")
    add("--pa-memory", type=values.size, help="bytes of banks, those of running requests included (default: for 256 "
        "sessions at most)")  # fmt: skip
    add("--pa-layers", type=values.layers_or_auto, help="patched layers from 0, as 1,3, or auto: harmless ones by the "
        "calibration (default: the paper's, scaled)")  # fmt: skip
    add("--pa-preset", default=bank.preset, choices=PRESETS, help="observe: banks are fed and counted, answers are the "
        "plain model's; reference (the authors' code) and paper (Algorithm 1) change answers; requests may choose "
        "another")  # fmt: skip
    add("--pa-bank-size", type=int, default=bank.bank_size, help="slots of a bank")
    add("--pa-segment", type=int, default=bank.segment, help="prompt tokens that read the bank as one")
    add("--ce-layout", type=Path, help="the model's Cortical Experts, from `pacellm cluster`")
    add("--ce-density", type=float, default=defaults.ce_density, help="part of the experts that decoded tokens use, "
        "chosen per session from its prompts")  # fmt: skip
    add("--calibration", type=Path, help="the model's, from `pacellm calibrate` (default: pacellm-calibration.json "
        "beside it)")  # fmt: skip
    add("--accept-worse-answers", action="store_true", help="serve presets and densities that make this model "
        "worse, or of which nobody has measured what they do")  # fmt: skip


def _add_requests(add: _Add) -> None:
    add("--max-body-bytes", type=values.size, default=64 * 2**20, help="larger request bodies are refused")
    add("--response-memory", type=values.size, default=256 * 2**20, help="bytes of stored responses and conversations")
    add("--response-ttl", type=values.seconds, default=30 * 86400.0, help="seconds that a stored response lives")
    add("--request-timeout", type=values.seconds, help="seconds from arrival to the end of an answer (default: no "
        "deadline)")  # fmt: skip
    add("--max-requests-per-key", type=int, help="requests that one tenant may have queued or running (default: no "
        "limit)")  # fmt: skip
    add("--max-sessions-per-key", type=int, default=100_000, help="sessions that one tenant may have; 0: no limit")
    add("--shutdown-timeout", type=int, default=60, help="seconds that running requests get to end")


def _add_network(add: _Add) -> None:
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    add("--port", type=values.port, default=8000, help="to listen on")
    add("--api-key", action="append", default=[], help="a key that lets callers in; repeatable, each its own tenant")
    add("--api-key-file", type=Path, help="lines of 'tenant: key'; a tenant is a namespace of sessions")
    add("--max-connections", type=values.at_least_one, default=1024, help="connections that may be open at once")
    add("--allowed-host", action="append", default=[], help="name to serve beside IP addresses (without keys also "
        "beside this machine's), *.domain, or * for all; repeatable")  # fmt: skip
    add("--cors-origin", action="append", default=[], help="origin whose pages may use the server; repeatable")
    add("--page", action=argparse.BooleanOptionalAction, default=True, help="serve a page at / and the API's at /docs")
    add("--ssl-certfile", type=Path, help="TLS certificate chain, PEM")
    add("--ssl-keyfile", type=Path, help="its private key, PEM")


def _add_logs(add: _Add) -> None:
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="of the log on stderr")
    add("--log-format", default="text", choices=("text", "json"), help="of its lines")
    add("--admin-port", type=values.port, help="serve /metrics on this port and not on the main one")
    add("--metrics-tenant", metavar="TENANT", help="the tenant whose keys alone may read /metrics (default: all)")
    add("--otlp-endpoint", metavar="URL", help="send a trace of every request to this OTLP collector, as "
        "http://127.0.0.1:4318; needs the extra otel")  # fmt: skip
