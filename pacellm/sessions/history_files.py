"""Blocks of histories as files, each written once. Functions that block on the disk.

A block that leaves host memory while no state lists it lies with its server (``DIR/history/ID/``) until
nobody holds it. When its session's state is written it moves into the session's folder (``history.NAME.safetensors``);
one that lies in another's, as a fork's, is linked there. From then on memory has a map of the file, whose bytes stay
readable when it is removed.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pacellm.errors import SnapshotRefused
from pacellm.kv.history import BlockFile, History, HistoryBlock
from pacellm.sessions import format as snapshot
from pacellm.sessions.atomic import Draft, publish, sync_path
from pacellm.view import BLOCK

_NAME_BYTES = 16
LISTED_BYTES = _NAME_BYTES + 32
LISTING = "history"
"""Tensor of a state that lists its history's blocks in order: [blocks, LISTED_BYTES] uint8, name and digest of each."""


def is_block(name: str) -> bool:
    """A file of a session's folder is a block of its history."""
    return name.startswith("history.")


def _file_name(block: HistoryBlock) -> str:
    return f"history.{block.name}.safetensors"


class HistoryFiles:
    """The blocks that this server has written.

    Args:
        directory: of those that no state lists; made when it is needed.
        secret: key of the files' digests.
        sync: those of sessions are on disk before their state is.

    Attributes:
        free_bytes: of the file system, when it was last measured.
    """

    def __init__(self, directory: Path, secret: bytes, *, sync: bool) -> None:
        self._directory, self._secret, self._sync = directory, secret, sync
        self._unlisted: dict[Path, weakref.finalize] = {}
        self._gone: deque[Path] = deque()
        self._lock = threading.Lock()
        self._unlisted_bytes = self.free_bytes = 0
        self.measure()

    @property
    def unlisted_bytes(self) -> int:
        """Bytes of blocks with files that no state lists."""
        return self._unlisted_bytes

    def write_out(self, block: HistoryBlock) -> None:
        """Have a block leave host memory.

        Raises:
            OSError: the disk is full, say; it stays there.
        """
        if block.file is not None:
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / _file_name(block)
        try:
            self._write([block], self._directory, sync=False)
        except OSError:
            path.unlink(missing_ok=True)  # it cannot be mapped
            raise
        with self._lock:
            self._unlisted_bytes += block.nbytes
        self._unlisted[path] = weakref.finalize(block, self._let_go, path, block.nbytes)

    def measure(self) -> None:
        """Look how much is free."""
        with suppress(OSError):
            self.free_bytes = shutil.disk_usage(self._directory.parents[1]).free

    @property
    def has_gone(self) -> bool:
        """There are files to remove of blocks that nobody holds any more."""
        return bool(self._gone)

    def remove_gone(self) -> None:
        """Remove them."""
        while self._gone:
            with suppress(OSError):  # what stays goes with the server
                self._gone.popleft().unlink()

    def close(self) -> None:
        """Remove what no state lists."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- of sessions ---------------------------------------------------------------------------------------

    def place(self, folder: Path, history: History) -> dict[str, Tensor]:
        """Have all blocks lie in a session's folder; what a state says of them.

        Raises:
            OSError: the disk is full, say.
        """
        absent = [block for block in history.blocks if not self._is_in(folder, block)]
        self._write([block for block in absent if not self._is_brought(folder, block)], folder, sync=self._sync)
        rows = bytearray()
        for block in history.blocks:
            assert block.file is not None
            rows += bytes.fromhex(block.name) + bytes.fromhex(block.file.tag)
        return {LISTING: torch.frombuffer(rows, dtype=torch.uint8).reshape(-1, LISTED_BYTES)} if rows else {}

    def _is_in(self, folder: Path, block: HistoryBlock) -> bool:
        return block.file is not None and (folder / _file_name(block)).exists()

    def _is_brought(self, folder: Path, block: HistoryBlock) -> bool:
        """Its file could be moved or linked; where that is gone, or there are no links, memory has its bytes still."""
        if block.file is None:
            return False
        path = folder / _file_name(block)
        try:
            self._move_or_link(block, block.file, path)
        except OSError:
            return False
        block.file = block.file._replace(path=path)
        if self._sync:
            sync_path(path)
        return True

    def _move_or_link(self, block: HistoryBlock, file: BlockFile, path: Path) -> None:
        going = self._unlisted.get(file.path)
        if going is None:
            os.link(file.path, path)
            return
        os.replace(file.path, path)
        going.detach()
        self._forget(file.path, block.nbytes)

    def sweep(self, folder: Path, history: History) -> None:
        """Remove blocks from a session's folder that its state does not list."""
        listed = {_file_name(block) for block in history.blocks}
        for path in folder.iterdir():
            if is_block(path.name) and path.name not in listed:
                path.unlink(missing_ok=True)

    def take(self, folder: Path, listing: Tensor | None, like: Sequence[Tensor]) -> History:
        """The history that a state lists, as maps of its files, all of them read once.

        Args:
            listing: of a state that was verified; None is no history.
            like: [heads, .., size] tensors as a block's parts are.

        Raises:
            SnapshotRefused: a block is missing or damaged. OSError: it cannot be read.
        """
        rows = [] if listing is None else listing.tolist()
        return History([self._take(folder, bytes(row), like) for row in rows])

    def _take(self, folder: Path, row: bytes, like: Sequence[Tensor]) -> HistoryBlock:
        name, tag = row[:_NAME_BYTES].hex(), row[_NAME_BYTES:].hex()
        path = folder / f"history.{name}.safetensors"
        try:
            parsed = _mapped(path)
            if parsed.metadata["tag"] != tag:
                raise SnapshotRefused("it is not the block that the state lists")
            parsed.verify(self._secret)
        except FileNotFoundError:
            raise SnapshotRefused(f"block {name} of its history is missing") from None
        except SnapshotRefused as error:
            raise SnapshotRefused(f"block {name} of its history was refused: {error}") from None
        parts = list(parsed.tensors.values())
        if [_form(part) for part in parts] != [(one.dtype, (one.shape[0], BLOCK, one.shape[2])) for one in like]:
            raise SnapshotRefused(f"block {name} of its history does not fit this model")
        return HistoryBlock(parts, name, BlockFile(path, tag))

    # -- files ---------------------------------------------------------------------------------------------

    def _write(self, blocks: list[HistoryBlock], folder: Path, *, sync: bool) -> None:
        """All of them or none."""
        names = [_file_name(block) for block in blocks]
        publish(folder, *(Draft(name, self._writer(block), sync) for name, block in zip(names, blocks, strict=True)))
        for name, block in zip(names, blocks, strict=True):
            parsed = _mapped(folder / name)
            block.moved(list(parsed.tensors.values()), BlockFile(folder / name, parsed.metadata["tag"]))

    def _writer(self, block: HistoryBlock) -> Callable[[BinaryIO], int]:
        tensors = {f"kv.{number}": part for number, part in enumerate(block.parts)}
        return partial(snapshot.write, tensors=tensors, metadata={}, secret=self._secret, sums=True)

    def _let_go(self, path: Path, nbytes: int) -> None:
        """In any thread."""
        self._forget(path, nbytes)
        self._gone.append(path)

    def _forget(self, path: Path, nbytes: int) -> None:
        self._unlisted.pop(path, None)
        with self._lock:
            self._unlisted_bytes -= nbytes


def _form(part: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return part.dtype, tuple(part.shape)


def _mapped(path: Path) -> snapshot.Parsed:
    """A file whose tensors are a private map of it, without a descriptor: there may be thousands."""
    size = path.stat().st_size
    if not size:
        raise SnapshotRefused("snapshot is empty")
    try:
        data: Any = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:  # no more maps, say
        raise OSError(str(error)) from None
    return snapshot.parse(memoryview(data))
