"""The flags of commands that talk to a server: ``pacellm chat`` and ``pacellm sessions``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_URL = "http://127.0.0.1:8000"


def add_chat(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm chat``."""
    add = parser.add_argument
    _add_server(parser)
    add("--model", help="the name to ask for (default: what is served)")
    add("--session", help="name of a conversation to begin or go on with (default: a new one)")
    add("--file", type=Path, help="a document to put in front of the first question, UTF-8 text")
    add("--temperature", type=float, default=0.2, help="of the answers (default: 0.2; small models ramble at 1)")
    parser.epilog = "Where input is not a terminal each line is a question, and stdout has the answers alone."
    parser.set_defaults(run=chat)


def add_sessions(parser: argparse.ArgumentParser) -> None:
    """The commands of ``pacellm sessions``, and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, about in (
        ("ls", "a line for each of the key's sessions, most recently used first"),
        ("show", "all that the server tells of sessions, as JSON"),
        ("rm", "delete sessions"),
    ):
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        _add_server(action)
        if name != "ls":
            action.add_argument("names", nargs="+", metavar="NAME")
        action.set_defaults(run=sessions)


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=os.environ.get("PACELLM_URL", _URL), help="of the server, or the variable "
                        f"PACELLM_URL (default: {_URL})")  # fmt: skip
    parser.add_argument("--api-key", help="default: the variable OPENAI_API_KEY")


def chat(options: argparse.Namespace) -> int:
    """Talk to a server in the terminal."""
    from pacellm.cli.terminal import talk

    return talk(options.url, _key(options), options.session, options.model, options.file, options.temperature)


def sessions(options: argparse.Namespace) -> int:
    """List, show or delete sessions."""
    from pacellm.cli.sessions import run

    return run(options.action, options.url, _key(options), getattr(options, "names", []))


def _key(options: argparse.Namespace) -> str | None:
    return options.api_key or os.environ.get("OPENAI_API_KEY")
