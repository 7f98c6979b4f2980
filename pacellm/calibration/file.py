"""The calibration file: JSON, checked when it is read. Sections that this version does not know are kept."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pacellm.config import PAConfig
from pacellm.errors import ConfigError

NAME = "pacellm-calibration.json"
"""The file's name beside a model."""
VERSION = 1
Acting = Literal["reference", "paper"]
ACTING: tuple[Acting, ...] = ("reference", "paper")
"""Presets that change answers."""
HARMLESS = 1.01
"""A layer whose own ratio is not above this is taken by ``--pa-layers auto``."""
WORST = 1e9
"""What a ratio is written as that is larger, or no number."""

KINDS = ("own", "other")
"""Questions in the words of what they are about, and in others."""
RETRIEVES = 0.25
"""Share of questions from which on an index is used; one that guesses finds about 0.04."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Layer = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(ge=0, le=WORST)]
Share = Annotated[float, Field(ge=0, le=1)]


def pack(numbers: np.ndarray) -> str:
    """Numbers as text: float32, little endian, base64."""
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """[n] float32 of :func:`pack`.

    Raises:
        ValueError: it is not that, or not all of it is finite.
    """
    return _unpacked(text, "<f4")


def pack_halves(numbers: np.ndarray) -> str:
    """Numbers as text: float16, little endian, base64."""
    return base64.b64encode(numbers.astype("<f2").tobytes()).decode()


def unpack_halves(text: str) -> np.ndarray:
    """[n] float32 of :func:`pack_halves`.

    Raises:
        ValueError: as of :func:`unpack`.
    """
    return _unpacked(text, "<f2")


def _unpacked(text: str, kind: str) -> np.ndarray:
    try:
        found = np.frombuffer(base64.b64decode(text, validate=True), kind)
    except (binascii.Error, ValueError):
        raise ValueError("not numbers in base64") from None
    if not len(found) or not np.isfinite(found).all():
        raise ValueError("no numbers, or some that are not finite")
    return found.astype(np.float32)


def pack_bytes(numbers: np.ndarray) -> str:
    """Bytes as text: base64."""
    return base64.b64encode(numbers.tobytes()).decode()


def unpack_bytes(text: str) -> np.ndarray:
    """[n] uint8 of :func:`pack_bytes`.

    Raises:
        ValueError: it is not that.
    """
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None


def _packed(text: str) -> str:
    unpack(text)
    return text


def _packed_halves(text: str) -> str:
    unpack_halves(text)
    return text


def _packed_bytes(text: str) -> str:
    unpack_bytes(text)
    return text


Numbers = Annotated[str, AfterValidator(_packed)]
Halves = Annotated[str, AfterValidator(_packed_halves)]
Bytes = Annotated[str, AfterValidator(_packed_bytes)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Effect(_Section):
    """Perplexity over the plain model's on the same ``tokens``, with a 95 % interval."""

    ratio: Factor
    low: Factor
    high: Factor
    tokens: Annotated[int, Field(ge=1)]


class Effects(_Section):
    """What a form does behind a prompt's tokens, None where it leaves them alone, and behind decoded ones."""

    prompt: Effect | None
    decoded: Effect

    @property
    def worst(self) -> float:
        """The ratio that counts."""
        return max(one.ratio for one in (self.prompt, self.decoded) if one is not None)


class Perplexity(_Section):
    """The plain model's."""

    prompt: float
    decoded: float


class BankSet(_Section):
    """Layers whose banks act together."""

    preset: Acting
    layers: list[Layer]
    effects: Effects


class BankSection(_Section):
    """Banks of one size and segment.

    Attributes:
        layers: by preset and layer, each alone, on a part of the text.
        sets: on all of the text.
        auto: by preset the layers that ``--pa-layers auto`` takes; they are among ``sets`` unless there are none.
    """

    bank_size: Annotated[int, Field(ge=1)]
    segment: Annotated[int, Field(ge=1)]
    layers: dict[Acting, dict[str, Effects]]
    sets: list[BankSet]
    auto: dict[Acting, list[Layer]]

    def of(self, preset: str, layers: Iterable[int]) -> Effects | None:
        """What banks in ``layers`` do together; None where that was not measured."""
        wanted = sorted(layers)
        found = next((one for one in self.sets if one.preset == preset and one.layers == wanted), None)
        if found is not None:
            return found.effects
        return self.alone(preset).get(str(wanted[0])) if len(wanted) == 1 else None

    def alone(self, preset: str) -> dict[str, Effects]:
        """By layer what its bank does alone, as far as that was measured."""
        return next((found for name, found in self.layers.items() if name == preset), {})


class Density(_Section):
    """Decoded tokens that use a part of their experts."""

    density: Annotated[float, Field(gt=0, lt=1)]
    effects: Effects


class ExpertSection(_Section):
    """Working sets of one layout, named by its digest."""

    layout: Digest
    densities: list[Density]

    def of(self, density: float) -> Density | None:
        """The nearest measured density that is not above ``density``: fewer experts do no less harm."""
        return max((one for one in self.densities if one.density <= density), key=lambda one: one.density, default=None)


