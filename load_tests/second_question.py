"""A second question in a session, the whole history sent again: ``python load_tests/second_question.py``.

Starts a server on the bundled model, reads a document in a session, then asks ``--rounds`` more questions in it over
HTTP. ``ratio`` is the client's time of a whole answer over the time that the engine's own steps of the same request
took with its KV in place: what HTTP, JSON, template and tokenizer add. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import httpx
import torch

from pacellm.demo.local import running_server, sample_document


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("serve_arguments", nargs="*", help="flags for the server, after --")
    args = parser.parse_args()

    document, rows = sample_document(args.tokens, seed=0), []
    messages: list[dict[str, str]] = []
    with running_server(args.serve_arguments) as client:
        for number in range(args.rounds + 1):
            question = document.facts[number * len(document.facts) // (args.rounds + 1)].question
            content = question if messages else f"{document.text}\n\n{question}"
            messages.append({"role": "user", "content": content})
            started = time.monotonic()
            answer = ask(client, messages)
            seconds = time.monotonic() - started
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            timings, usage = answer["pacellm"]["timings"], answer["usage"]
            row = {
                "seconds": round(seconds, 3),
                "engine_seconds": round((timings["prefill_ms"] + timings["decode_ms"]) / 1e3, 3),
                "prompt_tokens": usage["prompt_tokens"],
                "answer_tokens": usage["completion_tokens"],
                "computed": usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
            }
            row["ratio"] = round(row["seconds"] / row["engine_seconds"], 3)
            rows.append(row)
            print(f"question {number + 1}: {row}", flush=True)
    ratios = [row["ratio"] for row in rows[1:]]
    print(
        json.dumps(
            {
                "bench": "second_question",
                "tokens": args.tokens,
                "torch": torch.__version__,
                "first": rows[0],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "seconds": statistics.median(row["seconds"] for row in rows[1:]),
                "engine_seconds": statistics.median(row["engine_seconds"] for row in rows[1:]),
            }
        )
    )


def ask(client: httpx.Client, messages: list[dict[str, str]]) -> dict:
    """One answer in the session, not streamed."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 48, "session_id": "second-question"}
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return response.json()


if __name__ == "__main__":
    main()
