"""Whether what was called back is used: the attention that decoded tokens give it, and as much by lot beside it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Work
from pacellm.kv.blocks import KVTable
from pacellm.model.context import Asked
from pacellm.model.rotation import KeyRotation
from pacellm.view import BLOCK, Span

_EVERY, _TOKENS = 8, 8  # the first of so many turns is watched, and so many decoded tokens of it
_BLOCK = 64  # tokens of a block by lot


@dataclass
class Attention:
    """Sums over decoded tokens that were watched; a token's attention is 1, the mean of its heads in all layers.

    Attributes:
        tokens: how many.
        called_back: what went to blocks that were called back for the turn.
        by_lot: what would go to as many others of the history, shown in the same places beside them.
    """

    tokens: int = 0
    called_back: float = 0.0
    by_lot: float = 0.0


class HitMeter:
    """Watches a sample of turns in the layers that retrieve. Changes nothing that they see.

    Args:
        layers: those; without any nothing is watched.
        slabs: KV memory, of which the first are the layers' keys.
        rotations: how keys turn, by layer.
    """

    def __init__(self, layers: Items[int], slabs: Items[Tensor], rotations: Items[KeyRotation | None]) -> None:
        self._layers, self._slabs, self._rotations = tuple(layers), slabs, rotations
        self._num_turns, self.total = 0, Attention()

    def begin(self, sequence: Sequence) -> None:
        """Something was called back for its turn."""
        sequence.is_watched = bool(self._layers) and self._num_turns % _EVERY == 0
        self._num_turns += 1

    def layers(self, sequence: Sequence) -> tuple[int, ...]:
        """Whose queries are wanted of the sequence's next decoded token."""
        return self._layers if sequence.is_watched and len(sequence.generated) <= _TOKENS else ()

    @torch.inference_mode()
    def measure(self, work: Work, asked: Asked) -> None:
        """A watched token was fed; its sequence has not moved on yet."""
        table = work.sequence.table
        lot = _by_lot(table, work.position)
        if not lot:
            return
        shares = torch.stack([self._shares(layer, asked, table, work.place + 1, lot) for layer in asked.layers])
        called_back, by_lot = shares.mean((0, 2, 3)).tolist()
        self.total.tokens += 1
        self.total.called_back += called_back
        self.total.by_lot += by_lot

    def _shares(self, layer: int, asked: Asked, table: KVTable, seen: int, lot: list[int]) -> Tensor:
        """[2, Hkv, G]: the shares of called-back tokens and of those by lot, by head."""
        slab, query = self._slabs[layer], asked.queries[layer][:, -1]
        runs = [run for run in table.runs() if run.start < seen]
        keys = torch.cat([slab[:, run.slot : run.slot + min(run.length, seen - run.start)] for run in runs], 1)
        other = self._shown(layer, table, lot).to(keys.device)
        rows = query.float().reshape(slab.shape[0], -1, query.shape[-1]) * asked.scales[layer]
        scores, others = (rows @ part[..., : rows.shape[-1]].float().transpose(1, 2) for part in (keys, other))
        peak = torch.maximum(scores.amax(-1), others.amax(-1))[..., None]
        weights, by_lot = (scores - peak).exp(), (others - peak).exp().sum(-1)
        called_back = weights[..., BLOCK : table.view.front].sum(-1)
        total = weights.sum(-1) + by_lot
        return torch.stack([called_back / total, by_lot / total])

    def _shown(self, layer: int, table: KVTable, lot: list[int]) -> Tensor:
        """[Hkv, tokens, D] keys of blocks by lot, where the called-back ones are shown."""
        shown, rotation = [], self._rotations[layer]
        for number, start in enumerate(lot):
            pieces = table.history.pieces(Span(start, _BLOCK))
            keys = torch.cat([block.parts[layer][:, first:last] for block, first, last in pieces], 1)
            by = BLOCK + number * _BLOCK + table.view.offset - start
            shown.append(keys if rotation is None else rotation.moved(keys, by))
        return torch.cat(shown, 1)


def _by_lot(table: KVTable, seed: int) -> list[int]:
    """Where blocks begin that are out of sight, as many as were called back; [] where there are fewer."""
    count, view = (table.view.front - BLOCK) // _BLOCK, table.view
    total = min(view.start, table.history.tokens) // _BLOCK
    seen = {number for span in view.spans for number in range(span.start // _BLOCK, -(-span.end // _BLOCK))}
    if count <= 0 or total < count + len(seen):
        return []
    drawn = np.random.default_rng(seed).choice(total, count + len(seen), replace=False).tolist()
    return [number * _BLOCK for number in drawn if number not in seen][:count]
