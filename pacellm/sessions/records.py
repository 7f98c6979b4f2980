"""Sessions to named tensors and back: what a log file, a state file and a snapshot hold, checked when read."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pacellm.config import Preset
from pacellm.errors import SnapshotRefused
from pacellm.memory.state import Banks
from pacellm.modes import MODES, PAChoice, PAMode, resolve
from pacellm.sessions.ending import Ending
from pacellm.sessions.format import Parsed, bank_tensors, take_banks
from pacellm.sessions.history_files import LISTED_BYTES, LISTING
from pacellm.sessions.host_state import HostState, Span, cut
from pacellm.sessions.owner import About, Count
from pacellm.sessions.session import Session
from pacellm.sessions.turn import Turn
from pacellm.view import BLOCK, Budget, checked_budget, checked_recall
from pacellm.view import Span as TokenSpan

# as logs number them; "on" and "read_only" were written when a fingerprint still told one preset for all turns
_MODES: tuple[PAChoice, ...] = ("on", "off", "read_only", *(mode for mode in MODES if mode != "off"))


_CONTRADICTS = "snapshot's log contradicts itself"
_FACT = TypeAdapter(Count)
_BANKS = TypeAdapter(dict[int, dict[str, Count]])


@dataclass(frozen=True)
class Facts:
    """What a file says about its session, beside the log and the state; fields as of :class:`Session`."""

    generation: int
    commits: int
    folds: int
    banks: dict[int, dict[str, int]]
    ending: Ending | None

    def give(self, session: Session) -> None:
        """Put it into a session, its generation apart."""
        session.commits, session.folds = self.commits, self.folds
        session.banks, session.ending = self.banks, self.ending


class Records:
    """Reads and writes sessions of one model and config.

    Args:
        fingerprint: of the model, the banks' config, the layout and the tokenizer.
        former: gives the fingerprints that the same had when the banks' preset was part of it, and that preset; asked
            at most once, from any thread, where a file has another fingerprint.
        vocab_size: ids of a log are below it.
        slabs: KV memory, for shapes and dtypes.
        like: one row of banks, for the same; {} without PA.
        max_tokens: longest context.
        codes: digest of how the tokens' codes among the slabs are made; "" where there are none.
    """

    def __init__(
        self,
        fingerprint: str,
        *,
        vocab_size: int,
        slabs: list[Tensor],
        like: Banks,
        max_tokens: int,
        codes: str = "",
        former: Callable[[], dict[str, Preset]] = dict,
    ) -> None:
        self.fingerprint, self._former = fingerprint, cache(former)
        self._vocab_size, self._slabs, self.like, self._max_tokens = vocab_size, slabs, like, max_tokens
        self._codes = codes

    def metadata(self, session: Session, generation: int | None = None) -> dict[str, str]:
        """What a file of this session says beside its tensors."""
        return {
            "fingerprint": self.fingerprint,
            "generation": str(session.generation if generation is None else generation),
            "tokens": str(len(session.context)),
            "commits": str(session.commits),
            "folds": str(session.folds),
            "banks": json.dumps(session.banks),
            **({"codes": self._codes} if self._codes else {}),
            **ending_metadata(session.ending),
            **({"keep_foreign": "1"} if session.foreign else {}),
        }

    # -- logs ----------------------------------------------------------------------------------------------

    def log_tensors(self, log: list[Turn], origin: Banks | None) -> dict[str, Tensor]:
        """A log as tensors: ``turns`` [T, 5] int64 (start, prompt end, tokens, mode, density in millionths), ``ids``
        [N] int32, ``origin``; of turns that have a budget also ``budgets`` [T, 3] int64 (tokens, window, where it is
        beyond it from; 0 is none, -1 is nowhere) and ``recalls`` [R, 3] int64 (turn, start, length)."""
        turns = [
            [turn.start, turn.prompt_end, len(turn.ids), _MODES.index(turn.pa), round(1e6 * turn.density)]
            for turn in log
        ]
        ids = np.concatenate([np.asarray(turn.ids, dtype=np.int32) for turn in log] or [np.empty(0, np.int32)])
        return {
            "turns": torch.tensor(turns, dtype=torch.int64).reshape(-1, 5),
            "ids": torch.from_numpy(ids),
            **_view_tensors(log),
            **bank_tensors("origin", origin or {}),
        }

    def take_log(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[list[Turn], Banks | None]:
        """The log and origin, checked; taken out of ``tensors``.

        Raises:
            SnapshotRefused: of another model or config, or no log.
        """
        preset = self.check_fingerprint(metadata)
        turns = tensors.pop("turns", None)
        if turns is None or turns.dtype != torch.int64 or turns.ndim != 2 or turns.shape[1] not in (4, 5):
            raise SnapshotRefused("snapshot has no log")
        ids = self._checked_ids(tensors.pop("ids", None))
        log = self._turns(turns.tolist(), ids.numpy(), preset)
        _take_views(tensors, log)
        return log, take_banks("origin", tensors, self.like) or None

    def _checked_ids(self, ids: Tensor | None) -> Tensor:
        if ids is None or ids.dtype != torch.int32 or ids.ndim != 1:
            raise SnapshotRefused("snapshot has no ids")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise SnapshotRefused("snapshot's log has ids outside the vocabulary")
        return ids

    def _turns(self, rows: list[list[int]], ids: np.ndarray, preset: Preset | None) -> list[Turn]:
        """A log's turns, each of which takes its part of the ids, and all of them all."""
        log: list[Turn] = []
        length = offset = 0
        for start, prompt_end, count, mode, *rest in rows:
            density = rest[0] if rest else 1_000_000  # before working sets there were four columns
            fits = 0 <= start <= length and start < prompt_end <= start + count <= self._max_tokens
            is_known = 0 <= mode < len(_MODES) and 0 < density <= 1_000_000
            if not (fits and is_known) or offset + count > len(ids):
                raise SnapshotRefused(_CONTRADICTS)
            own = array("i", ids[offset : offset + count].tobytes())
            log.append(Turn(start, prompt_end, own, _mode(_MODES[mode], preset), density / 1e6))
            length, offset = start + count, offset + count
        if offset != len(ids):
            raise SnapshotRefused(_CONTRADICTS)
        return log

    def check_fingerprint(self, metadata: dict[str, str]) -> Preset | None:
        """Refuse the files of another model or config.

        Returns:
            The preset of all turns, where the fingerprint is of the time when it told that.

        Raises:
            SnapshotRefused: its fingerprint is another.
        """
        found = metadata.get("fingerprint", "")
        if found == self.fingerprint:
            return None
        if (preset := self._former().get(found)) is not None:
            return preset
        raise SnapshotRefused(
            f"snapshot belongs to another model, PA config, layout or tokenizer (fingerprint {found[:12]}, here "
            f"{self.fingerprint[:12]})"
        )

    def has_codes_of(self, metadata: dict[str, str]) -> bool:
        """The tokens' codes beside a file's KV are made as they are here; its log is good in any case."""
        return metadata.get("codes", "") == self._codes

    def facts(self, metadata: dict[str, str]) -> Facts:
        """What a file says about its session.

        Raises:
            SnapshotRefused: nothing that could be.
        """
        try:
            numbers = {name: _FACT.validate_python(metadata[name]) for name in ("generation", "commits", "folds")}
            ending = metadata.get("ending")
            return Facts(
                **numbers,
                banks=_BANKS.validate_json(metadata["banks"]),
                ending=None if ending is None else Ending.from_json(ending, self._vocab_size),
            )
        except (KeyError, ValueError, TypeError):
            raise SnapshotRefused("snapshot's metadata is malformed") from None

    # -- states --------------------------------------------------------------------------------------------

    def kv_tensors(self, slabs: list[Tensor], spans: list[Span], tokens: int) -> dict[str, Tensor]:
        """KV as views that need no copy: ``kv.SLAB.HEAD.START`` [tokens, size]."""
        return {
            f"kv.{number}.{head}.{span.start}": slab[head, span.slot : span.slot + span.length]
            for number, slab in enumerate(slabs)
            for head in range(slab.shape[0])
            for span in cut(spans, tokens)
        }

    def bank_tensors(self, banks: Banks) -> dict[str, Tensor]:
        """Banks as tensors."""
        return bank_tensors("bank", banks)

    def host_tensors(self, state: HostState) -> dict[str, Tensor]:
        """A state in host memory as tensors."""
        return {**self.kv_tensors(state.kv, [Span(0, 0, state.tokens)], state.tokens), **self.bank_tensors(state.banks)}

    def fill(
        self, parsed: Parsed, secret: bytes, generation: int, start: int, tokens: int, spans: list[Span], banks: Banks
    ) -> Tensor | None:
        """Put a state file into the slabs' spans, while it is read, and into ``banks``, once all of it is known good.

        Args:
            start: position of its first token. tokens: of its KV.

        Returns:
            What it lists of the history before ``start``; None where there is none.

        Raises:
            SnapshotRefused: damaged, of another model, config or generation, or with parts missing; the spans then
                hold nothing of worth.
        """
        tensors, metadata = dict(parsed.tensors), parsed.metadata
        self.check_fingerprint(metadata)
        if metadata.get("generation") != str(generation) or metadata.get("tokens") != str(start + tokens):
            raise SnapshotRefused("snapshot is of another generation of the session")
        if not self.has_codes_of(metadata):
            raise SnapshotRefused("snapshot's activity codes were made by another calibration")
        listing = _checked_listing(tensors.pop(LISTING, None), start)
        kv = {name: tensor for name, tensor in tensors.items() if not name.startswith("bank.")}
        self.check_kv(kv, tokens, is_trusted=True)

        def place(name: str, tensor: Tensor) -> None:
            if name in kv:
                self.place({name: tensor}, tokens, spans)

        parsed.verify(secret, place)
        found = take_banks("bank", tensors, self.like)
        if bool(found) != bool(banks):
            raise SnapshotRefused("snapshot has no banks")
        self.place({}, tokens, spans, found, banks)
        return listing

    def place(
        self, kv: dict[str, Tensor], tokens: int, spans: list[Span], found: Banks | None = None,
        banks: Banks | None = None,
    ) -> None:  # fmt: skip
        """Put checked KV into the slabs' spans and banks into ``banks``."""
        with torch.inference_mode():
            for name, tensor in kv.items():
                number, head, start = _piece(name)
                _place(tensor, start, self._slabs[number][head], cut(spans, tokens))
            for layer, bank in (banks or {}).items():
                bank.copy_((found or {})[layer])
        if self._slabs[0].is_cuda:
            torch.cuda.current_stream().synchronize()

    def check_kv(self, tensors: dict[str, Tensor], tokens: int, *, is_trusted: bool = False) -> None:
        """Whether tensors are the KV of ``tokens`` tokens of this model. Whether every number is finite is asked where
        this server has not written them itself.

        Raises:
            SnapshotRefused: they are not.
        """
        covered = [[0] * slab.shape[0] for slab in self._slabs]
        for name, tensor in tensors.items():
            self._check_piece(name, tensor, tokens, covered)
            if not is_trusted and tensor.shape[0] and not torch.isfinite(tensor).all():
                raise SnapshotRefused(f"snapshot's {name[:40]} has numbers that are not finite")
        if any(length != tokens for heads in covered for length in heads):
            raise SnapshotRefused("snapshot's KV is not whole")

    def _check_piece(self, name: str, tensor: Tensor, tokens: int, covered: list[list[int]]) -> None:
        """Whether a tensor goes on where the one before, of the same slab and head, ended; ``covered`` tells where."""
        try:
            number, head, start = _piece(name)
            slab = self._slabs[number]
            goes_on = 0 <= head < slab.shape[0] and 0 <= start == covered[number][head]
        except (ValueError, IndexError):
            raise SnapshotRefused(f"snapshot has an entry {name[:40]!r}") from None
        has_shape = tensor.ndim == 2 and tensor.shape[1] == slab.shape[2] and tensor.dtype == slab.dtype
        if not goes_on or not has_shape or start + tensor.shape[0] > tokens:
            raise SnapshotRefused(f"snapshot's {name[:40]} does not fit this model")
        covered[number][head] += tensor.shape[0]

    # -- for clients ---------------------------------------------------------------------------------------

    def about(self, session: Session) -> About:
        """What a list of sessions shows without opening its files."""
        return About(
            tokens=len(session.context) or session.num_tokens,
            created=session.created,
            last_used=session.last_used,
            ttl=session.ttl,
            commits=session.commits,
            kept=session.kept,
            stored=session.stored,
            saved=session.saved,
            banks=session.banks,
            ranks=session.ranks,
            parent=session.parent,
        )


