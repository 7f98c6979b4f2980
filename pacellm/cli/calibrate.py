"""``pacellm calibrate``: measure what acting banks and working sets do to a model, and write it beside the model."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pacellm import __version__
from pacellm.calibration.file import (
    ACTING,
    BankSection,
    Calibration,
    Effect,
    Effects,
    ModelSection,
    Perplexity,
    TextSection,
    beside,
    check_writable,
    text,
)
from pacellm.calibration.gate import FLAG, LIMIT
from pacellm.config import PAConfig, default_pa_layers
from pacellm.errors import ConfigError

Layers = tuple[int, ...]


def add_calibrate(parser: argparse.ArgumentParser, types: Mapping[str, Callable[[str], Any]]) -> None:
    """The flags of ``pacellm calibrate``.

    Args:
        types: how serve reads ``layers`` and an ``object``, and finds a ``device``.
    """
    bank, add = PAConfig(), parser.add_argument
    add("model", nargs="?", help="as for serve (default: the bundled model)")
    add("-o", "--output", type=Path, help="the file (default: pacellm-calibration.json beside the model)")
    add("--pa-layers", type=types["layers"], action="append", default=[], help="layers to measure together, as 1,3, "
        "beside those that serve takes without this flag, and with auto; repeatable")  # fmt: skip
    add("--pa-bank-size", type=int, default=bank.bank_size, help="slots of a bank")
    add("--pa-segment", type=int, default=bank.segment, help="prompt tokens that read the bank as one")
    add("--text", type=Path, help="what to measure on, UTF-8; the first 4,096 tokens of it (default: prose, notes and "
        "code in English, 3,800 tokens)")  # fmt: skip
    add("--ce-layout", type=Path, help="measure densities with these Cortical Experts, from `pacellm cluster`")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--rope-scaling", type=types["object"], help="as it will be served")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors; only from people you trust")
    add("--again", action="store_true", help="measure what the file holds already, too")
    add("--plot", type=Path, metavar="FILE", help="draw the layers' ratios (PNG)")
    parser.set_defaults(run=calibrate, find_device=types["device"])


def calibrate(options: argparse.Namespace) -> int:
    """Measure a model and write its calibration."""
    from pacellm.demo import MODEL_PATH
    from pacellm.experts.layout import Layout
    from pacellm.gguf.check import check_gguf
    from pacellm.model.checkpoint import check_directory
    from pacellm.real_models import resolve

    path = resolve(options.model) if options.model else MODEL_PATH
    if check_gguf(path) is None:
        check_directory(path, allow_pickle=options.allow_pickle)
    output = options.output or beside(path)
    if output is None:
        raise ConfigError(f"{path} is a name on a hub; say where the calibration goes: -o FILE", param="output")
    check_writable(output)
    if options.plot is not None:
        from pacellm.calibration.draw import check_drawing

        check_drawing()
    layout = None if options.ce_layout is None else Layout.load(options.ce_layout)
    started = time.monotonic()
    found = _measure(options, path, output, layout)
    found.save(output)
    print("\n".join(table(found)))
    print(f"{output}: {time.monotonic() - started:.0f} s")
    if options.plot is not None:
        from pacellm.calibration.draw import draw

        draw(found, options.plot)
        print(f"drawn: {options.plot}")
    return 0


def _measure(options: argparse.Namespace, path: Any, output: Path, layout: Any) -> Calibration:
    import torch

    from pacellm.calibration.perplexity import Meter
    from pacellm.calibration.run import MAX_TOKENS, PART, BankMeasurement, measure_experts, perplexity
    from pacellm.experts.apply import apply_layout
    from pacellm.experts.forward import check_density
    from pacellm.model.fingerprint import model_sample
    from pacellm.model.load import load
    from pacellm.text.tokenizer import ChatTokenizer

    torch.set_grad_enabled(False)
    source, written = _text(options)
    ids = ChatTokenizer(path).encode(written, add_special_tokens=True)
    device, pickles = options.find_device(options.device), options.allow_pickle
    model = load(path, dtype=options.dtype, device=device, rope_scaling=options.rope_scaling, allow_pickle=pickles)
    ids = ids[: min(MAX_TOKENS, model.context_length)]
    if layout is not None:
        check_density(0.5, model.module, layout, "ce_layout")
    name = "pacellm-demo" if options.model is None else Path(path).name
    about = ModelSection(name=name, fingerprint=model_sample(model.module), dtype=str(model.dtype).split(".")[1])
    digest = hashlib.sha256(written.encode()).hexdigest()
    told = TextSection(name=source, digest=digest, tokens=len(ids), part=min(PART, len(ids)))
    bank = PAConfig(bank_size=options.pa_bank_size, segment=options.pa_segment)
    before = _before(output, about, again=options.again)
    same = [one for one in before if (one.model.dtype, one.text) == (about.dtype, told) and not options.again]
    able = tuple(range(model.num_layers)) if model.patchable_layers is None else model.patchable_layers
    sets = [default_pa_layers(model.num_layers, able)] if able else []
    sets += [_checked(layers, able) for layers in options.pa_layers]

    progress = Progress()
    meter = Meter(model, ids, bank.segment, progress.add)
    progress.expect(meter.plain_cost())
    progress.begin(f"{name}: {len(ids):,} tokens")
    known = next((one.banks for one in reversed(same) if one.is_for(bank)), None)
    made = f"pacellm {__version__}, torch {torch.__version__}, {date.today().isoformat()}"
    work = BankMeasurement(
        meter, bank, able, known, begin=progress.begin, keep=lambda section: keep(section).save(_parts(output))
    )
    progress.expect(work.cost(sets) + (meter.densities_cost(2) if layout is not None else 0))
    meter.read_plain()
    extra = (before[0].model_extra or {}) if before else {}
    plain = perplexity(meter.plain())
    check_known(plain, model.vocab_size)

    def keep(section: BankSection) -> Calibration:
        return Calibration(made=made, model=about, text=told, plain=plain, banks=section, **extra)

    found = keep(work.run(sets)) if able else Calibration(made=made, model=about, text=told, plain=plain, **extra)
    experts = next((one.experts for one in same), None)
    if layout is not None and (experts is None or experts.layout != layout.digest):
        experts = measure_experts(meter, apply_layout(model, layout), progress.begin)
    progress.end()
    _parts(output).unlink(missing_ok=True)
    return found.model_copy(update={"experts": experts})


def _text(options: argparse.Namespace) -> tuple[str, str]:
    """What a text is called, and the text."""
    if options.text is not None:
        try:
            return options.text.name, options.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{options.text} cannot be read as text: {error}", param="text") from None
    if options.model is None:
        from pacellm.demo.known_text import known_text

        return "the bundled model's", known_text()
    return "built in", text()


def check_known(plain: Perplexity, vocab_size: int) -> None:
    """Refuse a text that a model cannot predict: there is nothing in it that could get worse.

    Raises:
        ConfigError: the model knows less than half of the text, in nats.
    """
    mean = math.sqrt(plain.prompt * plain.decoded)
    if not mean <= math.sqrt(vocab_size):
        raise ConfigError(
            f"the model does not know this kind of text (perplexity {mean:.4g} of {vocab_size:,} tokens), so nothing "
            "can be measured on it; name one that it knows: --text FILE",
            param="text",
        )


def _parts(output: Path) -> Path:
    """Where a run that is stopped leaves what it has."""
    return output.with_name(output.name + ".part")


def _before(output: Path, about: ModelSection, *, again: bool) -> list[Calibration]:
    """What the file holds of this model, and what a stopped run left."""
    found = []
    for path in (output, _parts(output)):
        try:
            one = Calibration.load(path) if path.exists() else None
        except ConfigError:
            if not again:
                raise
            one = None
        if one is not None and one.model.fingerprint == about.fingerprint:
            found.append(one)
    return found


def _checked(layers: Layers, able: Layers) -> Layers:
    for layer in layers:
        if layer not in able:
            raise ConfigError(
                f"pa_layers names layer {layer}; layers that can have a bank: {', '.join(map(str, able)) or 'none'}",
                param="pa_layers",
            )
    return tuple(sorted(set(layers)))


class Progress:
    """A line about what is being measured and how long the rest will take, on stderr."""

    def __init__(self) -> None:
        self._total = self._done = 0.0
        self._name = ""
        self._started = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def expect(self, work: float) -> None:
        """There is so much more to do."""
        self._total += work

    def begin(self, name: str) -> None:
        """What follows is about ``name``."""
        self._name = name
        self._show()

    def add(self, work: float) -> None:
        """So much of it was done."""
        self._done += work
        if self._is_terminal and time.monotonic() - self._shown > 0.5:
            self._show()

    def end(self) -> None:
        """Everything was."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        self._shown = now = time.monotonic()
        line = self._name
        if self._done > 0:
            left = max(0.0, (now - self._started) / self._done * (self._total - self._done))
            line += f", {int(left) // 60}:{int(left) % 60:02d} left"
        print(f"\r\033[K{line}" if self._is_terminal else line, end="" if self._is_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip


def table(found: Calibration) -> Iterator[str]:
    """A calibration for people."""
    plain = found.plain
    yield (
        f"{found.model.name}: plain perplexity {plain.prompt:.4g} behind prompts' tokens, {plain.decoded:.4g} behind "
        f"decoded ones; ratios to these:"
    )
    if found.banks is not None:
        banks = found.banks
        yield f"banks of {banks.bank_size} slots, segments of {banks.segment}"
        yield f"{'layer':>7}" + "".join(f"  {preset + ' ' + form:>22}" for preset in ACTING for form in _FORMS)
        for layer in banks.alone(ACTING[0]):
            cells = (_cell(banks.alone(preset)[layer], form) for preset in ACTING for form in _FORMS)
            yield f"{layer:>7}" + "".join(f"  {cell:>22}" for cell in cells)
        for one in banks.sets:
            taken = " (auto)" if banks.auto.get(one.preset) == one.layers else ""
            yield f"{one.preset} in layers {','.join(map(str, one.layers))}{taken}: {_said(one.effects)}"
        for preset, layers in banks.auto.items():
            if not layers:
                yield f"{preset}: no harmless layer for --pa-layers auto"
    if found.experts is None:
        yield "densities: not measured (--ce-layout FILE)"
        return
    for density in found.experts.densities:
        yield f"density {density.density:g}, layout {found.experts.layout[:12]}: {_said(density.effects)}"


_FORMS = ("prompt", "decoded")


def _cell(effects: Effects, form: str) -> str:
    effect: Effect | None = getattr(effects, form)
    return "-" if effect is None else f"{effect.ratio:.4g} [{effect.low:.4g}, {effect.high:.4g}]"


def _said(effects: Effects) -> str:
    parts = [f"{form} {_cell(effects, form)}" for form in _FORMS if getattr(effects, form) is not None]
    verdict = "harmless" if effects.worst <= LIMIT else f"served only with {FLAG}"
    return f"{', '.join(parts)}: {verdict}"
