"""The parts of ``first_light.sh`` and ``second_look.sh``: ``python -m load_tests.gpu.parts PART [--small]``.

Results go to the file that the environment variable ``RESULTS`` names, each as soon as it is there. Floors: prefill is
FLOPs over the measured matrix rate, decode bytes over the measured copy rate; ``of_limit`` is floor over time. A part
begins by measuring these rates, unless the file has them already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from load_tests.gpu import kernels, looks, more
from load_tests.gpu import rig as rigs
from load_tests.gpu.results import Results
from load_tests.gpu.rig import Rig, request, run
from load_tests.gpu.sets import sets
from pacellm.demo import MODEL_PATH
from pacellm.demo.evaluate import opening
from pacellm.demo.generator import make_document
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, SamplingParams

Cells = dict[str, Any]


class Bench:
    """What a part is given.

    Args:
        results: where its lines go.
        small: tiny sizes on a CPU.
    """

    def __init__(self, results: Results, path: Path, *, small: bool) -> None:
        self.add, self.small, self._path = results.add, small, path
        self.device = torch.device("cpu" if small else "cuda")

    @property
    def limits(self) -> Cells:
        """The device's rates, measured once a file."""
        lines = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        found = next((line for line in lines if line["name"] == "limits"), None)
        if found is None:
            found = rigs.limits(self.device, small=self.small)
            self.add("limits", **found)
        return found

    def rig(self) -> Rig:
        """The 7B shape, with random weights."""
        return rigs.build(self.device, small=self.small)

    def pick(self, small: Any, real: Any) -> Any:
        """The size to use."""
        return small if self.small else real


def card(bench: Bench) -> None:
    """Versions and rates."""
    name = platform.processor() if bench.small else torch.cuda.get_device_name()
    driver = "" if bench.small else f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"
    bench.add("versions", device=name, memory=driver, torch=torch.__version__, transformers=transformers.__version__)
    assert bench.limits


def bundled(bench: Bench) -> None:
    """The bundled model: answers beside a CPU's, and the same tokens with and without graphs and steps ahead; then the
    demo, as its command has it."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    document = make_document(bench.pick(300, 20_000), bench.pick(2, 8), 5, tokenizer._tokenizer)
    asked = [tokenizer.encode(tokenizer.render(opening(document, fact.question))) for fact in document.facts]
    ways: dict[str, tuple[torch.device, Cells]] = {
        "cpu": (torch.device("cpu"), {}),
        "steps_ahead": (bench.device, {}),
        "graphs": (bench.device, {"async_scheduling": False}),
        "no_graphs": (bench.device, {"cuda_graphs": False}),
        "deterministic": (bench.device, {"deterministic": True}),
    }
    found: dict[str, list[list[int]]] = {}
    for name, (device, settings) in ways.items():
        started = time.perf_counter()
        found[name] = _answers(Rig(load(MODEL_PATH, device=device), bench.small, Path()), asked, settings)
        texts = [tokenizer.backend.decode(tokens) for tokens in found[name]]
        right = [fact.answer in text for fact, text in zip(document.facts, texts, strict=True)]
        same = [mine == one for mine, one in zip(found[name], found["cpu"], strict=True)]
        bench.add(name, right=sum(right), asked=len(right), as_on_cpu=sum(same), seconds=time.perf_counter() - started)
    command = [sys.executable, "-m", "pacellm.cli", "demo", "--tokens", str(bench.pick(2000, 200_000)), "--"]
    demo = subprocess.run([*command, "--device", bench.device.type], capture_output=True, text=True, check=False)
    bench.add("demo", status=demo.returncode, printed=(demo.stdout + demo.stderr)[-3000:])


_QUESTIONS = (
    "What is the capital of France?", "Name three fruits.", "Write one sentence about the sea.", "What is 7 times 8?",
    "Who wrote Hamlet?", "Translate 'good morning' into French.", "Why is the sky blue?", "List the days of the week.",
    "Say hello 👋 in two languages.",
)  # fmt: skip


def real(bench: Bench) -> None:
    """A real model, the one that the environment variable ``MODEL`` names: greedy tokens with default settings beside
    ``generate`` on the same device and beside a CPU's, and with every way to decode."""
    if bench.small:
        path, limit = MODEL_PATH, 8
    else:
        path, limit = Path(os.environ["MODEL"]), 48
    tokenizer = ChatTokenizer(path)
    notes = [f"Note {n}: the {word} is kept in room {n * 7 % 90}." for n, word in enumerate(["lamp", "map"] * 60)]
    questions = [*_QUESTIONS, " ".join([*notes, "Which room is the first lamp in?"])][: bench.pick(2, None)]
    asked = [tokenizer.encode(tokenizer.render([{"role": "user", "content": text}])) for text in questions]
    model = load(path, device=bench.device)
    ways: dict[str, tuple[Any, Cells]] = {
        "cpu": (load(path, dtype=torch.float32), {}),
        "default": (model, {}),
        "no_banks": (model, {"pa": False}),
        "no_graphs": (model, {"cuda_graphs": False}),
        "alone": (model, {"max_num_seqs": 1}),
        "deterministic": (model, {"deterministic": True}),
    }
    found = {}
    for name, (loaded, settings) in ways.items():
        rig = Rig(loaded, bench.small, Path())
        found[name] = _answers(rig, asked, {"max_num_seqs": len(asked), **settings}, limit)
        text = tokenizer.backend.decode(found[name][0])
        bench.add(name, asked=len(asked), as_on_cpu=_same(found[name], found["cpu"]), text=text)
    bench.add("observed beside none", same=_same(found["default"], found["no_banks"]))
    with Rig(model, bench.small, Path()).peer() as module:
        generated = []
        for ids in asked:
            prompt = torch.tensor([ids], device=bench.device)
            options = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": False, "pad_token_id": 0}
            output = module.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[operator]
            generated.append(output[0, len(ids) :].tolist())
    bench.add("generate", default_same=_same(found["default"], generated), cpu_same=_same(found["cpu"], generated))


