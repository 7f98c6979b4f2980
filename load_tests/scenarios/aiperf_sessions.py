"""aiperf over sessions: ``python -m load_tests.scenarios.aiperf_sessions --aiperf PATH``.

Conversations of several turns whose sessions are named by the header, driven by aiperf (``pip install aiperf``, in an
environment of its own). Every request must succeed, every conversation must be one session with a commit for each
turn, and nothing may be left over. Printed: aiperf's own figures. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from load_tests.scenarios.books import close_books, grown, open_books, wait_until_idle
from load_tests.scenarios.client import open_client
from load_tests.scenarios.servers import given_or_own, parser, report
from pacellm.demo import MODEL_PATH

_FIGURES = ("time_to_first_token", "inter_token_latency", "request_latency", "output_token_throughput",
            "request_throughput", "goodput", "request_count")  # fmt: skip


def command(
    aiperf: str, url: str, key: str | None, folder: Path, *, conversations: int, turns: int, concurrency: int,
    tokens: int, new: int, model: str, tokenizer: str,
) -> list[str]:  # fmt: skip
    """aiperf's command line."""
    words: list[Any] = [
        aiperf, "profile", "--model", model, "--url", url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", tokenizer, "--session-header", "X-Session-ID", "--conversation-num", conversations,
        "--conversation-turn-mean", turns, "--conversation-turn-stddev", 0, "--concurrency", concurrency,
        "--isl", tokens, "--osl", new, "--extra-inputs", "temperature:0", "--extra-inputs", "ignore_eos:true",
        "--output-artifact-dir", folder, "--random-seed", 0, "--ui-type", "none",
    ]  # fmt: skip
    return [str(word) for word in words + (["--api-key", key] if key else [])]


def figures(export: dict[str, Any]) -> dict[str, Any]:
    """Of aiperf's JSON export: mean, median and 99th percentile where it has them, units in the names."""
    found = {}
    for name in _FIGURES:
        if isinstance(metric := export.get(name), dict):
            values = {part: round(metric[part], 3) for part in ("avg", "p50", "p99") if metric.get(part) is not None}
            found[f"{name} [{metric.get('unit', '')}]"] = values
    return found


async def run(
    url: str, key: str | None, words: list[str], folder: Path, turns: int, conversations: int
) -> tuple[dict, list[str]]:
    """(facts, failures)."""
    async with open_client(url, key) as client:
        before = await open_books(client)
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
        ended = await wait_until_idle(client)
        failures = await close_books(client, before)
    exports = list(folder.rglob("profile_export_aiperf.json"))
    if done.returncode or not exports:
        return {}, [f"aiperf ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}"]
    export = json.loads(exports[0].read_text())
    commits = [session["commits"] for session in ended.sessions]
    finished = sum(grown(before, ended, f"pacellm_request_success_total/{reason}") for reason in ("length", "stop"))
    if sorted(commits) != [turns] * conversations:
        failures.append(
            f"{len(commits)} sessions with {sorted(set(commits))} commits, not {conversations} with {turns}"
        )
    if errors := export.get("error_summary"):
        failures.append(f"aiperf saw errors: {errors}")
    if grown(before, ended, "pacellm_request_failure_total"):
        failures.append("requests failed")
    return {"finished": finished, "cached_prompt_tokens": grown(before, ended, "pacellm_cached_prompt_tokens_total"),
            "prompt_tokens": grown(before, ended, "pacellm_prompt_tokens_total"),
            **figures(export)}, failures  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--aiperf", default=shutil.which("aiperf"), help="the program (default: on PATH)")
    found.add_argument("--conversations", type=int, default=64)
    found.add_argument("--turns", type=int, default=4)
    found.add_argument("--concurrency", type=int, default=16)
    found.add_argument("--tokens", type=int, default=512, help="of each turn's message")
    found.add_argument("--new", type=int, default=64, help="of each answer")
    found.add_argument("--model", default="pacellm-demo", help="the name that the server serves")
    found.add_argument("--tokenizer", default=str(MODEL_PATH), help="a directory")
    args = found.parse_args(arguments)
    if not args.aiperf:
        found.error(
            "aiperf is not on PATH: python -m venv VENV && VENV/bin/pip install aiperf, then --aiperf VENV/bin/aiperf"
        )
    if args.small:
        args.conversations, args.turns, args.concurrency, args.tokens, args.new = 4, 2, 2, 64, 8
    with (
        tempfile.TemporaryDirectory() as folder,
        given_or_own(args, ["--max-num-seqs", str(args.concurrency)]) as (url, _),
    ):
        words = command(
            args.aiperf, url, args.api_key, Path(folder), conversations=args.conversations, turns=args.turns,
            concurrency=args.concurrency, tokens=args.tokens, new=args.new, model=args.model, tokenizer=args.tokenizer,
        )  # fmt: skip
        facts, failures = asyncio.run(run(url, args.api_key, words, Path(folder), args.turns, args.conversations))
    return report("aiperf_sessions", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