def _view_tensors(log: list[Turn]) -> dict[str, Tensor]:
    if all(turn.budget is None for turn in log):
        return {}
    budgets = [(*(turn.budget or Budget(0, 0)), -1 if turn.recall is None else turn.recall.start) for turn in log]
    recalls = [
        (number, *span) for number, turn in enumerate(log) if turn.recall is not None for span in turn.recall.spans
    ]
    return {
        "budgets": torch.tensor(budgets, dtype=torch.int64),
        "recalls": torch.tensor(recalls, dtype=torch.int64).reshape(-1, 3),
    }


def _take_views(tensors: dict[str, Tensor], log: list[Turn]) -> None:
    """What the turns of a log saw, checked.

    Raises:
        SnapshotRefused: it cannot be.
    """
    budgets, recalls = tensors.pop("budgets", None), tensors.pop("recalls", None)
    if budgets is None and recalls is None:
        return
    if budgets is None or recalls is None or budgets.shape != (len(log), 3) or recalls.ndim != 2:
        raise SnapshotRefused(_CONTRADICTS)
    try:
        spans = _spans_by_turn(recalls)
        for number, (turn, (tokens, window, start)) in enumerate(zip(log, budgets.tolist(), strict=True)):
            turn.budget = checked_budget(tokens, window) if tokens else None
            if start >= 0:
                turn.recall = checked_recall(turn.budget, start, spans.pop(number, []))
    except ValueError:
        raise SnapshotRefused(_CONTRADICTS) from None
    if spans:
        raise SnapshotRefused(_CONTRADICTS)