def _same(mine: list[list[int]], other: list[list[int]]) -> list[int]:
    """For each answer how many of its first tokens are the same."""
    found = []
    for one, two in zip(mine, other, strict=True):
        differs = (number for number, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        found.append(next(differs, min(len(one), len(two))))
    return found


def _answers(rig: Rig, asked: list[list[int]], settings: Cells, new: int = 16) -> list[list[int]]:
    """``new`` tokens, greedy, for each prompt: all at once, as a server would have them."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    with rig.engine(sum(map(len, asked)) + 2048 * len(asked), **{"max_num_seqs": len(asked), **settings}) as engine:
        events = run(engine, *(rigs.sampled(str(n), ids, sampling) for n, ids in enumerate(asked)))
    return [[token for event in events[str(n)] if isinstance(event, Delta) for token in event.token_ids]
            for n in range(len(asked))]  # fmt: skip


def decode(bench: Bench) -> None:
    """Steps of 1, 16 and 64 sequences at 4K by mode, where the time of a step goes, and ``generate`` at 1."""
    rig, limits = bench.rig(), bench.limits
    batches, context, steps = bench.pick((1, 3), (1, 16, 64)), bench.pick(40, 4096), bench.pick(4, 50)
    plain: dict[int, float] = {}
    for mode, settings in rigs.MODES.items():
        with rig.engine(batches[-1] * (context + 1024), **settings) as engine:
            layers = len(engine.config.pa_layers or ()) if engine.config.pa else 0
            for batch in batches:
                have, new = len(engine.scheduler.running), bench.pick(300, 900)
                rigs.fill(engine, [request(str(n), rig.ids(context, n), new) for n in range(have, batch)])
                seconds = rigs.decode_seconds(rig, engine, steps)
                floor = rig.decode_bytes([context] * batch, banks=layers) / limits["copy_bytes"]
                plain.setdefault(batch, seconds)
                bench.add(
                    f"{mode}, batch {batch}", seconds=seconds, floor_seconds=floor, of_limit=floor / seconds,
                    costs=seconds / plain[batch] - 1.0, steps_ahead=engine.stats.steps_ahead,
                )  # fmt: skip
                if mode == "off":
                    bench.add(f"{mode}, batch {batch}: where a step's time goes", **looks.profiled(rig, engine, 4))
    with rig.peer() as module:
        prompt = rig.ids(context, 0)

        def generate(new: int) -> float:
            return rigs.generate_seconds(rig, module, prompt, new)

        generate(2)
        count = bench.pick(4, 30)
        seconds = (generate(1 + count) - generate(1)) / count
        bench.add("generate, batch 1", seconds=seconds, times_as_slow=seconds / plain[1])


def attention(bench: Bench) -> None:
    """Each kernel of prompt attention, and where the time of a chunk goes."""
    rig, limits = bench.rig(), bench.limits
    for name, cell in kernels.kernels(rig, limits).items():
        if name != "queries":
            bench.add(f"kernel {name}", **cell)
    length = bench.pick(150, 25_000)
    with rig.engine(4 * length) as engine:
        engine.add(request("deep", rig.ids(4 * length, 3), 1))
        while not engine.scheduler.running or engine.scheduler.running[0].cursor < length:
            engine.step()
        bench.add(f"where a chunk's time goes at {length:,}", **looks.profiled(rig, engine, 1))


def prefill(bench: Bench) -> None:
    """200K tokens by the kernel that is chosen, by mode."""
    rig, limits = bench.rig(), bench.limits
    length, warm = bench.pick((300, 60), (200_000, 16_384))
    floor = rig.prefill_flops(length) / limits["matrix_flops"]
    plain = None
    for mode, settings in rigs.MODES.items():
        with rig.engine(length, **settings) as engine:
            run(engine, request("warm", rig.ids(warm, 1), 1))
            seconds = rig.seconds(lambda e=engine: run(e, request("x", rig.ids(length, 2), 1)))
            plain = plain or seconds
            bench.add(
                f"{length:,} tokens, {mode}", seconds=seconds, floor_seconds=floor, of_limit=floor / seconds,
                costs=seconds / plain - 1.0, kernel="cpu" if engine.kernel is None else engine.kernel.name,
            )  # fmt: skip


def beside(bench: Bench) -> None:
    """A long prompt beside 16 streams, then a second question in its session: resident, and from host memory."""
    rig, limits = bench.rig(), bench.limits
    streams, context, length, question = bench.pick((2, 40, 400, 20), (16, 4096, 200_000, 200))
    nbytes = length * rig.model.bytes_per_token
    settings: Cells = {"session_memory": 2 * nbytes + 2**26, "session_host_memory": 2 * nbytes + 2**26}
    settings |= {"max_num_mixed_tokens": bench.pick(64, 8192), "max_num_seqs": streams + 1}
    new = bench.pick(300, 3000)
    with rig.engine(streams * (context + new) + 2 * length, **settings) as engine:
        rigs.fill(engine, [request(str(n), rig.ids(context, n), new) for n in range(streams)])
        alone = [rig.seconds(engine.step) for _ in range(bench.pick(4, 200))]
        engine.add(request("long", rig.ids(length, 3), 4, session="s"))
        gaps, is_read, started = [], False, time.perf_counter()
        while not is_read:
            before = time.perf_counter()
            is_read = any(name == "long" and isinstance(event, Delta) for name, event in engine.step())
            gaps.append(time.perf_counter() - before)
        seconds = time.perf_counter() - started
        bench.add(
            "a long prompt beside streams", streams=streams, alone_p99=_p99(alone), beside_p99=_p99(gaps),
            beside_median=statistics.median(gaps), times_alone=_p99(gaps) / _p99(alone), prefill_seconds=seconds,
        )  # fmt: skip
        for sequence in [*engine.scheduler.running]:
            if sequence.id != "long":
                engine.abort(sequence.id)
        _until_idle(engine)
        for tier in ("resident", "host"):
            history = _context_of(engine, "s")
            if tier == "host":
                engine.eviction.evict_one()
                engine.worker.finish()
            item = request(tier, [*history, *rig.ids(question, 5)], 1, "s")
            seconds = rig.seconds(partial(run, engine, item))
            bench.add(
                f"a second question, {tier}", tokens=len(history), seconds=seconds,
                copy_floor=nbytes / limits["host_to_device_bytes"] if tier == "host" else None,
            )  # fmt: skip


def _until_idle(engine: Engine) -> None:
    while engine.has_work or engine.worker.num_open:
        engine.step()


def _context_of(engine: Engine, session: str) -> list[int]:
    found = engine.sessions.get(("bench", session))
    assert found is not None, "the session is gone"
    return list(found.context)


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def _whole(measured: Callable[[Rig, Cells], Cells]) -> Callable[[Bench], None]:
    """A part of one line for each thing that is measured."""

    def part(bench: Bench) -> None:
        for name, cell in measured(bench.rig(), bench.limits).items():
            bench.add(name, **(cell if isinstance(cell, dict) else {"value": cell}))

    return part


PARTS: dict[str, Callable[[Bench], None]] = {
    "card": card,
    "bundled": bundled,
    "decode": decode,
    "attention": attention,
    "real": real,
    "prefill": prefill,
    "beside": beside,
    "deterministic": _whole(looks.deterministic),
    "forks": _whole(more.forks),
    "growth": _whole(more.growth),
    "sets": _whole(sets),
    "authors": _whole(more.authors),
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU, to test this script")
    args = parser.parse_args(arguments)
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --small tests the script on a CPU")
    path = Path(os.environ["RESULTS"])
    PARTS[args.part](Bench(Results(path, args.part), path, small=args.small))


if __name__ == "__main__":
    main()
