"""What HTTP adds to the engine: ``python load_tests/http_bench.py``.

``--streams`` chat requests are streamed at once from a server on the bundled model, and the same requests run on an
engine in this process. ``added_ms_per_token`` is the difference of their seconds a step, ``events_per_second`` what
the server sent. Then, beside the same streams, a text of ``--tokens`` tokens is tokenised over and over
(``/tokenize``), or a prompt of that length is being read: gaps between a stream's tokens, beside what they are without.
The client shares the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable

import httpx
import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.local import running_server, sample_document
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import GenerationRequest, SamplingParams

Gaps = list[float]
Beside = Callable[[httpx.AsyncClient], Awaitable[None]]


def message(number: int) -> list[dict[str, str]]:
    """A short conversation, another for each stream."""
    return [{"role": "user", "content": f"The code of archive {number} is {48213 + number}. What is it?"}]


async def stream(client: httpx.AsyncClient, number: int, new: int) -> Gaps:
    """Arrival times of one stream's tokens."""
    body = {"messages": message(number), "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
            "skip_special_tokens": False}  # fmt: skip
    times = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith('data: {"') and '"finish_reason":null' in line.replace(" ", ""):
                times.append(time.perf_counter())
    return times


async def streams(url: str, count: int, new: int, beside: Beside | None = None) -> tuple[float, int, Gaps]:
    """Seconds from first to last token, events, and all gaps between a stream's tokens."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        other = asyncio.create_task(beside(client)) if beside is not None else None
        times = await asyncio.gather(*(stream(client, number, new) for number in range(count)))
        if other is not None:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
    every = [moment for one in times for moment in one]
    gaps = [later - earlier for one in times for earlier, later in itertools.pairwise(one[4:])]
    return max(every) - min(every), len(every), gaps


def tokenising(text: str) -> Beside:
    """Tokenise a text, again and again."""

    async def beside(client: httpx.AsyncClient) -> None:
        while True:
            (await client.post("/tokenize", json={"prompt": text})).raise_for_status()

    return beside


def reading(text: str) -> Beside:
    """Read a long prompt; leaving cancels it."""

    async def beside(client: httpx.AsyncClient) -> None:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_lines():
                pass

    return beside


def engine_seconds(count: int, new: int) -> float:
    """Seconds a step of the same requests without a server."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    engine = Engine(load(MODEL_PATH), EngineConfig(max_num_seqs=count, kv_cache_memory=2**30), tokenizer.backend)
    for number in range(count):
        prompt = tokenizer.encode(tokenizer.render(message(number)))
        engine.add(
            GenerationRequest(str(number), prompt, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))
        )
    steps = []
    while engine.has_work:
        only_decodes = len(engine.scheduler.running) == count
        only_decodes &= all(sequence.is_decoding for sequence in engine.scheduler.running)
        started = time.perf_counter()
        engine.step()
        if only_decodes:
            steps.append(time.perf_counter() - started)
    return statistics.median(steps)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200_000)
    args = parser.parse_args()
    step = engine_seconds(args.streams, args.new)
    text = sample_document(args.tokens, seed=0).text
    rows = {}
    with running_server(["--max-num-seqs", str(args.streams + 1)]) as client:
        url = str(client.base_url)
        asyncio.run(streams(url, args.streams, 8))  # warm up
        for name, beside in (("alone", None), ("tokenising", tokenising(text)), ("reading", reading(text))):
            seconds, events, gaps = asyncio.run(streams(url, args.streams, args.new, beside))
            rows[name] = {
                "seconds": round(seconds, 3),
                "events_per_second": round(events / seconds),
                "mean_gap_ms": round(1e3 * statistics.mean(gaps), 2),
                "median_gap_ms": round(1e3 * statistics.median(gaps), 2),
                "worst_gap_ms": round(1e3 * max(gaps), 1),
            }
            print(f"{name:12}", rows[name], flush=True)
    print(
        json.dumps(
            {
                "bench": "http",
                "streams": args.streams,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "engine_step_ms": round(1e3 * step, 2),
                "added_ms_per_token": round(rows["alone"]["median_gap_ms"] - 1e3 * step, 2),
                "mean_gap_ratio_while_reading": round(rows["reading"]["mean_gap_ms"] / rows["alone"]["mean_gap_ms"], 2),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
