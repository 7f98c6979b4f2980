"""Puts views into KV memory: saves what leaves, and copies what is called back to where it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pacellm.kv.blocks import BlockAllocator, KVTable
from pacellm.kv.history import HistoryBlock, HistoryMemory
from pacellm.model.rotation import KeyRotation
from pacellm.view import BLOCK, View


class Views:
    """Changes what tables stand for.

    Args:
        allocator, slabs: KV memory: keys of all layers, then values, then codes; each [heads, slots, size].
        windows: per layer the tokens that it sees; None sees all, and only to those layers something is called back.
        rotations: per layer how its keys turn with their position.
        memory: where blocks of histories are counted.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        slabs: list[Tensor],
        windows: Sequence[int | None],
        rotations: Sequence[KeyRotation | None],
        memory: HistoryMemory,
    ) -> None:
        self._allocator, self._slabs, self.memory, self.rotations = allocator, slabs, memory, rotations
        self._layers = [layer for layer, window in enumerate(windows) if window is None]
        self._num_layers = len(windows)
        self._pin = slabs[0].is_cuda

    @property
    def token_bytes(self) -> int:
        """Bytes of the history of one token."""
        return sum(slab.shape[0] * slab.shape[2] * slab.element_size() for slab in self._slabs)

    def history_bytes_for(self, table: KVTable, view: View) -> int:
        """Bytes that :meth:`show` adds to the table's history."""
        return self.token_bytes * max(0, view.start - table.history.tokens)

    def blocks_for(self, table: KVTable, view: View) -> int:
        """Blocks that :meth:`show` takes beside those that it frees; negative where it frees more."""
        wanted = (view.front + max(0, table.view.start - view.start)) // BLOCK
        leaving = table.blocks[: (table.view.front + max(0, view.start - table.view.start)) // BLOCK]
        return wanted - sum(self._allocator.references(block) == 1 for block in leaving)

    @torch.inference_mode()
    def show(self, table: KVTable, view: View) -> None:
        """Have a table stand for another view. Its window's KV must be complete up to the new window.

        Raises:
            OutOfBlocks: as of the allocator; nothing is lost, the table stands for its window alone then.
        """
        if view == table.view:
            return
        self.settle(table, view.start)
        earlier = self._allocator.allocate((table.view.start - view.start) // BLOCK)
        try:
            front = self._allocator.allocate(view.front // BLOCK)
        except Exception:
            self._allocator.release(earlier)
            raise
        for number, block in enumerate(earlier, start=view.start // BLOCK):
            self._put_back(table.history.blocks[number], block)
        table.replace([*front, *earlier, *table.blocks], view)
        self._fill_front(table)

    @torch.inference_mode()
    def go_back(self, table: KVTable, position: int) -> None:
        """Have a table end at ``position``, from where on nothing is wanted any more. Where its window has begun later,
        what it is gone on with comes out of the history.

        Raises:
            OutOfBlocks: as of the allocator; the table is as it was.
        """
        start = position - position % BLOCK
        if position < table.view.start:
            block = self._allocator.allocate(1)[0]
            self._put_back(table.history.blocks[start // BLOCK], block)
            self._allocator.release(table.blocks)
            table.replace([block], View(start))
        table.history = table.history.until(position)

    def settle(self, table: KVTable, start: int) -> None:
        """Take a table's front away, and what of its window lies before ``start``; that is history now."""
        own, leaving = table.view, max(0, start - table.view.start) // BLOCK
        window = table.window
        for number, block in enumerate(window[:leaving], start=own.start // BLOCK):
            if number == len(table.history.blocks):
                table.history.blocks.append(self._save(block))
        table.drop_front(self._allocator)
        self._allocator.release(window[:leaving])
        table.replace(window[leaving:], View(own.start + leaving * BLOCK))

    @torch.inference_mode()
    def _save(self, block: int) -> HistoryBlock:
        saved = self.memory.new_block(self._slabs, pin=self._pin)
        for target, slab in zip(saved.parts, self._slabs, strict=True):
            target.copy_(slab[:, block * BLOCK : (block + 1) * BLOCK])
        self.memory.stays(saved)
        return saved

    def _put_back(self, saved: HistoryBlock, block: int) -> None:
        """A block of the history as it was, into a block of KV memory."""
        for source, slab in zip(saved.parts, self._slabs, strict=True):
            slab[:, block * BLOCK : (block + 1) * BLOCK] = source

    def _fill_front(self, table: KVTable) -> None:
        """Each called-back token, moved from where it was stored to where it is shown: one after another, before the
        window."""
        view, place = table.view, 0
        for span in view.spans:
            by = place + view.offset - span.start
            for block, first, last in table.history.pieces(span):
                while first < last:
                    count = min(last - first, BLOCK - place % BLOCK)
                    slot = table.blocks[place // BLOCK] * BLOCK + place % BLOCK
                    self._show_part(block, slice(first, first + count), slice(slot, slot + count), by)
                    first, place = first + count, place + count

    def _show_part(self, block: HistoryBlock, tokens: slice, slots: slice, by: int) -> None:
        """Tokens of a block into slots, ``by`` positions further on."""
        for layer in self._layers:
            rotation, keys, values = self.rotations[layer], self._slabs[layer], self._slabs[self._num_layers + layer]
            values[:, slots] = block.parts[self._num_layers + layer][:, tokens]
            shown = block.parts[layer][:, tokens].to(keys.device)
            keys[:, slots] = shown if rotation is None else rotation.moved(shown, by)
