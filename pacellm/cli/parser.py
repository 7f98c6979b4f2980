"""The parser of a command: help that shows defaults, and for ``serve`` values from a file and the environment."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

_METAVARS = {"int": "N", "float": "X", "size": "SIZE", "document_size": "N", "at_least_one": "N", "port": "PORT",
             "seconds": "SECONDS", "Path": "FILE", "layers": "LAYERS", "layers_or_auto": "LAYERS",
             "json_object": "JSON"}  # fmt: skip
_UNITS = ((2**40, "T"), (2**30, "G"), (2**20, "M"))


class Help(argparse.HelpFormatter):
    """Shows the default of each flag that has one and does not speak of it."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **options})

    def add_argument(self, action: argparse.Action) -> None:
        """As argparse's, which forgets that commands stand further in than flags."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(getattr(action.type, "__name__", ""), action.dest.rpartition("_")[2].upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        by_argparse = " (default: %(default)s)"  # Python 3.11 and 3.12 put it there for --no-…
        text = (action.help or "").replace(by_argparse, "")
        has_none = action.default in (None, argparse.SUPPRESS) or action.default is False or action.default == []
        if "default: " in text or has_none or not action.option_strings:
            return text
        return f"{text} (default: {shown(action.default)})"


class CommandParser(argparse.ArgumentParser):
    """A command's flags.

    Attributes:
        has_sources: flags that are not given come from a file and the environment (:mod:`pacellm.cli.sources`).
    """

    has_sources = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and where all flags are."""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` lists what there is)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, and what is unknown ends the process here, where its command is known. None marks what no flag
        has given until the other sources have been asked."""
        if self.has_sources:
            from pacellm.cli import sources

            namespace = argparse.Namespace(**dict.fromkeys(sources.settings(self)))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest[0])
        return (sources.fill(self, found) if self.has_sources else found), rest

    def _refuse(self, word: str) -> NoReturn:
        from difflib import get_close_matches

        near = get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
        self.error(f"{word} is unknown{f'; did you mean {near[0]}?' if near else ''}")


def shown(default: object) -> str:
    """A default as one would write it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int):
        size = next(((unit, name) for unit, name in _UNITS if default >= unit and default % unit == 0), None)
        return f"{default // size[0]}{size[1]}" if size is not None else str(default)
    if isinstance(default, float):
        return f"{default:.12g}"
    return str(default)
