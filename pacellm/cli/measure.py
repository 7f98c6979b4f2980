"""What ``pacellm calibrate`` does: it measures, shows and writes."""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacellm import __version__
from pacellm.calibration.file import (
    ACTING,
    RETRIEVES,
    BankSection,
    Calibration,
    Effect,
    Effects,
    ExpertSection,
    ModelSection,
    Perplexity,
    RetrievalSection,
    Shares,
    TextSection,
    beside,
    check_writable,
    text,
)
from pacellm.calibration.gate import FLAG, LIMIT
from pacellm.cli.progress import Progress
from pacellm.config import PAConfig, default_pa_layers
from pacellm.errors import ConfigError

if TYPE_CHECKING:
    from pacellm.calibration.perplexity import Meter
    from pacellm.calibration.planted import Fact
    from pacellm.experts.layout import Layout
    from pacellm.model.load import LoadedModel

Layers = tuple[int, ...]


def calibrate(options: argparse.Namespace) -> int:
    """Measure a model and write its calibration."""
    from pacellm.demo import MODEL_PATH
    from pacellm.experts.layout import Layout
    from pacellm.gguf.check import check_gguf
    from pacellm.model.checkpoint import check_directory, is_hub_name
    from pacellm.real_models import resolve

    path = resolve(options.model) if options.model else MODEL_PATH
    if options.output is None and is_hub_name(path):
        raise ConfigError(f"{path} is a name on a hub; say where the calibration goes: -o FILE", param="output")
    if check_gguf(path) is None:
        check_directory(path, allow_pickle=options.allow_pickle)
    output = options.output or beside(path)
    assert output is not None
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


@dataclass(frozen=True)
class _Subject:
    """A model and what it is measured on.

    Attributes:
        ids: of the text, as many as are read.
        facts: that are planted in it. nulls: questions that none of them answers.
        about, text: how the file calls them.
    """

    model: LoadedModel
    ids: list[int]
    facts: list[Fact]
    nulls: list[list[int]]
    about: ModelSection
    text: TextSection


def _subject(options: argparse.Namespace, path: Any, layout: Layout | None) -> _Subject:
    from pacellm.calibration.planted import NULLS, facts_of
    from pacellm.calibration.run import MAX_TOKENS, PART
    from pacellm.experts.forward import check_density
    from pacellm.model.fingerprint import model_sample
    from pacellm.model.load import find_device, load
    from pacellm.text.tokenizer import ChatTokenizer

    source, written = _text(options)
    tokenizer = ChatTokenizer(path)
    ids = tokenizer.encode(written, add_special_tokens=True)
    facts = facts_of(_facts(options), tokenizer.encode)
    nulls = [tokenizer.encode(one) for one in NULLS]
    device, pickles = find_device(options.device), options.allow_pickle
    model = load(path, dtype=options.dtype, device=device, rope_scaling=options.rope_scaling, allow_pickle=pickles)
    ids = ids[: min(MAX_TOKENS, model.context_length)]
    if layout is not None:
        check_density(0.5, model.module, layout, "ce_layout")
    name = "pacellm-demo" if options.model is None else Path(path).name
    about = ModelSection(name=name, fingerprint=model_sample(model.module), dtype=str(model.dtype).split(".")[1])
    digest = hashlib.sha256(written.encode()).hexdigest()
    return _Subject(
        model,
        ids,
        facts,
        nulls,
        about,
        TextSection(name=source, digest=digest, tokens=len(ids), part=min(PART, len(ids))),
    )


def _measure(options: argparse.Namespace, path: Any, output: Path, layout: Layout | None) -> Calibration:
    import torch

    from pacellm.calibration.perplexity import Meter
    from pacellm.calibration.run import BankMeasurement, perplexity

    torch.set_grad_enabled(False)
    subject = _subject(options, path, layout)
    model, bank = subject.model, PAConfig(bank_size=options.pa_bank_size, segment=options.pa_segment)
    before = _before(output, subject.about, again=options.again)
    same = _of_the_same(before, subject) if not options.again else []
    able = tuple(range(model.num_layers)) if model.patchable_layers is None else model.patchable_layers
    sets = [default_pa_layers(model.num_layers, able)] if able else []
    sets += [_checked(layers, able) for layers in options.pa_layers]

    progress = Progress()
    meter = Meter(model, subject.ids, bank.segment, progress.add)
    progress.expect(meter.plain_cost())
    progress.begin(f"{subject.about.name}: {len(subject.ids):,} tokens")

    def keep(section: BankSection) -> None:
        made(section).save(_parts(output))

    work = BankMeasurement(meter, bank, able, _banks_of(same, bank), begin=progress.begin, keep=keep)
    progress.expect(work.cost(sets) + (meter.densities_cost(2) if layout is not None else 0))
    indexes = _Indexes(subject, next((one.retrieval for one in reversed(same) if one.retrieval), None), progress)
    with indexes.reading():
        meter.read_plain()
    plain = perplexity(meter.plain())
    check_known(plain, model.vocab_size)
    made = functools.partial(
        _calibration, subject, plain, (before[0].model_extra or {}) if before else {}, indexes.measure()
    )
    found = made(work.run(sets) if able else None)
    experts = _experts(meter, model, layout, next((one.experts for one in same), None), progress)
    progress.end()
    _parts(output).unlink(missing_ok=True)
    return found.model_copy(update={"experts": experts})


def _of_the_same(before: list[Calibration], subject: _Subject) -> list[Calibration]:
    """Those whose figures still hold."""
    return [one for one in before if (one.model.dtype, one.text) == (subject.about.dtype, subject.text)]