class Shares(_Section):
    """Of questions in a fact's own words, and in others: those for which an index gives its block most votes."""

    own: Share
    other: Share

    @property
    def both(self) -> float:
        """Of all."""
        return (self.own + self.other) / 2


class AttentionSection(_Section):
    """Votes by attention.

    Attributes:
        layers: those that vote together.
        found: by these, on other facts than they were chosen by.
        alone: by layer, on those that they were chosen by.
        nulls: by layer the queries [H, n, D] of the null questions' n tokens, turned to position 0, packed as halves;
            none where votes are as good without them.
    """

    layers: Annotated[list[Layer], Field(min_length=1)]
    found: Shares
    alone: dict[str, Shares]
    nulls: dict[str, Halves] = {}


class ActivitySection(_Section):
    """Votes by activity codes.

    Attributes:
        layer: whose FFN.
        bits, seed: of a code, and of the numbers that make it.
        mean, deviation: of the FFN's neurons over the text, in their original order, packed.
        found, alone: as of attention.
        nulls: codes of the null questions' tokens, base64; empty where votes are as good without them.
    """

    layer: Layer
    bits: Annotated[int, Field(ge=64, multiple_of=64)]
    seed: Annotated[int, Field(ge=0)]
    mean: Numbers
    deviation: Numbers
    found: Shares
    alone: dict[str, Shares]
    nulls: Bytes = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        deviation = unpack(self.deviation)
        if len(deviation) != len(unpack(self.mean)) or not (deviation > 0).all():
            raise ValueError("deviations are not one positive number for each mean")
        return self


class RetrievalSection(_Section):
    """What finds facts in a text again.

    Attributes:
        facts: of a prompt, each in a block of its own.
        lexical: by words alone.
        attention, activity: None where the model has no such layers.
        nulls: tokens of each null question; none in files of before votes were compared with theirs.
    """

    facts: Annotated[int, Field(ge=1)]
    lexical: Shares
    attention: AttentionSection | None
    activity: ActivitySection | None
    nulls: list[Annotated[int, Field(ge=1)]] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens, sections = sum(self.nulls), (self.attention, self.activity)
        sizes = [len(unpack_halves(one)) for one in (self.attention.nulls.values() if self.attention else ())]
        if self.activity is not None:
            sizes.append(8 * len(unpack_bytes(self.activity.nulls)))
        if tokens and any(size % tokens for size in sizes):
            raise ValueError("nulls are not of so many tokens")
        if not tokens and any(one.nulls for one in sections if one is not None):
            raise ValueError("nulls without their lengths")
        return self


class ModelSection(_Section):
    """Which model was measured, and in which number format."""

    name: str
    fingerprint: Digest
    dtype: str


class TextSection(_Section):
    """The text's name and digest, its tokens, and those of the part that single layers were measured on."""

    name: str
    digest: Digest
    tokens: Annotated[int, Field(ge=1)]
    part: Annotated[int, Field(ge=1)]


class Calibration(BaseModel):
    """A calibration file. What other versions add beside these sections lies in ``model_extra``."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format: Literal["pacellm-calibration"] = "pacellm-calibration"
    version: Literal[1] = 1
    made: str
    model: ModelSection
    text: TextSection
    plain: Perplexity
    banks: BankSection | None = None
    experts: ExpertSection | None = None
    retrieval: RetrievalSection | None = None

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check a file.

        Raises:
            ConfigError: missing, damaged, of another version, or no calibration; names the file and what is wrong.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _bad(path, f"cannot be read ({error})") from None
        if not isinstance(found, dict) or found.get("format") != "pacellm-calibration":
            raise _bad(path, "is not a calibration file")
        if found.get("version") != VERSION:
            raise _bad(path, f"is of version {found.get('version')!r}, and this is for version {VERSION}")
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise _bad(path, f"is damaged: {place}: {first['msg']}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise _unwritable(path, error) from None

    def is_for(self, bank: PAConfig) -> bool:
        """Its banks are such."""
        return self.banks is not None and (self.banks.bank_size, self.banks.segment) == (bank.bank_size, bank.segment)


def beside(model: str | Path) -> Path | None:
    """Where a model's calibration lies; None for a name on a hub, beside which nothing lies."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path / NAME
    return path.with_name(f"{path.name}.{NAME}") if path.is_file() else None


def check_writable(path: Path) -> None:
    """Refuse a place where no file can be made, before anything is measured.

    Raises:
        ConfigError: it is one.
    """
    if not os.access(path.parent, os.W_OK):
        raise _unwritable(path, "no such directory, or it is not writable")


def text() -> str:
    """What models are measured on; written for this, so no model has learned it."""
    return (files("pacellm.calibration") / "text.txt").read_text(encoding="utf-8")


def _unwritable(path: Path, problem: object) -> ConfigError:
    return ConfigError(
        f"the calibration cannot be written to {path} ({problem}); name another place with -o FILE", param="output"
    )


def _bad(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"calibration {path} {problem}; make it again with `pacellm calibrate MODEL --again`", param="calibration"
    )
