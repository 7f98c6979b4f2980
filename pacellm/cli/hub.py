"""Whether a hub is there, before its own clients try for a minute."""

from __future__ import annotations

from pathlib import Path

import httpx

from pacellm.errors import ModelError

_SECONDS = 5.0


def model_path(name: str | None) -> str | Path:
    """Where the model that a command names is, or its name on a hub that answers; the bundled model for None.

    Raises:
        PaceError: a model that cannot be fetched, or no hub.
    """
    from pacellm.demo import MODEL_PATH
    from pacellm.real_models import resolve

    path = resolve(name) if name else MODEL_PATH
    check_hub(path)
    return path


def check_hub(path: str | Path) -> None:
    """Ask the hub once, where ``path`` is a name there, of a model that was not fetched before.

    Raises:
        ModelError: it does not answer.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    from pacellm.model.checkpoint import is_hub_name

    if not is_hub_name(path) or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(str(path), "config.json"), str):
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=_SECONDS)
    except httpx.TransportError as error:
        raise ModelError(
            f"{path} is no directory here, and {constants.ENDPOINT} is not reached ({str(error) or 'no answer'}); give "
            "a checkpoint's directory, or a name when there is a network"
        ) from error
