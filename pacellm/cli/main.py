"""The command line: which commands there are. What a command needs is imported when it is named."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from pacellm import __version__
from pacellm.cli.parser import CommandParser
from pacellm.errors import PaceError

_COMMANDS = (
    ("serve", "pacellm.cli.serve_flags", "add_serve", "serve a model over OpenAI's API"),
    ("chat", "pacellm.cli.clients", "add_chat", "talk to a server in the terminal"),
    ("sessions", "pacellm.cli.clients", "add_sessions", "list, show and remove a server's sessions"),
    ("demo", "pacellm.cli.models", "add_demo", "ask the bundled model about a long document, over HTTP"),
    ("fetch", "pacellm.cli.models", "add_fetch", "put a small real model into the user's cache"),
    ("convert", "pacellm.cli.models", "add_convert", "write a checkpoint's directory from a GGUF file"),
    ("eval", "pacellm.cli.eval", "add_eval", "ask a server published long-context suites, under several arms"),
    ("calibrate", "pacellm.cli.calibrate", "add_calibrate",
     "measure what acting banks and fewer experts do to a model's answers"),
    ("cluster", "pacellm.cli.cluster", "add_cluster", "put a model's FFN neurons into experts: a layout file"),
    ("experts", "pacellm.cli.cluster", "add_experts", "draw which experts fire over a document"),
    ("completion", "pacellm.cli.completion", "add_completion", "print what lets a shell complete commands and flags"),
)  # fmt: skip
"""Each with the function that adds its flags to a parser, and where that is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = new_parser(given[:1])
    if not given:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(given)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read what was printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 1
    except PaceError as error:
        print(f"pacellm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve_options(flags: Sequence[str]) -> argparse.Namespace:
    """The options of ``pacellm serve`` with these flags; what is wrong goes to stderr and ends with SystemExit."""
    return new_parser(["serve"]).parse_args(["serve", *flags])


def new_parser(named: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Of all commands, and the flags of those that are named (None: of all)."""
    parser = CommandParser(
        prog="pacellm", description="Long-context inference with working memory.",
        epilog="`pacellm COMMAND --help` lists a command's flags.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"pacellm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module, add, about in _COMMANDS:
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        if named is None or name in named:
            getattr(importlib.import_module(module), add)(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