def _spans_by_turn(recalls: Tensor) -> dict[int, list[TokenSpan]]:
    spans: dict[int, list[TokenSpan]] = defaultdict(list)
    for number, start, length in recalls.tolist():
        spans[number].append(TokenSpan(start, length))
    return spans


def _checked_listing(listing: Tensor | None, start: int) -> Tensor | None:
    shape = (0, LISTED_BYTES) if listing is None else tuple(listing.shape)
    is_listing = listing is None or listing.dtype == torch.uint8
    if not is_listing or shape != (start // BLOCK, LISTED_BYTES) or start % BLOCK:
        raise SnapshotRefused("snapshot does not list the history before its KV")
    return listing


def ending_metadata(ending: Ending | None) -> dict[str, str]:
    """How a history ends; nothing where that is not known."""
    return {} if ending is None else {"ending": ending.to_json()}


def _piece(name: str) -> tuple[int, int, int]:
    """(slab, head, first position) of ``kv.SLAB.HEAD.START``."""
    number, head, start = (int(part) for part in name.removeprefix("kv.").split("."))
    return number, head, start


def _place(tensor: Tensor, start: int, target: Tensor, spans: list[Span]) -> None:
    """Positions ``start`` on of one head, [tokens, size], into the spans' slots of ``target``."""
    for span in spans:
        first, last = max(span.start, start), min(span.start + span.length, start + tensor.shape[0])
        if first < last:
            slot = span.slot + first - span.start
            target[slot : slot + last - first] = tensor[first - start : last - start]


def _mode(recorded: PAChoice, preset: Preset | None) -> PAMode:
    """A recorded turn's mode.

    Args:
        preset: of all turns, where the log is of the time when modes did not name it.

    Raises:
        SnapshotRefused: it is not, and the mode does not.
    """
    if preset is not None:
        return resolve(recorded, preset)
    if recorded in ("on", "read_only"):
        raise SnapshotRefused(_CONTRADICTS)
    return resolve(recorded, "observe")
