"""``pacellm completion``: commands, flags, choices and files for a shell's TAB key."""

from __future__ import annotations

import argparse
from pathlib import Path

_SHELLS = ("bash", "zsh", "tcsh")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm completion``."""
    parser.add_argument("shell", choices=_SHELLS)
    parser.epilog = 'in bash: eval "$(pacellm completion bash)", or a line of that in ~/.bashrc'
    parser.set_defaults(run=completion)


def completion(options: argparse.Namespace) -> int:
    """Print the shell's script."""
    import shtab

    from pacellm.cli.main import new_parser

    parser = new_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, options.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.type is Path or action.dest in ("model", "session_dir"):
            action.complete = files  # type: ignore[attr-defined]
