"""A stand-in for the server that gives every kind of first answer and keeps what clients send on the second turn:
``python load_tests/compat/first_turns.py CLIENT`` runs a client's script against it, see docs/compatibility.md.

The kind is in the model's name; which turn it is says the history. Answers are in this server's form, streamed or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KINDS = ("text", "reasoning", "call", "parallel", "cut", "no-arguments", "refusal", "structured")
HISTORY = Path(__file__).parents[2] / "tests" / "data" / "history"
COMMANDS = {"py": [sys.executable], "mjs": ["node"]}
_ASKING = ("user", "system", "developer")
_ARGUMENTS = {"call": ['{"city": "Oslo"}'], "parallel": ['{"city": "Oslo"}', '{"city": "Rom\\u00e9"}'],
              "cut": ['{"city": "Os'], "no-arguments": [""]}  # fmt: skip
_TEXTS = {"text": "Good morning!", "reasoning": "Hello.", "structured": '{"city": "Oslo", "days": 3}'}


def chat_message(kind: str) -> dict[str, Any]:
    """A first answer."""
    message: dict[str, Any] = {
        "role": "assistant", "content": _TEXTS.get(kind, "" if kind == "cut" else None),
        "refusal": None, "annotations": [],
    }  # fmt: skip
    if kind == "refusal":
        message["refusal"] = "I will not."
    if kind == "reasoning":
        message |= {"reasoning_content": "Be kind.", "reasoning": "Be kind."}
    if kind in _ARGUMENTS:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": "get_weather", "arguments": text}}
            for n, text in enumerate(_ARGUMENTS[kind])
        ]
    return message


def _finish(kind: str) -> str:
    return "length" if kind in ("cut", "no-arguments") else "tool_calls" if kind in _ARGUMENTS else "stop"


def _completion(kind: str, message: dict[str, Any], finish: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": kind, "pacellm": {"session": "none"},
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }  # fmt: skip


def _chunks(kind: str, message: dict[str, Any], finish: str) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": kind, "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for name in ("reasoning_content", "content", "refusal"):
        if message.get(name):
            extra = {"reasoning": message[name]} if name == "reasoning_content" else {}
            yield chunk({name: message[name], **extra})
    for index, call in enumerate(message.get("tool_calls", ())):
        empty = {**call["function"], "arguments": ""}
        yield chunk({"tool_calls": [{**call, "index": index, "function": empty}]})
        for text in (call["function"]["arguments"][:5], call["function"]["arguments"][5:]):
            if text:
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    yield {**chunk({}, finish), "pacellm": {"session": "none"}}


def output_items(kind: str) -> list[dict[str, Any]]:
    """A first answer's items."""
    status = "incomplete" if kind in ("cut", "no-arguments") else "completed"
    items: list[dict[str, Any]] = []
    if kind == "reasoning":
        part = {"type": "reasoning_text", "text": "Be kind."}
        items.append({"id": "rs_1", "type": "reasoning", "status": status, "content": [part], "summary": []})
    if kind in _TEXTS or kind == "refusal":
        part = {"type": "output_text", "text": _TEXTS.get(kind, ""), "annotations": [], "logprobs": []}
        if kind == "refusal":
            part = {"type": "refusal", "refusal": "I will not."}
        items.append({"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [part]})
    for n, text in enumerate(_ARGUMENTS.get(kind, ())):
        items.append({"id": f"fc_{n}", "type": "function_call", "status": status, "call_id": f"call_{n}",
                      "name": "get_weather", "arguments": text})  # fmt: skip
    return items


def _response(kind: str, items: list[dict[str, Any]], status: str) -> dict[str, Any]:
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": kind, "output": items,
        "error": None, "incomplete_details": details, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
        "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0, "store": True,
        "text": {"format": {"type": "text"}},
        "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
                  "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
    }  # fmt: skip


def _events(kind: str, items: list[dict[str, Any]], status: str) -> Iterator[dict[str, Any]]:
    number = 0

    def event(name: str, /, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": f"response.{name}", "sequence_number": number - 1, **fields}

    yield event("created", response=_response(kind, [], "in_progress"))
    for index, item in enumerate(items):
        began = {**item, "status": "in_progress"} | ({"content": []} if "content" in item else {"arguments": ""})
        yield event("output_item.added", output_index=index, item=began)
        place = {"item_id": item["id"], "output_index": index}
        for part in item.get("content", ()):
            name = {"reasoning_text": "reasoning_text", "output_text": "output_text"}.get(part["type"], "refusal")
            key = "refusal" if name == "refusal" else "text"
            more = {"logprobs": []} if name == "output_text" else {}
            yield event("content_part.added", **place, content_index=0, part={**part, key: ""})
            yield event(f"{name}.delta", **place, content_index=0, delta=part[key], **more)
            yield event(f"{name}.done", **place, content_index=0, **{key: part[key]}, **more)
            yield event("content_part.done", **place, content_index=0, part=part)
        if "arguments" in item:
            if item["arguments"]:
                yield event("function_call_arguments.delta", **place, delta=item["arguments"])
            yield event("function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"])
        yield event("output_item.done", output_index=index, item=item)
    yield event(status, response=_response(kind, items, status))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Models."""
        data = [{"id": kind, "object": "model", "created": 1, "owned_by": "pacellm"} for kind in KINDS]
        self._answer(json.dumps({"object": "list", "data": data}).encode(), "application/json")

    def do_POST(self) -> None:
        """A first answer, or a second one whose request is kept."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, is_chat = body["model"], self.path.endswith("/chat/completions")
        said = body["messages"] if is_chat else body["input"]
        is_second = not isinstance(said, str) and any(one.get("role") not in _ASKING for one in said)
        if is_second:
            self.server.kept.append({"api": "chat" if is_chat else "responses", "kind": kind, "said": said})  # type: ignore[attr-defined]
        answered = "text" if is_second and kind != "structured" else kind
        status = "incomplete" if _finish(answered) == "length" else "completed"
        if is_chat:
            given = (kind, chat_message(answered), _finish(answered))
            self._give(_completion(*given), _chunks(*given), is_streamed=bool(body.get("stream")), has_done=True)
        else:
            items = (kind, output_items(answered), status)
            self._give(_response(*items), _events(*items), is_streamed=bool(body.get("stream")), has_done=False)

    def _give(self, whole: Any, pieces: Iterator[dict[str, Any]], *, is_streamed: bool, has_done: bool) -> None:
        if not is_streamed:
            self._answer(json.dumps(whole).encode(), "application/json")
            return
        text = ""
        for piece in pieces:
            name = "" if has_done else f"event: {piece['type']}\n"
            text += f"{name}data: {json.dumps(piece)}\n\n"
        self._answer((text + ("data: [DONE]\n\n" if has_done else "")).encode(), "text/event-stream")

    def _answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def main() -> None:
    """Run a client's script, and write what it sent."""
    script = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.kept = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command = COMMANDS[script.suffix[1:]]
    subprocess.run([*command, str(script), *sys.argv[2:]], env={**os.environ, "PACELLM_URL": url}, check=False)
    unique = {json.dumps(one, sort_keys=True): one for one in server.kept}  # type: ignore[attr-defined]
    HISTORY.mkdir(exist_ok=True)
    name = "-".join(sys.argv[2:] or [script.stem])
    (HISTORY / f"{name}.json").write_text(json.dumps(list(unique.values()), ensure_ascii=False, indent=1) + "\n")
    print(name, [(one["api"], one["kind"]) for one in unique.values()])


if __name__ == "__main__":
    main()
