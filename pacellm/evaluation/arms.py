"""Arms: what a sample is asked under."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from pacellm.errors import ConfigError, PaceError
from pacellm.modes import MODES

BASELINE = "off"
"""The arm that others are compared with, where it is among them; else the first."""
_OWN = ("model", "messages", "prompt", "stream", "n")
KNOWN: dict[str, dict[str, Any]] = {
    **{mode: {"pacellm": {"pa": mode}} for mode in MODES},
    "working-memory": {"pacellm": {"pa": "off", "memory": "on"}},
    "memory-off": {"pacellm": {"pa": "off", "memory": "off"}},
}


@dataclass(frozen=True)
class Arm:
    """A name, and what it changes.

    Attributes:
        url: of its own server, without ``/v1``; None is the one that all share.
        model: the name to ask that server for; None finds it.
        api_key: for that server; without one it is sent none.
        fields: of its requests, beside those of all arms.
    """

    name: str
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def known_arm(name: str) -> Arm:
    """An arm of those with names.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in KNOWN:
        raise ConfigError(f"there is no arm {name!r}; there are {', '.join(KNOWN)}, and your own with "
                          '--arm NAME=URL or --arm NAME=\'{"field": …}\'', param="arms")  # fmt: skip
    return Arm(name, fields=KNOWN[name])


def own_arm(text: str) -> Arm:
    """From ``NAME=URL`` or ``NAME={…}``: fields of requests, among them ``base_url``, ``model`` and ``api_key`` of
    another server.

    Raises:
        ConfigError: it is neither.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise ConfigError(f"--arm is NAME=URL or NAME={{…}}, not {text!r}", param="arm")
    if value.startswith(("http://", "https://")):
        return Arm(name, url=root(value))
    try:
        fields = json.loads(value)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"--arm {name}: {value!r} is neither an http address nor a JSON object", param="arm")
    url, model, key = (fields.pop(own, None) for own in ("base_url", "model", "api_key"))
    if url is None and (model is not None or key is not None):
        raise ConfigError(f"--arm {name}: model and api_key go with base_url", param="arm")
    if taken := [one for one in _OWN if one in fields]:
        raise ConfigError(f"--arm {name}: {', '.join(taken)} cannot be changed by an arm", param="arm")
    return Arm(name, url=None if url is None else root(str(url)), model=model, api_key=key, fields=fields)


def check_names(arms: Sequence[Arm]) -> None:
    """Refuse no arms, and two of one name.

    Raises:
        ConfigError: so it is.
    """
    names = [arm.name for arm in arms]
    if not names:
        raise ConfigError("give at least one arm", param="arms")
    if len(set(names)) < len(names):
        raise ConfigError(f"two arms have one name: {', '.join(names)}", param="arms")


def baseline(arms: Sequence[str]) -> str:
    """Of these names, the one that others are compared with."""
    return BASELINE if BASELINE in arms else arms[0]


def root(url: str) -> str:
    """A server's address without ``/v1``."""
    return url.rstrip("/").removesuffix("/v1")


def served_model(http: httpx.Client, wanted: str | None) -> str:
    """The name to ask a server for: ``wanted``, or without that the only one there.

    Raises:
        ConfigError: ``wanted`` is not served, or several are.
        PaceError: the server does not list its models.
    """
    try:
        response = http.get("/v1/models")
        response.raise_for_status()
        names = [str(one["id"]) for one in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise PaceError(f"{http.base_url} does not list its models: {error}") from error
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        told = f"{http.base_url} serves {', '.join(names)}; say which with --model, or with model of its --arm"
        raise ConfigError(told, param="model")
    return str(wanted)


def is_pacellm(http: httpx.Client) -> bool:
    """The server takes the ``pacellm`` object."""
    try:
        response = http.get("/version")
        return response.status_code == 200 and "pa" in response.json()
    except (httpx.HTTPError, ValueError):
        return False
