"""Short streams beside one long prefill, at depths of it: ``python load_tests/fairness_bench.py [--tokens 200000]``.

A server on the bundled model reads a prompt of ``--tokens`` tokens. Whenever it has come to one of ``--depths`` (shares
of the prompt) a short chat is streamed: the mean gap between its tokens over what it is with nothing beside it (the aim
is 3 at most), the worst gap, and for comparison what 16 tokens of the prompt, the smallest part, took just before.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from typing import Any

import httpx
import torch

from pacellm.demo.local import running_server, sample_document
from pacellm.rows import ROWS


async def gaps(client: httpx.AsyncClient, new: int) -> list[float]:
    """Seconds between the tokens of a short stream; the first, its time to first token."""
    body = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": new, "ignore_eos": True,
            "temperature": 0, "stream": True, "skip_special_tokens": False}  # fmt: skip
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith('data: {"') and '"finish_reason":null' in line:
                times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


async def measure(url: str, text: str, depths: list[float], new: int) -> dict[str, Any]:
    """Rows by depth."""
    rows: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await gaps(client, new)
        alone = statistics.mean((await gaps(client, new))[1:])
        left, short, before = sorted(depths), None, (0, 0.0)
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 1,
            "stream": True,
            "return_progress": True,
        }
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"prompt_progress":' not in line:
                    continue
                progress = json.loads(line[6:])["prompt_progress"]
                done, now = progress["processed"], progress["time_ms"] / 1000
                if short is not None and short.done():
                    first, *rest = short.result()
                    rows[-1] |= {"end": done, "first_token_seconds": round(first, 3),
                                 "mean_gap_ratio": round(statistics.mean(rest) / alone, 2),
                                 "worst_gap_ms": round(1e3 * max(rest), 1)}  # fmt: skip
                    print(rows[-1], flush=True)
                    short, before = None, (done, now)
                elif short is None and left and done >= left[0] * progress["total"] and done > before[0]:
                    left.pop(0)
                    part = ROWS * (now - before[1]) / (done - before[0])
                    rows.append({"begin": done, "smallest_part_ms": round(1e3 * part, 1)})
                    short = asyncio.create_task(gaps(client, new))
                elif short is None:
                    before = (done, now)
        if short is not None or left:
            print("the prompt ended before the last depth was measured; take fewer or lower --depths", flush=True)
            if short is not None:
                await short
                rows.pop()
    return {"alone_gap_ms": round(1e3 * alone, 2), "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.95])
    args = parser.parse_args()
    text = sample_document(args.tokens, seed=0).text
    with running_server(["--max-num-seqs", "2"]) as client:
        found = asyncio.run(measure(str(client.base_url), text, args.depths, args.new))
    head = {"bench": "fairness", "tokens": args.tokens, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**head, **found}))


if __name__ == "__main__":
    main()
