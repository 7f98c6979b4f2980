"""Whether a hub is there, before its own clients try for a minute."""

from __future__ import annotations

from pathlib import Path

import httpx

from pacellm.errors import ModelError

_SECONDS = 5.0


def check_hub(path: str | Path) -> None:
    """Ask the hub once, where ``path`` is no file or directory but a name of a model that was not fetched before.

    Raises:
        ModelError: it does not answer.
    """
    if Path(path).expanduser().exists():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(str(path), "config.json"), str):
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=_SECONDS)
    except httpx.TransportError as error:
        raise ModelError(
            f"{path} is no directory here, and {constants.ENDPOINT} is not reached ({str(error) or 'no answer'}); give "
            "a checkpoint's directory, or a name when there is a network"
        ) from error
