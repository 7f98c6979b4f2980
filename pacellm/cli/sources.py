"""Where the values of ``pacellm serve``'s flags come from: the flag, else the variable, the file, the default.

``--max-model-len`` is ``PACELLM_MAX_MODEL_LEN`` in the environment and ``max-model-len`` in the file; the model, which
has no flag, is ``PACELLM_MODEL`` and ``model``. A flag that can be repeated is a list in the file and has commas
between in the environment; one that takes no value is true or false. Whatever is unknown is refused by name.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PREFIX = "PACELLM_"
CONFIG = "config"
OTHER_VARIABLES = frozenset(("PACELLM_URL", "PACELLM_KEY", "PACELLM_BIND", "PACELLM_CHECK_DEPLOY"))
"""Of ``pacellm chat``, load_tests/, deploy/compose and the tests."""
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=|\w+_PORT=\w+://")
"""What Kubernetes sets in every pod beside a Service whose name begins with ours."""
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def settings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a source may hold: actions by the name of their attribute."""
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def key(action: argparse.Action) -> str:
    """A setting's name in a file."""
    return next((name[2:] for name in action.option_strings if name.startswith("--")), action.dest)


def variable(name: str) -> str:
    """A flag's or key's variable."""
    return PREFIX + name.lstrip("-").replace("-", "_").upper()


def fill(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> argparse.Namespace:
    """Give every setting that no flag has given its value from the environment, the file, or the default; what is wrong
    with one ends the process as a wrong flag does.

    Args:
        flags: None for what was not given.
    """
    by_key = {key(action): action for action in settings(parser).values()}
    environment = _environment(parser, by_key, os.environ)
    path = flags.config if flags.config is not None else environment.pop(CONFIG, None)
    file = {} if path is None else _file(parser, by_key, path)
    for action in by_key.values():
        if getattr(flags, action.dest) is None:
            found = environment.get(action.dest, file.get(action.dest))
            setattr(flags, action.dest, action.default if found is None else found)
    flags.config = path
    return flags


def _environment(
    parser: argparse.ArgumentParser, by_key: Mapping[str, argparse.Action], variables: Mapping[str, str]
) -> dict[str, Any]:
    known = {variable(name): action for name, action in by_key.items()}
    found = {}
    for name in sorted(variables):
        is_ours = name.startswith(PREFIX) and name not in OTHER_VARIABLES
        if not is_ours or _SERVICE_LINK.match(f"{name}={variables[name]}"):
            continue
        if name not in known:
            parser.error(f"the variable {name} is unknown{_nearest(name, known)}")
        action, text = known[name], variables[name]
        found[action.dest] = _value(parser, action, text.split(",") if _is_repeated(action) else text, name)
    return found


def _file(parser: argparse.ArgumentParser, by_key: Mapping[str, argparse.Action], path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--config: cannot read {path}: {error}")
    except yaml.YAMLError as error:
        parser.error(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
    if content is not None and not isinstance(content, dict):
        parser.error(f"--config: {path} must hold flags' names and their values, as 'port: 8000'")
    found = {}
    for name, value in (content or {}).items():
        if name not in by_key or name == CONFIG:
            parser.error(f"{path}: the key {name!r} is unknown{_nearest(str(name), by_key)}")
        found[by_key[name].dest] = _value(parser, by_key[name], value, f"{path}: {name}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else "; it takes the names of pacellm serve's flags"


def _is_repeated(action: argparse.Action) -> bool:
    return isinstance(action.default, list)


def _value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, origin: str) -> Any:
    """A value as the flag would read it."""
    if action.nargs == 0:
        word = _WORDS.get(str(value).lower())
        if word is None:
            parser.error(f"{origin} must be true or false, not {value!r}")
        return word
    if value is None:
        parser.error(f"{origin} has no value; give one, or leave it out")
    if _is_repeated(action):
        return [_one(parser, action, str(part), origin) for part in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict):
        value = json.dumps(value)
    elif isinstance(value, list):
        value = ",".join(map(str, value))
    return _one(parser, action, str(value), origin)


def _one(parser: argparse.ArgumentParser, action: argparse.Action, text: str, origin: str) -> Any:
    read: Any = action.type or str
    try:
        found = read(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"{origin}: {error}")
    except ValueError:
        parser.error(f"{origin}: {text!r} is not of type {read.__name__}")
    if action.choices is not None and found not in action.choices:
        parser.error(f"{origin}: {text!r} is none of {', '.join(map(str, action.choices))}")
    return found
