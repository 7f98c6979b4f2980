"""A conversation of ``pacellm chat``, kept by the server under a session's name.

Only what is new is sent, to be appended: the session has the history, KV and banks, also after a restart of a server
that keeps sessions on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from pacellm.cli.connection import message, send
from pacellm.errors import PaceError

TEMPERATURE = 0.2
"""Small models ramble at 1, the API's default."""


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
        document: put in front of the next question.
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
        """The request; a document that was not sent yet goes in front of the question."""
        is_new = self._document is not None and not self._has_read
        return {
            "messages": [{"role": "user", "content": f"{self._document}\n\n{question}" if is_new else question}],
            "session_id": self.session,
            "pacellm": {"append": self._is_there},
            "temperature": self._temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            **({} if self._model is None else {"model": self._model}),
        }

    def read(self, document: str) -> None:
        """Put a document in front of the next question."""
        self._document, self._has_read = document, False

    def reset(self) -> None:
        """Begin again; the document goes in front of the next question.

        Raises:
            PaceError: the server cannot.
        """
        response = send(self._http, "POST", f"/v1/sessions/{self.session}/reset", 404)
        self._has_read, self._is_there = False, response.status_code == 200

    def _look(self) -> bool:
        """The session is there."""
        return send(self._http, "GET", f"/v1/sessions/{self.session}", 404).status_code == 200

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise PaceError(message(response))
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield json.loads(line[6:])
        except httpx.HTTPError as error:
            raise PaceError(f"no answer from the server: {error}") from error
