"""How the banks of one turn take part: by which preset, and whether they change."""

from __future__ import annotations

from typing import Literal, get_args

from pacellm.config import PRESETS, Preset

PAMode = Literal["off", "observe", "reference", "paper", "observe_read_only", "reference_read_only", "paper_read_only"]
"""What a turn is computed by, and its log records. ``…_read_only``: banks are read and not written."""
PAChoice = Literal[
    "on", "read_only",
    "off", "observe", "reference", "paper", "observe_read_only", "reference_read_only", "paper_read_only",
]  # fmt: skip
"""What a request may ask for: ``on`` and ``read_only`` are by the engine's own preset."""
MODES: tuple[PAMode, ...] = get_args(PAMode)
_READ_ONLY = "_read_only"


def resolve(choice: PAChoice, preset: Preset) -> PAMode:
    """The mode that a choice means where ``preset`` is the engine's."""
    if choice == "on":
        return preset
    return read_only(preset) if choice == "read_only" else choice


def read_only(preset: Preset) -> PAMode:
    """The mode that reads by a preset and writes nothing."""
    return MODES[MODES.index(preset) + len(PRESETS)]


def preset_of(mode: PAMode) -> Preset | None:
    """The preset of a mode; None where banks are left alone."""
    return None if mode == "off" else mode.removesuffix(_READ_ONLY)  # type: ignore[return-value]


def writes(mode: PAMode) -> bool:
    """Whether banks change."""
    return mode != "off" and not mode.endswith(_READ_ONLY)
