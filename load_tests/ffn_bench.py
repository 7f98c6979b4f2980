"""A patched FFN layer against the plain one: ``python load_tests/ffn_bench.py``.

One segment of ``--tokens`` at Qwen2.5-0.5B's sizes, plain and patched in turn. The bank is filled by earlier segments
and every kind of read occurs. ``--peer`` takes a checkout of the authors' released code and times its module beside
them on the same segments, and compares outputs. ``floor`` is the arithmetic of similarities and recall over that of
the plain layer. The last line is JSON; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from pacellm.config import PRESETS, PAConfig
from pacellm.memory.state import COUNTERS, new_bank, new_stage
from pacellm.model.context import Banks, Chunk, Piece, StepContext, step_context
from pacellm.model.ffn import PersistentDown


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def hidden_states(shared: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """[1, tokens, H], each more or less like ``shared`` [H], so that reads meet hits, fuses and misses."""
    spread = 12 * torch.rand(1, tokens, 1, generator=generator)
    return shared + spread * torch.randn(1, tokens, len(shared), generator=generator)


def released(checkout: Path, mlp: nn.Module, bank_size: int, segment: int) -> nn.Module:
    """The authors' module around the same weights."""
    path = checkout / "pacellm" / "activation_memory_bank.py"
    spec = importlib.util.spec_from_file_location("released", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"{path} is not there; --peer takes a checkout of the authors' released code")
    module = sys.modules["released"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.ActivationMemoryConfig(bank_size=bank_size, chunk_size=segment)
    return module.AMBFeedForward(
        mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, memory_config=config
    ).eval()  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--inner", type=int, default=4864)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--bank-size", type=int, default=100)
    parser.add_argument("--preset", choices=PRESETS, default="reference")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--peer", type=Path, help="checkout of the authors' released code")
    args = parser.parse_args()

    torch.manual_seed(0)
    mlp = Qwen2MLP(Qwen2Config(hidden_size=args.hidden, intermediate_size=args.inner)).eval().requires_grad_(False)
    config = PAConfig(preset=args.preset, bank_size=args.bank_size, segment=args.tokens)
    cpu = torch.device("cpu")
    sizes = (config, args.inner, args.hidden, torch.float32, cpu)
    bank, stage = new_bank(*sizes), new_stage(*sizes)
    pieces = (Piece(0, args.tokens, ends=True),)
    chunk = Chunk(0, args.tokens, 0, (), pieces, Banks({0: bank}, {0: stage}, args.preset))
    patched = Qwen2MLP(mlp.config).eval().requires_grad_(False)
    patched.load_state_dict(mlp.state_dict())
    patched.down_proj = PersistentDown(patched.down_proj, 0)
    peer = None if args.peer is None else released(args.peer, mlp, args.bank_size, args.tokens)

    generator = torch.Generator().manual_seed(1)
    shared = 3 * torch.randn(args.hidden, generator=generator)
    pairs: list[tuple[float, float]] = []
    peers: list[float] = []
    apart, found = 0.0, dict[str, Tensor]()
    with torch.inference_mode():
        for number in range(args.pairs + 3):
            x = hidden_states(shared, args.tokens, generator)
            plain = seconds(lambda x=x: mlp(x))
            with step_context(StepContext([chunk], [], [], config)):
                ours = seconds(lambda x=x: found.update(ours=patched(x)))
            if peer is not None:
                released_seconds = seconds(lambda x=x: found.update(theirs=peer(x)))
                apart = max(apart, float((found["theirs"] - found["ours"]).abs().max()))
                peers.append(released_seconds / plain)
            if number >= 3:
                pairs.append((plain, ours))
    result = {
        "bench": "ffn", "hidden": args.hidden, "inner": args.inner, "tokens": args.tokens, "preset": args.preset,
        "bank_size": args.bank_size, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.machine(), "pairs": len(pairs),
        "plain_ms": round(1e3 * statistics.median(plain for plain, _ in pairs), 2),
        "patched_ms": round(1e3 * statistics.median(ours for _, ours in pairs), 2),
        "floor": round(1 + args.bank_size * (args.inner + args.hidden) / (3 * args.inner * args.hidden), 3),
        "peer_ratio": round(statistics.median(peers), 1) if peers else None,
        "peer_largest_difference": apart if peers else None,
        "ratio": round(statistics.median(ours / plain for plain, ours in pairs), 3),
        "reads": dict(zip(COUNTERS, bank.counters.tolist(), strict=True)),
    }  # fmt: skip
    print(f"plain {result['plain_ms']} ms, patched {result['patched_ms']} ms: {result['ratio']} times")
    if peers:
        print(f"the authors' module {result['peer_ratio']} times; outputs differ by at most {apart:.1e}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
