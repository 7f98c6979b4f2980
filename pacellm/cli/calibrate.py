"""``pacellm calibrate``: measure what acting banks and working sets do to a model, and write it beside the model."""

from __future__ import annotations

import argparse
from pathlib import Path

from pacellm.cli import values
from pacellm.config import PAConfig


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm calibrate``."""
    bank, add = PAConfig(), parser.add_argument
    add("model", nargs="?", help="as for serve (default: the bundled model)")
    add("-o", "--output", type=Path, help="the file (default: pacellm-calibration.json beside the model)")
    add("--pa-layers", type=values.layers, action="append", default=[], help="layers to measure together, as 1,3, "
        "beside those that serve takes without this flag, and with auto; repeatable")  # fmt: skip
    add("--pa-bank-size", type=int, default=bank.bank_size, help="slots of a bank")
    add("--pa-segment", type=int, default=bank.segment, help="prompt tokens that read the bank as one")
    add("--text", type=Path, help="what to measure on, UTF-8; the first 4,096 tokens of it (default: prose, notes and "
        "code in English, 3,800 tokens)")  # fmt: skip
    add("--ce-layout", type=Path, help="measure densities with these Cortical Experts, from `pacellm cluster`")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--rope-scaling", type=values.json_object, help="as it will be served")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors; only from people you trust")
    add("--again", action="store_true", help="measure what the file holds already, too")
    add("--plot", type=Path, metavar="FILE", help="draw the layers' ratios (PNG)")
    parser.set_defaults(run=calibrate)


def calibrate(options: argparse.Namespace) -> int:
    """Measure a model and write its calibration."""
    from pacellm.cli import measure

    return measure.calibrate(options)
