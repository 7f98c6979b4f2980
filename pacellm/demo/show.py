"""The demo: a server on the bundled model, a long document, two questions in one session, over HTTP as a user would."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from pacellm.demo.generator import Document
from pacellm.demo.local import running_server, sample_document
from pacellm.errors import PaceError

_ON = {
    "off": "off",
    "observe": "observe: banks are fed and counted, answers are the plain model's",
    "reference": "reference: banks change answers",
    "paper": "paper: banks change answers",
}


@dataclass
class Answer:
    """What came back, and when."""

    text: str = ""
    first_token: float = 0.0
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, Any] = field(default_factory=dict)


def show(num_tokens: int, seed: int, serve_arguments: Sequence[str]) -> int:
    """Run the demo; returns 0 where every answer was right."""
    print(f"Writing a document of {num_tokens:,} tokens …", flush=True)
    document = sample_document(num_tokens, seed)
    first, second = document.facts[len(document.facts) // 3], document.facts[-1]
    print(f"Starting the server: pacellm serve {' '.join(serve_arguments)}", flush=True)
    with running_server(serve_arguments) as client:
        right = _talk(client, document, first, second)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\nPeak memory of the server: {peak / 2**30:.2f} GiB")
    return 0 if right else 1


def _talk(client: httpx.Client, document: Document, first: Any, second: Any) -> bool:
    messages = [{"role": "user", "content": f"{document.text}\n\n{first.question}"}]
    one = ask(client, messages, "demo")
    _report("Question 1", first, one)
    report_bank(one.pace)
    messages += [{"role": "assistant", "content": one.text}, {"role": "user", "content": second.question}]
    two = ask(client, messages, "demo")
    _report("Question 2, same session, the whole history sent again", second, two)
    computed = two.usage["prompt_tokens"] - two.usage["prompt_tokens_details"]["cached_tokens"]
    share = computed / two.usage["prompt_tokens"]
    print(f"  computed again         {computed:,} of {two.usage['prompt_tokens']:,} prompt tokens ({share:.3%})")
    print(f"  against question 1     {two.seconds / one.seconds:.2%} of its time")
    messages += [{"role": "assistant", "content": two.text}]
    unknown = document.unknown_questions[0]
    three = ask(client, [*messages, {"role": "user", "content": unknown}], "demo")
    print(f"\nA question that the document does not answer\n  asked    {unknown}\n  answer   {three.text}")
    return first.answer in one.text and second.answer in two.text


def ask(client: httpx.Client, messages: list[dict[str, str]], session: str, **changes: Any) -> Answer:
    """One streamed request, with a live progress line.

    Args:
        changes: to the body.

    Raises:
        PaceError: the server answered with an error.
    """
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": 48,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "session_id": session,
        **changes,
    }
    answer, started = Answer(), time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise PaceError(f"the server answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(json.loads(line[6:]), answer, started)
    answer.seconds = time.monotonic() - started
    return answer


def _take(chunk: dict[str, Any], answer: Answer, started: float) -> None:
    if "error" in chunk:
        raise PaceError(f"the server failed: {chunk['error']['message']}")
    if "prompt_progress" in chunk:
        _progress(chunk["prompt_progress"])
    for choice in chunk["choices"]:
        text = choice["delta"].get("content") or ""
        if text and not answer.text:
            answer.first_token = time.monotonic() - started
        answer.text += text
    answer.usage = chunk.get("usage") or answer.usage
    answer.pace = chunk.get("pacellm") or answer.pace


def _progress(progress: dict[str, int]) -> None:
    seconds = max(progress["time_ms"], 1) / 1000
    done, total = progress["processed"], progress["total"]
    pace = (done - progress["cached"]) / seconds
    bar = "█" * int(30 * done / total)
    end = "\n" if done == total else ""
    if sys.stdout.isatty() or end or done * 20 // total != (done - 2048) * 20 // total:
        line = f"  reading [{bar:<30}] {done:>9,} / {total:,} tokens   {pace:>8,.0f} tokens/s   {seconds:6.1f} s"
        print(("\r" + line) if sys.stdout.isatty() else line, end=end if sys.stdout.isatty() else "\n", flush=True)


def _report(title: str, fact: Any, answer: Answer) -> None:
    prompt, prefill = answer.usage["prompt_tokens"], answer.pace["timings"]["prefill_ms"] / 1000
    computed = prompt - answer.usage["prompt_tokens_details"]["cached_tokens"]
    verdict = "right" if fact.answer in answer.text else f"WRONG, it is {fact.answer}"
    print(f"\n{title}")
    print(f"  asked                  {fact.question}   (stated at {fact.depth:.0%} of the document)")
    print(f"  answer                 {answer.text}   ({verdict})")
    print(f"  session                {answer.pace['session']}")
    print(f"  time to first token    {answer.first_token:.2f} s")
    print(f"  prefill                {computed:,} tokens in {prefill:.2f} s: {computed / prefill:,.0f} tokens/s")


def report_bank(pace: dict[str, Any]) -> None:
    """What a request did to its banks, from the answer's ``pacellm`` object."""
    bank = pace["bank"]
    print(f"  Persistent Activity    {_ON.get(pace['pa'], pace['pa'])}")
    if bank is None:
        return
    reads = {name: bank[name] for name in ("hits", "fuses", "misses", "empty")}
    total = sum(reads.values())
    shares = ", ".join(f"{count:,} {name} ({count / total:.1%})" for name, count in reads.items())
    print(f"  bank reads             {shares}")
    print(f"  bank writes            {bank['merges']:,} merges, {bank['replacements']:,} replacements")
    print(f"  slots filled           {bank['filled']}")
    print(f"  keys' effective rank   {bank['effective_rank']:.2f}   (a high hit rate with a low rank is no memory)")