def _banks_of(same: list[Calibration], bank: PAConfig) -> BankSection | None:
    return next((one.banks for one in reversed(same) if one.is_for(bank)), None)


def _calibration(
    subject: _Subject,
    plain: Perplexity,
    extra: dict[str, Any],
    retrieval: RetrievalSection | None,
    section: BankSection | None,
) -> Calibration:
    import torch

    made = f"pacellm {__version__}, torch {torch.__version__}, {date.today().isoformat()}"
    return Calibration(
        made=made, model=subject.about, text=subject.text, plain=plain, banks=section, retrieval=retrieval, **extra
    )


class _Indexes:
    """Measures what finds planted facts, where that is not known.

    Args:
        known: what is.
    """

    def __init__(self, subject: _Subject, known: RetrievalSection | None, progress: Progress) -> None:
        from pacellm.calibration import planted, retrieval
        from pacellm.calibration.asking import Moments

        self._model, self._progress, self._known, self._nulls = subject.model, progress, known, subject.nulls
        self._moments = Moments(subject.model)
        self._prompts = None
        if known is None or not known.nulls:
            self._prompts = planted.two_prompts(subject.ids, subject.facts, subject.model.context_length)
        if self._prompts is not None:
            progress.expect(retrieval.cost(subject.model, self._prompts, subject.nulls))

    def reading(self) -> AbstractContextManager[None]:
        """Inside, the text is read."""
        return self._moments.watching() if self._prompts is not None else nullcontext()

    def measure(self) -> RetrievalSection | None:
        """What finds facts; None where the model is not one for working memory, or its context is too short."""
        from pacellm.calibration import retrieval

        if self._prompts is None:
            return self._known
        self._progress.begin("indexes of working memory")
        try:
            return retrieval.measure(self._model, self._moments.books(), self._prompts, self._nulls, self._progress.add)
        except ConfigError as error:
            self._progress.begin(f"indexes of working memory: none ({error})")
            return None


def _experts(
    meter: Meter, model: LoadedModel, layout: Layout | None, known: ExpertSection | None, progress: Progress
) -> ExpertSection | None:
    """Densities' effects with this layout, measured where that is not known."""
    from pacellm.calibration.run import measure_experts
    from pacellm.experts.apply import apply_layout

    if layout is None or (known is not None and known.layout == layout.digest):
        return known
    return measure_experts(meter, apply_layout(model, layout), progress.begin)


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


def _facts(options: argparse.Namespace) -> str:
    """Facts that the model can make something of."""
    if options.model is None:
        from pacellm.demo.known_text import known_facts

        return known_facts()
    from pacellm.calibration.planted import text_of_facts

    return text_of_facts()


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


def table(found: Calibration) -> Iterator[str]:
    """A calibration for people."""
    plain = found.plain
    yield (
        f"{found.model.name}: plain perplexity {plain.prompt:.4g} behind prompts' tokens, {plain.decoded:.4g} behind "
        f"decoded ones; ratios to these:"
    )
    if found.banks is not None:
        yield from _bank_lines(found.banks)
    if found.retrieval is not None:
        yield from _index_lines(found.retrieval)
    if found.experts is None:
        yield "densities: not measured (--ce-layout FILE)"
        return
    for density in found.experts.densities:
        yield f"density {density.density:g}, layout {found.experts.layout[:12]}: {_said(density.effects)}"


def _bank_lines(banks: BankSection) -> Iterator[str]:
    yield f"banks of {banks.bank_size} slots, segments of {banks.segment}"
    yield f"{'layer':>7}" + "".join(f"  {preset + ' ' + form:>22}" for preset in ACTING for form in _FORMS)
    for layer in banks.alone(ACTING[0]):
        cells = (_cell(banks.alone(preset)[layer], form) for preset in ACTING for form in _FORMS)
        yield f"{layer:>7}" + "".join(f"  {cell:>22}" for cell in cells)
    for one in banks.sets:
        taken = " (auto)" if banks.auto.get(one.preset) == one.layers else ""
        yield f"{one.preset} in layers {','.join(map(str, one.layers))}{taken}: {_said(one.effects)}"
    yield from (
        f"{preset}: no harmless layer for --pa-layers auto" for preset, layers in banks.auto.items() if not layers
    )


def _index_lines(found: RetrievalSection) -> Iterator[str]:
    yield f"of {found.facts} facts, each among as many blocks, asked for in their own words and in others, found by"
    yield f"words: {_shares(found.lexical)}"
    if (attention := found.attention) is not None:
        yield f"attention of layers {','.join(map(str, attention.layers))}: {_shares(attention.found)}"
    if (activity := found.activity) is not None:
        yield f"activity of layer {activity.layer}, {activity.bits} bits a token: {_shares(activity.found)}"


def _shares(found: Shares) -> str:
    useless = "" if found.both >= RETRIEVES else ", too few to be used"
    return f"{found.own:.0%} and {found.other:.0%}{useless}"


_FORMS = ("prompt", "decoded")


def _cell(effects: Effects, form: str) -> str:
    effect: Effect | None = getattr(effects, form)
    return "-" if effect is None else f"{effect.ratio:.4g} [{effect.low:.4g}, {effect.high:.4g}]"


def _said(effects: Effects) -> str:
    parts = [f"{form} {_cell(effects, form)}" for form in _FORMS if getattr(effects, form) is not None]
    verdict = "harmless" if effects.worst <= LIMIT else f"served only with {FLAG}"
    return f"{', '.join(parts)}: {verdict}"
