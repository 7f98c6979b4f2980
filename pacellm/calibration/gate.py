"""What a server may do to answers: what was measured and does no harm, unless whoever starts it accepts worse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pacellm.calibration.file import ACTING, Calibration, beside
from pacellm.config import PAConfig
from pacellm.errors import ConfigError, RequestError

logger = logging.getLogger("pacellm.calibration")
LIMIT = 1.05
"""A perplexity this many times the plain model's is harm."""
FLAG = "--accept-worse-answers"


@dataclass(frozen=True)
class Gate:
    """What is known of this server's banks and working sets.

    Attributes:
        calibration: of the model that is served, None where there is none.
        missing: why there is none.
        bank: size and segment that are served.
        layers: those with banks.
        layout: digest of the experts' layout, None without one.
        accepts: worse answers are accepted.
    """

    calibration: Calibration | None
    missing: str
    bank: PAConfig
    layers: tuple[int, ...]
    layout: str | None = None
    accepts: bool = False

    def bank_problem(self, preset: str | None) -> str | None:
        """What is wrong with banks of ``preset``; None where they do not act, or do no harm."""
        if preset not in ACTING:
            return None
        numbers = ",".join(map(str, self.layers))
        what = f"preset {preset} in layers {numbers}"
        if self.calibration is None:
            return _unknown(what, self.missing)
        banks = self.calibration.banks
        if banks is None or not self.calibration.is_for(self.bank):
            have = "no banks" if banks is None else f"banks of {banks.bank_size} slots and segments of {banks.segment}"
            served = f"{self.bank.bank_size} and {self.bank.segment}"
            return _unknown(what, f"its calibration is of {have}, and {served} are served")
        effects = banks.of(preset, self.layers)
        if effects is None:
            return _unknown(what, "its calibration has other layers", f" --pa-layers {numbers}")
        return _harm(what, effects.worst)

    def density_problem(self, density: float) -> str | None:
        """What is wrong with decoded tokens that use this part of their experts; None where it does no harm."""
        if density >= 1.0 or self.layout is None:  # without a layout the engine refuses densities itself
            return None
        what = f"density {density:g}"
        if self.calibration is None:
            return _unknown(what, self.missing, " --ce-layout FILE")
        experts = self.calibration.experts
        if experts is None or experts.layout != self.layout:
            have = "has no layout" if experts is None else "is of another layout"
            return _unknown(what, f"its calibration {have}", " --ce-layout FILE")
        found = experts.of(density)
        if found is None:
            return _unknown(what, "its calibration ends above that")
        measured = "" if found.density == density else f" (measured at {found.density:g})"
        return _harm(f"{what}{measured}", found.effects.worst)

    def check_start(self, preset: str | None, density: float) -> None:
        """Refuse what would make every answer worse; where that is accepted, say it.

        Args:
            preset: of requests that name none; None where there are no banks.
            density: likewise.

        Raises:
            ConfigError: gives the figure and the flag.
        """
        for param, problem in (("pa_preset", self.bank_problem(preset)), ("ce_density", self.density_problem(density))):
            if problem is None:
                continue
            if not self.accepts:
                raise ConfigError(f"{problem}; to serve it all the same, start with {FLAG}", param=param)
            logger.warning("%s; accepted (%s)", problem, FLAG)

    def check_request(self, preset: str | None, density: float | None) -> None:
        """Refuse what one request asks for.

        Args:
            preset, density: as it names them; None for the server's own, which were checked when it started.

        Raises:
            RequestError: gives the figure and the flag.
        """
        if self.accepts:
            return
        found = self.bank_problem(preset), self.density_problem(1.0 if density is None else density)
        for param, problem in zip(("pacellm.pa", "pacellm.ce_density"), found, strict=True):
            if problem is not None:
                raise RequestError(
                    f"{problem}; this server was started without {FLAG}", param=param, code="worse_answers"
                )

    def harmless_layers(self, preset: str) -> tuple[int, ...]:
        """What ``--pa-layers auto`` takes; a preset that does not act watches ``reference``'s.

        Raises:
            ConfigError: nothing was measured, or every layer does harm.
        """
        if self.calibration is None or self.calibration.banks is None or not self.calibration.is_for(self.bank):
            why = self.missing if self.calibration is None else "its calibration has no such banks"
            raise ConfigError(
                f"pa_layers auto needs to know this model's harmless layers, and {why}; run `pacellm calibrate MODEL`",
                param="pa_layers",
            )
        acting = next((name for name in ACTING if name == preset), ACTING[0])
        layers = self.calibration.banks.auto.get(acting)
        if not layers:
            raise ConfigError(
                f"pa_layers auto: the calibration found no layer in which preset {acting} does no harm; name layers, "
                "or take another preset",
                param="pa_layers",
            )
        return tuple(layers)


def find(
    model: str | Path, named: Path | None, fingerprint: Callable[[], str | None]
) -> tuple[Calibration | None, str]:
    """A model's calibration, or why there is none.

    Args:
        model: directory, file or hub name. named: the file, where one was named.
        fingerprint: of the model that is served; None where it cannot be told.

    Raises:
        ConfigError: a file that is damaged, or a named one that is missing or another model's.
    """
    path = named or beside(model)
    if path is None or (named is None and not path.exists()):
        return None, "no calibration of it was found"
    found = Calibration.load(path)
    here = fingerprint()
    if here is None:
        return None, "a model split over processes cannot be compared with its calibration"
    if here == found.model.fingerprint:
        return found, ""
    problem = f"{path} is of another model (fingerprint {found.model.fingerprint[:12]}, here {here[:12]})"
    if named is not None:
        raise ConfigError(f"calibration {problem}; make one with `pacellm calibrate MODEL`", param="calibration")
    logger.warning("%s: ignored; make it again with `pacellm calibrate %s`", problem, model)
    return None, problem


def _harm(what: str, ratio: float) -> str | None:
    if ratio <= LIMIT:
        return None
    return (
        f"{what} makes this model worse: its perplexity becomes {ratio:.4g} times the plain model's (limit {LIMIT:g})"
    )


def _unknown(what: str, why: str, flags: str = "") -> str:
    return f"nobody has measured what {what} does to this model ({why}): run `pacellm calibrate MODEL{flags}`"
