"""Lines that a user edits in a terminal, with a history and TAB, by the standard library's readline."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_PROMPT = "> "
_KEPT = 1000  # lines of the history


def history_file() -> Path:
    """Where questions are kept from one run to the next: below ``XDG_STATE_HOME``, or ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "pacellm" / "chat_history"


def asker(commands: Sequence[str]) -> Callable[[], str]:
    """Asks for a line, as ``input`` does; a Python without readline has neither history nor TAB.

    Args:
        commands: that TAB completes; after ``/file`` it completes paths.
    """
    try:
        import readline
    except ImportError:
        return lambda: input(_PROMPT)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_completer_delims("\n")  # a line is completed as one word
    readline.set_completer(lambda line, number: (*completions(line, commands), None)[number])
    keep = _history()

    def ask() -> str:
        before = readline.get_current_history_length()
        line = input(_PROMPT)
        if readline.get_current_history_length() > before:
            keep()
        return line

    return ask


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """What the line could become."""
    command, space, start = line.partition(" ")
    if not space:
        return [one for one in commands if line and one.startswith(line)]
    if command != "/file":
        return []
    found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(start))}*"))
    return [f"{command} {path}{os.sep if os.path.isdir(path) else ''}" for path in found]


def _history() -> Callable[[], None]:
    """Read the history; returns what writes it after a line. Where it cannot be written, there is none."""
    import readline

    place = history_file()
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.touch(mode=0o600)
        readline.read_history_file(place)
    except OSError:
        return lambda: None
    readline.set_history_length(_KEPT)
    return lambda: readline.write_history_file(place)
