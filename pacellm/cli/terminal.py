"""``pacellm chat``: questions from the terminal, or from a pipe, and what comes back."""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pacellm.cli.chat import Answer, Conversation
from pacellm.cli.connection import connected
from pacellm.cli.documents import read_document
from pacellm.cli.lines import asker
from pacellm.cli.sessions import listed, table
from pacellm.errors import PaceError

if TYPE_CHECKING:
    import httpx

_HELP = {
    "/file": "PATH puts a document in front of the next question",
    "/sessions": "lists this key's sessions; `pacellm chat --session NAME` goes on with one",
    "/reset": "begins the conversation again",
    "/help": "says this",
    "/quit": "ends, as Ctrl-D does; Ctrl-C cancels an answer",
}
_BAR = 30


class Terminal:
    """Reads questions, shows answers.

    Args:
        conversation: goes on with each question.
        http: of the same server, for lists of sessions.
        source: lines come from it, where nobody asks.
        target: answers go to it.
        notes: all else goes to it.
        ask: gives a line that a user edits; EOFError and KeyboardInterrupt as ``input`` has them.
    """

    def __init__(
        self,
        conversation: Conversation,
        http: httpx.Client,
        source: TextIO = sys.stdin,
        target: TextIO = sys.stdout,
        notes: TextIO | None = None,
        ask: Callable[[], str] | None = None,
    ) -> None:
        self._conversation, self._http, self._ask = conversation, http, ask
        self._source, self._target, self._notes = source, target, target if notes is None else notes
        self._has_line = False  # a progress line stands there

    def run(self) -> int:
        """Talk until /quit or the end of the input; 1 where the last question got no answer."""
        self._note(f"session {self._conversation.session}; /help lists commands\n")
        status = 0
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            if line.strip() == "/quit":
                break
            status = self._attempt(line.strip())
        return status

    def _attempt(self, line: str) -> int:
        try:
            self._do(line)
        except PaceError as error:
            self._clear()
            self._note(f"({error.message})\n")
            return 1
        return 0

    def _do(self, line: str) -> None:
        """A command or a question; a question may begin with a slash, as a path does."""
        command, _, rest = line.partition(" ")
        if command == "/file":
            self._read_file(rest.strip())
        elif not line.startswith("/") or rest:
            self._answer(line)
        elif command == "/reset":
            self._conversation.reset()
            self._note("(begun again)\n")
        elif command == "/sessions":
            self._note("\n".join(table(listed(self._http))) + "\n")
        elif command == "/help":
            self._note("".join(f"  {name:10} {text}\n" for name, text in _HELP.items()))
        else:
            self._note(f"{command} is unknown; /help lists commands\n")

    def _read_file(self, name: str) -> None:
        if not name:
            raise PaceError("/file needs a path")
        document = read_document(Path(name))
        self._conversation.read(document)
        self._note(f"({len(document):,} characters go in front of the next question)\n")

    def _read(self) -> str | None:
        """The next line, None at the end; Ctrl-C drops a half-written one."""
        while True:
            try:
                return (self._source.readline() or None) if self._ask is None else self._ask()
            except EOFError:
                return None
            except KeyboardInterrupt:
                self._note("\n")

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
            self._say("\n")
            self._note("(cancelled; the session is as it was)\n")
            return
        finally:
            pieces.close()  # type: ignore[attr-defined]
        self._clear()
        self._say("\n")
        self._note(f"({_summary(answer, time.monotonic() - started)})\n")

    def _progress(self, progress: dict[str, Any]) -> None:
        """One line that is written over; nothing where nobody watches."""
        if self._ask is None:
            return
        self._has_line = True
        if (queue := progress.get("queue")) is not None:
            line = f"waiting, place {queue['position']} in the queue"
        else:
            line = _reading(progress, shutil.get_terminal_size().columns)
        self._note(f"\r\x1b[K{line}")

    def _clear(self) -> None:
        """Take the progress line away before text follows it."""
        if self._has_line:
            self._has_line = False
            self._note("\r\x1b[K")

    def _say(self, text: str) -> None:
        self._target.write(text)
        self._target.flush()

    def _note(self, text: str) -> None:
        self._notes.write(text)
        self._notes.flush()


def talk(
    url: str, key: str | None, session: str | None, model: str | None, file: Path | None, temperature: float
) -> int:
    """Run the client on this process's terminal or pipes.

    Args:
        url: of the server, with or without ``/v1``.
        key: API key; None sends none.
        session: the conversation's name; None makes one up.
        file: a document.
        temperature: of the answers.

    Raises:
        PaceError: an unreadable document, or no server.
    """
    document = None if file is None else read_document(file)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with connected(url, key) as http:
        name = session or f"chat-{uuid.uuid4().hex[:12]}"
        conversation = Conversation(http, name, model=model, document=document, temperature=temperature)
        notes = sys.stdout if sys.stdout.isatty() else sys.stderr
        return Terminal(conversation, http, notes=notes, ask=asker(tuple(_HELP)) if is_terminal else None).run()


def _reading(progress: dict[str, Any], columns: int) -> str:
    """How far a prompt has been read, in one line of a terminal that has so many columns."""
    done, total, left = progress["processed"], progress["total"], progress["estimated_ms"]
    rest = "" if left is None else f", {left / 1000:.0f} s left"
    text = f"{done:,} of {total:,} tokens{rest}"
    width = min(_BAR, columns - len(text) - 14)
    bar = f"[{'█' * (width * done // max(total, 1)):<{width}}] " if width >= 5 else ""
    return f"  reading {bar}{text}"[: max(1, columns - 1)]


def _summary(answer: Answer, seconds: float) -> str:
    cached, total = answer.usage["prompt_tokens_details"]["cached_tokens"], answer.usage["prompt_tokens"]
    cut = "; cut at its longest" if answer.is_cut else ""
    return f"session {answer.report['session']}, {cached:,} of {total:,} prompt tokens in place, {seconds:.1f} s{cut}"
