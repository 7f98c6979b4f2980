"""Asking servers: one request at a time with what may be tried again, and all of a suite's."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import httpx

from pacellm.errors import PaceError
from pacellm.evaluation.arms import Arm
from pacellm.evaluation.records import Records
from pacellm.evaluation.samples import Prompt, Sample

API = Literal["chat", "completions"]
_BUSY = (429, 503)
_GO_ON = "run the command again to go on"
_NEVER = (401, 403, 404)
_PATIENCE = 600.0
"""Seconds that a request waits for a busy server, in all."""
_TRIES = 3
"""Of a request that the server fails, or that does not reach it."""


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer.

    Attributes:
        status: 0 where nothing was sent.
        code, param: as OpenAI's errors have them.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    def is_of(self, arm: Arm) -> bool:
        """Every other sample would be refused too: it is about the arm's own fields."""
        return self.status == 0 or self.code == "worse_answers" or (self.param or "").split(".")[0] in arm.fields


@dataclass(frozen=True)
class Server:
    """Where an arm is asked.

    Attributes:
        http: a client at its root.
        model: the name to ask for.
        takes_pacellm: it is a PaceLLM server.
    """

    http: httpx.Client
    model: str
    takes_pacellm: bool

    def ask(self, arm: Arm, sample: Sample, prompt: Prompt, api: API) -> Mapping[str, Any] | Refusal:
        """An answer as it is recorded.

        Raises:
            PaceError: the server is not reached, stays busy, or has no such model, key or endpoint.
        """
        if not self.takes_pacellm and "pacellm" in arm.fields and arm.fields["pacellm"] != {"pa": "off"}:
            return Refusal(0, f"{self.http.base_url} is no PaceLLM server, and has no field pacellm")
        path, body = self._body(arm, sample, prompt, "completions" if sample.is_raw else api)
        started = time.monotonic()
        response = self._post(path, body)
        seconds = time.monotonic() - started
        if response.status_code in _NEVER:
            raise PaceError(f"{self.http.base_url} answered {path} with {response.status_code}: "
                            f"{_refusal(response).message}")  # fmt: skip
        if response.status_code != 200:
            return _refusal(response)
        try:
            return {**_answer(response.json()), "seconds": round(seconds, 3)}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PaceError(f"{self.http.base_url} answered {path} with what is no completion: {error!r}") from error

    def _body(self, arm: Arm, sample: Sample, prompt: Prompt, api: API) -> tuple[str, dict[str, Any]]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt.text}]} if api == "chat" else {"prompt": prompt.text}
        )
        fields = {name: value for name, value in arm.fields.items() if name != "pacellm" or self.takes_pacellm}
        path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        return path, {"model": self.model, **asked, "max_tokens": sample.max_tokens, "temperature": 0, **fields}

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """The server's word, after as many tries as it takes."""
        waited, failed = 0.0, 0
        while True:
            try:
                response = self.http.post(path, json=body)
            except httpx.HTTPError as error:
                failed += 1
                if failed >= _TRIES:
                    raise PaceError(f"no answer from {self.http.base_url}: {error!r}; {_GO_ON}") \
                        from error  # fmt: skip
                time.sleep(2.0**failed)
                continue
            if response.status_code in _BUSY:
                pause = _retry_after(response, waited)
                if waited + pause > _PATIENCE:
                    raise PaceError(f"{self.http.base_url} is busy (status {response.status_code}: "
                                    f"{_refusal(response).message}) for {_PATIENCE:.0f} seconds; {_GO_ON}")  # fmt: skip
                waited += pause
                time.sleep(pause)
            elif response.status_code in (500, 502, 504) and failed < _TRIES - 1:
                failed += 1
                time.sleep(2.0**failed)
            else:
                return response


class Run:
    """A suite's samples under its arms; those of one sample are asked one after another.

    Args:
        arms: with the server of each.
        records: answers that are there, and where new ones go.
        api: how prompts that are not raw are asked.
        on_done: called for each sample and arm that needs no more asking, in this thread.
    """

    def __init__(
        self,
        arms: Sequence[tuple[Arm, Server]],
        records: Records,
        api: API,
        on_done: Callable[[Sample, Arm], None] = lambda sample, arm: None,
    ) -> None:
        self._arms, self._records, self._api, self._on_done = arms, records, api, on_done
        self._refused: dict[str, Refusal] = {}

    def ask(self, samples: Iterable[Sample], concurrency: int) -> None:
        """Ask what is not answered.

        Raises:
            PaceError: a server is not reached any more; what was answered is kept.
        """
        todo: queue.SimpleQueue[Sample] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Sample, Arm] | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()
        for sample in samples:
            todo.put(sample)

        def work() -> None:
            try:
                while not stopped.is_set():
                    self._ask_sample(todo.get_nowait(), done)
            except queue.Empty:
                done.put(None)
            except BaseException as error:
                done.put(error)

        # threads that hold the end up no longer than it takes: a prompt may be read for minutes
        for _ in range(concurrency):
            threading.Thread(target=work, daemon=True).start()
        try:
            running = concurrency
            while running:
                told = done.get()
                if isinstance(told, BaseException):
                    raise told
                if told is None:
                    running -= 1
                else:
                    self._on_done(*told)
        finally:
            stopped.set()

    def _ask_sample(self, sample: Sample, done: queue.SimpleQueue) -> None:
        prompt: Prompt | None = None
        for arm, server in self._arms:
            if not self._records.is_answered(sample, arm):
                refusal = self._refused.get(arm.name)
                if refusal is None:
                    prompt = prompt or sample.make()
                    told = server.ask(arm, sample, prompt, self._api)
                    if isinstance(told, Refusal):
                        refusal = told
                    else:
                        self._records.add(sample, arm, {**told, "score": prompt.score(told["text"])})
                if refusal is not None:
                    self._records.add(sample, arm, {"refused": asdict(refusal)})
                    if refusal.is_of(arm):
                        self._refused[arm.name] = refusal
            done.put((sample, arm))


def _answer(found: Mapping[str, Any]) -> dict[str, Any]:
    choice, usage = found["choices"][0], found.get("usage") or {}
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    memory = (found.get("pacellm") or {}).get("memory") or {}
    return {
        "text": text or "",
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cached_tokens": cached,
        "system_fingerprint": found.get("system_fingerprint"),
        **({"called_back": memory.get("called_back")} if memory.get("view") else {}),
    }


def _refusal(response: httpx.Response) -> Refusal:
    try:
        error = response.json()["error"]
        return Refusal(response.status_code, str(error["message"]), _text(error.get("code")), _text(error.get("param")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refusal(response.status_code, response.text[:500] or f"status {response.status_code}")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _retry_after(response: httpx.Response, waited: float) -> float:
    """Seconds to wait: what the server says, else as long as was waited already, from a second to half a minute."""
    try:
        seconds = float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        seconds = math.nan
    return max(0.05, seconds) if math.isfinite(seconds) else min(max(waited, 1.0), 30.0)
