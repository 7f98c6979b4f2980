"""The offline front door: a model in this process, with sessions, streams and banks as tensors. No HTTP."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pacellm.calibration.gate import find
from pacellm.calibration.retrieval import known
from pacellm.completion import Completion
from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine
from pacellm.errors import ConfigError, EngineError, RequestError, SessionNotFound
from pacellm.experts.apply import apply_layout
from pacellm.experts.layout import Layout
from pacellm.memory.frames import counters_frame, slots_frame
from pacellm.memory.state import Banks, copy_banks
from pacellm.model.fingerprint import model_sample
from pacellm.model.load import LoadedModel, find_device, load
from pacellm.modes import PAChoice
from pacellm.real_models import resolve
from pacellm.text.question import question_of
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, Event, Failed, Finished, GenerationRequest, Outline, SamplingParams

if TYPE_CHECKING:
    from pandas import DataFrame

Message = Mapping[str, Any]
Prompt = str | Sequence[int]
TENANT = "offline"
"""Whose sessions these are, for who looks into the engine."""


class Stream(Iterator[str]):
    """An answer's text as it comes. Closing it, or leaving its ``with``, cancels what has not ended: then the session
    stays as it was.

    Attributes:
        answer: the whole, once the text has ended.
    """

    def __init__(self, llm: LLM, request: GenerationRequest, said: list[Message] | None) -> None:
        self._llm, self._request, self._said = llm, request, said
        self._events = llm._events(request)
        self._seen: list[Event] = []
        self.answer: Completion | None = None

    def __next__(self) -> str:
        for event in self._events:
            self._seen.append(event)
            if isinstance(event, Delta) and event.text:
                return event.text
        if self.answer is None and self._seen:
            self.answer = Completion.of(self._seen)
            self._llm._note(self._request, self._said, self.answer)
        raise StopIteration

    def close(self) -> None:
        """Cancel it."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LLM:
    """A model with sessions, for one thread::

        llm = LLM("smollm2")
        llm.chat("The archive's code is 48213.", session="a", max_tokens=0)
        print(llm.chat("What is the code?", session="a", append=True, temperature=0))

    The engine is the server's: the same batching, sessions and banks, and the same bits.

    Args:
        model: as for ``pacellm serve``: a directory, hub name, GGUF file, or ``smollm2``; None is the bundled model. Or
            one that is loaded, with its ``tokenizer``.
        chat_template: a Jinja file, where the checkpoint has none or another is wanted.
        dtype, device: of the weights; ``auto`` is the checkpoint's, and CUDA where there is one.
        layout: a file of Cortical Experts.
        config: of the engine; ``options`` are fields of it by name, as ``max_num_seqs=4``.

    Attributes:
        engine, tokenizer: what everything here runs on.

    Raises:
        PaceError: a model, layout or config that cannot work.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        *,
        tokenizer: ChatTokenizer | None = None,
        chat_template: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        layout: str | Path | None = None,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        config = dataclasses.replace(config or EngineConfig(), **options)
        if isinstance(model, LoadedModel):
            if tokenizer is None:
                raise ConfigError("a loaded model needs its tokenizer", param="tokenizer")
            loaded, self.tokenizer = model, tokenizer
        else:
            path = MODEL_PATH if model is None else resolve(str(model))
            loaded = load(path, dtype=dtype, device=find_device(device))
            self.tokenizer = tokenizer or ChatTokenizer(path, chat_template)
            if config.working_memory is not None:
                calibration, _ = find(path, None, lambda: model_sample(loaded.module))
                loaded = dataclasses.replace(
                    loaded, retrieval=known(calibration.retrieval if calibration else None, loaded)
                )
        if layout is not None:
            loaded = apply_layout(loaded, Layout.load(layout))
        self.engine = Engine(loaded, config, self.tokenizer.backend)
        self._names = itertools.count()
        self._said: dict[str, list[Message]] = {}  # by session: what its next appended message follows

    # -- answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        session: str | None = None,
        pa: PAChoice = "on",
        commit: bool = True,
        ce_density: float | None = None,
        outline: Outline | None = None,
        **sampled: Any,
    ) -> list[Completion]:
        """What follows prompts, which run together; answers in their order.

        Args:
            prompts: texts or ids, one or several.
            sampling: how, for all; ``sampled`` are fields of it by name, as ``max_tokens=16``.
            session: what a prompt works on, by name; for one prompt.
            pa: how its banks take part. commit: whether the session keeps what this does.
            ce_density: part of the experts that decoded tokens use.
            outline: of each prompt, as where its question stands; None is plain text.

        Raises:
            PaceError: what the engine refuses, and what fails.
        """
        several = _several(prompts)
        if session is not None and len(several) != 1:
            raise RequestError("a session takes one prompt at a time", param="session")
        how = {"pa": pa, "commit": commit, "ce_density": ce_density, "outline": outline or Outline()}
        requests = [self._request(self._ids(prompt), sampling, sampled, session, **how) for prompt in several]
        return [Completion.of(events) for events in self._run(requests)]

    def chat(
        self,
        messages: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        session: str | None = None,
        append: bool = False,
        pa: PAChoice = "on",
        commit: bool = True,
        ce_density: float | None = None,
        **sampled: Any,
    ) -> Completion:
        """The assistant's answer to a conversation.

        Args:
            messages: the whole conversation, or with ``append`` what is new in the session's; a text is a message of
                the user's.
            session: what it works on, by name; with it, what the session has read is not computed again.
            sampling, pa, commit, ce_density, sampled: as of :meth:`generate`.

        Raises:
            PaceError: what the template or the engine refuses, and what fails.
        """
        said, request = self._chat(
            messages, sampling, sampled, session, append=append, pa=pa, commit=commit, ce_density=ce_density
        )
        answer = Completion.of(self._run([request])[0])
        self._note(request, said, answer)
        return answer

    def stream(
        self,
        messages: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        session: str | None = None,
        append: bool = False,
        pa: PAChoice = "on",
        commit: bool = True,
        ce_density: float | None = None,
        **sampled: Any,
    ) -> Stream:
        """:meth:`chat`, its text as it comes. Between pieces nothing runs."""
        said, request = self._chat(
            messages, sampling, sampled, session, append=append, pa=pa, commit=commit, ce_density=ce_density
        )
        return Stream(self, request, said)

    # -- sessions ------------------------------------------------------------------------------------------

    def fork(self, session: str, target: str) -> None:
        """A copy of a session under another name; both go on by themselves.

        Raises:
            SessionNotFound, SessionExists: as they say.
        """
        self._wait(self.engine.ops.fork((TENANT, session), (TENANT, target), None))
        if session in self._said:
            self._said[target] = list(self._said[session])

    def delete(self, session: str) -> None:
        """Forget a session.

        Raises:
            SessionNotFound: there is none.
        """
        self._wait(self.engine.ops.delete((TENANT, session)))
        self._said.pop(session, None)

    def show(self, session: str) -> dict[str, Any]:
        """What a session holds, as ``GET /v1/sessions/NAME`` tells.

        Raises:
            SessionNotFound: there is none.
        """
        shown: dict[str, Any] = self._wait(self.engine.ops.show((TENANT, session)))
        return shown

    def banks(self, session: str) -> Banks:
        """A session's banks by layer, copied to host memory: keys [M, F], values [M, H], usage, stamps, counters.

        Raises:
            SessionNotFound: there is none.
            EngineError: this engine has no banks, or the session's gave way to others'.
        """
        held = self.engine.sessions.get((TENANT, session))
        if held is None:
            raise SessionNotFound(f"there is no session {session!r}")
        if self.engine.pool is None or not self.engine.config.pa:
            raise EngineError("this engine has no banks (pa=False)")
        if held.host is not None:
            return copy_banks(held.host.banks)
        if held.row is None:
            raise EngineError(f"the banks of session {session!r} gave way to others'; ask it something, or give more "
                              "pa_memory")  # fmt: skip
        return copy_banks({layer: bank for layer, bank in self.engine.pool.banks(held.row).items() if layer >= 0})

    def frame(self, session: str) -> DataFrame:
        """A session's banks slot by slot: layer, slot, uses, stamp, norms of key and value.

        Raises:
            as :meth:`banks`; EngineError where pandas is missing.
        """
        return slots_frame(self.banks(session))

    def reads(self, session: str) -> DataFrame:
        """What a session's tokens did to its banks: a row for each layer, a column for each counter.

        Raises:
            as :meth:`frame`.
        """
        return counters_frame(self.banks(session))

    def close(self) -> None:
        """Write sessions out where there is a directory, and let everything go."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- within --------------------------------------------------------------------------------------------

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)

    def _chat(
        self,
        messages: str | Sequence[Message],
        sampling: SamplingParams | None,
        sampled: dict[str, Any],
        session: str | None,
        *,
        append: bool,
        **how: Any,
    ) -> tuple[list[Message], GenerationRequest]:
        new: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if append and session is None:
            raise RequestError("there is no session to append to; name one", param="session")
        said = [*self._said.get(session or "", ()), *new] if append else new
        rendered = self.tokenizer.render([dict(message) for message in said])
        ids, last = self.tokenizer.encode(rendered), said[-1].get("content")
        question = question_of(last, rendered, self.tokenizer.encode_behind) if isinstance(last, str) else None
        return said, self._request(ids, sampling, sampled, session, outline=Outline(question=question), **how)

    def _request(
        self,
        ids: list[int],
        sampling: SamplingParams | None,
        sampled: dict[str, Any],
        session: str | None,
        **how: Any,
    ) -> GenerationRequest:
        key = None if session is None else (TENANT, session)
        sampling = dataclasses.replace(sampling or SamplingParams(), **sampled)
        return GenerationRequest(str(next(self._names)), ids, sampling, session=key, tenant=TENANT, **how)

    def _note(self, request: GenerationRequest, said: list[Message] | None, answer: Completion) -> None:
        """What the session's next message follows."""
        if request.session is None or not request.commit or said is None:
            return
        ends = [] if request.sampling.max_tokens == 0 else [{"role": "assistant", "content": answer.text}]
        self._said[request.session[1]] = [*said, *ends]

    def _run(self, requests: list[GenerationRequest]) -> list[list[Event]]:
        """All events of each, once all have ended."""
        events: dict[str, list[Event]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        left = set(events)
        while left:
            for name, event in self.engine.step():
                if name in events:
                    events[name].append(event)
                if isinstance(event, Finished | Failed):
                    left.discard(name)
        return list(events.values())

    def _events(self, request: GenerationRequest) -> Generator[Event]:
        """Events of one request as they come; it ends with whoever reads them."""
        self.engine.add(request)
        is_over = False
        try:
            while not is_over:
                for name, event in self.engine.step():
                    if name == request.request_id:
                        is_over = isinstance(event, Finished | Failed)
                        yield event
        finally:
            if not is_over:
                self.engine.abort(request.request_id)

    def _wait(self, operation: Any) -> Any:
        future: Future[Any] = self.engine.call(operation)
        while not future.done():
            self.engine.step()
        return future.result()


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, as text or ids, is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [one for one in prompts if isinstance(one, int)]
    return [ids] if ids else [one for one in prompts if not isinstance(one, int)]
