"""``pacellm chat``: a conversation in the terminal, kept by the server under a session's name.

Only what is new is sent, to be appended: the session has the history, KV and banks, also after a restart of a server
that keeps sessions on disk.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx

from pacellm.errors import PaceError

TEMPERATURE = 0.2
"""Small models ramble at 1, the API's default."""
_HELP = "/reset begins again, /quit ends, Ctrl-C cancels an answer"


@dataclass
class Answer:
    """What came back.

    Attributes:
        report: the answer's ``pacellm`` object.
        usage: its token counts.
    """

    text: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    is_cut: bool = False


class Conversation:
    """One conversation on a server.

    Args:
        http: a client of the server.
        session: the conversation's name there.
        model: the name to ask for; None takes whatever is served.
        document: put in front of the first question.
        temperature: of the answers.
    """

    def __init__(
        self,
        http: httpx.Client,
        session: str,
        *,
        model: str | None = None,
        document: str | None = None,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.session = session
        self._http, self._model, self._document, self._temperature = http, model, document, temperature
        self._has_read = False  # the document was sent
        self._is_there = False  # the session has something to append to, or was emptied

    def ask(self, question: str, answer: Answer) -> Iterator[str | dict[str, Any]]:
        """The answer's text as it comes, and a dict for each piece of progress before it. Closing the iterator cancels
        the request: the conversation stays as it was.

        Args:
            answer: is filled meanwhile.

        Raises:
            PaceError: the server refuses or fails.
        """
        self._is_there = self._is_there or self._look()
        for chunk in self._chunks(self._body(question)):
            if "error" in chunk:
                raise PaceError(chunk["error"]["message"])
            if "prompt_progress" in chunk:
                yield chunk["prompt_progress"]
            for choice in chunk["choices"]:
                answer.is_cut = choice["finish_reason"] == "length"
                if text := choice["delta"].get("content"):
                    answer.text += text
                    yield text
            answer.report = chunk.get("pacellm") or answer.report
            answer.usage = chunk.get("usage") or answer.usage
        if not answer.usage:
            raise PaceError("the server closed the connection before the answer was complete")
        self._has_read = self._is_there = True

    def _body(self, question: str) -> dict[str, Any]:
        """The request; the document goes in front of the first question."""
        is_first = self._document is not None and not self._has_read
        return {
            "messages": [{"role": "user", "content": f"{self._document}\n\n{question}" if is_first else question}],
            "session_id": self.session,
            "pacellm": {"append": self._is_there},
            "temperature": self._temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            **({} if self._model is None else {"model": self._model}),
        }

    def reset(self) -> None:
        """Begin again; the document goes in front of the next question.

        Raises:
            PaceError: the server cannot.
        """
        try:
            response = self._http.post(f"/v1/sessions/{self.session}/reset")
        except httpx.HTTPError as error:
            raise PaceError(f"no answer from the server: {error}") from error
        if response.status_code not in (200, 404):
            raise PaceError(_message(response))
        self._has_read, self._is_there = False, response.status_code == 200

    def _look(self) -> bool:
        """The session is there."""
        try:
            response = self._http.get(f"/v1/sessions/{self.session}")
        except httpx.HTTPError as error:
            raise PaceError(f"no answer from the server: {error}") from error
        if response.status_code not in (200, 404):
            raise PaceError(_message(response))
        return response.status_code == 200

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise PaceError(_message(response))
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield json.loads(line[6:])
        except httpx.HTTPError as error:
            raise PaceError(f"no answer from the server: {error}") from error


class Terminal:
    """Reads questions, shows answers.

    Args:
        conversation: goes on with each question.
        source, target: where lines come from and go to.
    """

    def __init__(self, conversation: Conversation, source: TextIO = sys.stdin, target: TextIO = sys.stdout) -> None:
        self._conversation, self._source, self._target = conversation, source, target
        self._is_terminal = source.isatty() and target.isatty()
        self._has_line = False  # a progress line stands there

    def run(self) -> int:
        """Talk until /quit or the end of the input; 1 where the last question got no answer."""
        self._say(f"session {self._conversation.session}; {_HELP}\n")
        status = 0
        while (line := self._read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    break
                case "/reset":
                    status = self._attempt(self._reset)
                case command if command.startswith("/") and " " not in command:
                    self._say(f"{command} is unknown; {_HELP}\n")
                case question:
                    status = self._attempt(lambda question=question: self._answer(question))
        return status

    def _attempt(self, action: Any) -> int:
        try:
            action()
        except PaceError as error:
            self._clear()
            self._say(f"({error.message})\n")
            return 1
        return 0

    def _reset(self) -> None:
        self._conversation.reset()
        self._say("(begun again)\n")

    def _read(self) -> str | None:
        """The next line, None at the end; Ctrl-C drops a half-written one."""
        while True:
            try:
                if self._is_terminal:
                    return input("> ")
                line = self._source.readline()
                return line or None
            except EOFError:
                return None
            except KeyboardInterrupt:
                self._say("\n")

    def _answer(self, question: str) -> None:
        """Ask, and show what comes; Ctrl-C cancels the request and nothing else."""
        answer, started = Answer(), time.monotonic()
        pieces = self._conversation.ask(question.encode("utf-8", "replace").decode(), answer)
        try:
            for piece in pieces:
                if isinstance(piece, dict):
                    self._progress(piece)
                else:
                    self._clear()
                    self._say(piece)
        except KeyboardInterrupt:
            self._clear()
            self._say("\n(cancelled; the session is as it was)\n")
            return
        finally:
            pieces.close()  # type: ignore[attr-defined]
        self._clear()
        self._say(f"\n({_summary(answer, time.monotonic() - started)})\n")

    def _progress(self, progress: dict[str, Any]) -> None:
        """One line that is written over; nothing where nobody watches."""
        if not self._is_terminal:
            return
        self._has_line = True
        if (queue := progress.get("queue")) is not None:
            self._say(f"\r\x1b[K  waiting, place {queue['position']} in the queue")
            return
        done, total = progress["processed"], progress["total"]
        left = progress["estimated_ms"]
        rest = "" if left is None else f", {left / 1000:.0f} s left"
        bar = "█" * (30 * done // max(total, 1))
        self._say(f"\r\x1b[K  reading [{bar:<30}] {done:,} of {total:,} tokens{rest}")

    def _clear(self) -> None:
        """Take the progress line away before text follows it."""
        if self._has_line:
            self._has_line = False
            self._say("\r\x1b[K")

    def _say(self, text: str) -> None:
        self._target.write(text)
        self._target.flush()


def talk(
    url: str, key: str | None, session: str | None, model: str | None, file: Path | None, temperature: float
) -> int:
    """Run the client.

    Args:
        url: of the server, with or without ``/v1``.
        key: API key; None sends none.
        session: the conversation's name; None makes one up.
        file: a document, read as UTF-8.
        temperature: of the answers.

    Raises:
        PaceError: an unreadable document.
    """
    document = None
    if file is not None:
        try:
            document = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PaceError(f"cannot read {file}: {error}") from error
    headers = {} if not key else {"Authorization": f"Bearer {key}"}
    base = url.rstrip("/").removesuffix("/v1")
    # the server says that it lives every few seconds, however long a prompt takes
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(120.0, connect=10.0)) as http:
        name = session or f"chat-{uuid.uuid4().hex[:12]}"
        conversation = Conversation(http, name, model=model, document=document, temperature=temperature)
        return Terminal(conversation).run()


def _message(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"


def _summary(answer: Answer, seconds: float) -> str:
    cached, total = answer.usage["prompt_tokens_details"]["cached_tokens"], answer.usage["prompt_tokens"]
    cut = "; cut at its longest" if answer.is_cut else ""
    return f"session {answer.report['session']}, {cached:,} of {total:,} prompt tokens in place, {seconds:.1f} s{cut}"
