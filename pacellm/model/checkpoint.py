"""What lies in a checkpoint's directory, looked at before transformers does: what is missing or damaged is named."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from pacellm.errors import ModelError
from pacellm.model.families import family_of

_HUB_SECONDS = 5.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_HEADS = re.compile(r"For(Sequence|Token|Image)Classification|ForQuestionAnswering|ForMaskedLM|RewardModel")


def check_directory(path: str | Path, *, allow_pickle: bool) -> None:
    """Look at a local checkpoint; names on a hub are left to transformers.

    Raises:
        ModelError: it is missing, incomplete, damaged, of a family that is not served, or holds pickles that were not
            allowed; or it is a name on a hub that is not reached.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        if is_hub_name(path):
            _check_hub(str(path))
            return
        raise ModelError(f"{path} does not exist; give a checkpoint's directory, or a name on the hub as OWNER/NAME")
    if not directory.is_dir():
        raise ModelError(f"{path} is a file; give the directory that holds it, with its config.json")
    config = read_json(directory / "config.json")
    if not config.get("model_type"):
        raise ModelError(f"{directory / 'config.json'} names no model_type; it is not a checkpoint of transformers")
    if "auto_map" not in config:  # code of its own is refused as such
        family_of(str(config["model_type"]))
    files = sorted(directory.glob("*.safetensors"))
    if not files and not allow_pickle:
        raise _no_weights(directory)
    for file in files:
        _check_weights(file)
    _check_index(directory, {file.name for file in files})


def is_hub_name(path: str | Path) -> bool:
    """It could be a model's name on a hub: nothing of the name lies here, and it has such a form."""
    is_file = str(path).endswith((".gguf", ".safetensors")) or Path(path).expanduser().exists()
    return not is_file and _HUB_NAME.fullmatch(str(path)) is not None


def _check_hub(name: str) -> None:
    """Knock at a hub once, unless the model is in its cache or a proxy lies between: its own client tries for a
    minute."""
    if constants.HF_HUB_OFFLINE or getproxies() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), _HUB_SECONDS
        ).close()
    except OSError as error:
        raise ModelError(
            f"{name} is no directory here, and {constants.ENDPOINT} is not reached ({error}); give a checkpoint's "
            "directory, or a name when there is a network"
        ) from error


def _no_weights(directory: Path) -> ModelError:
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        return ModelError(
            f"{directory} holds its weights as pickles, which can run code when they are read; convert them to "
            f"safetensors (save_pretrained of transformers does), or pass --allow-pickle if you trust them"
        )
    return ModelError(f"{directory} holds no weights (*.safetensors); it may be downloaded in part")


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or cut short ({error}); download it again") from error


def _check_index(directory: Path, names: set[str]) -> None:
    """Every file that the index names is there."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        wanted = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(wanted - names):
            raise ModelError(f"{directory} lacks {missing[0]}, which {index.name} names; it may be downloaded in part")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: there is none, or it is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} has no {file.name}; it is not a checkpoint's directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a JSON object")
    return found


def check_head(config: PreTrainedConfig) -> None:
    """Refuse checkpoints that were made for another task.

    Raises:
        ModelError: names the architecture.
    """
    for name in getattr(config, "architectures", None) or ():
        if _OTHER_HEADS.search(name):
            raise ModelError(f"the checkpoint is a {name}, which writes no text; a causal language model is needed")


def check_loaded(path: str | Path, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers has filled in some weights at random.

    Args:
        info: the loading info of ``from_pretrained``.

    Raises:
        ModelError: names the first weights.
    """
    for key, what in (("mismatched_keys", "of another shape than its config says"), ("missing_keys", "missing")):
        names = sorted(str(name[0] if isinstance(name, tuple | list) else name) for name in info.get(key) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"weights of {path} are {what}: {', '.join(names[:3])}{more}")
    if info.get("error_msgs"):
        raise ModelError(f"weights of {path} cannot be loaded: {'; '.join(map(str, info['error_msgs'][:3]))}")
