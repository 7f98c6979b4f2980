"""Blocks of histories: counted while they are in host memory, and read as they are wherever they lie."""

import threading
from pathlib import Path

import pytest
import torch

from pacellm.errors import SnapshotRefused
from pacellm.kv.history import BlockFile, History, HistoryMemory
from pacellm.sessions.history_files import LISTING, HistoryFiles
from pacellm.view import BLOCK, Span

LIKE = [torch.empty(2, 1, 8), torch.empty(2, 1, 8, dtype=torch.bfloat16), torch.empty(1, 1, 32, dtype=torch.uint8)]
BYTES = BLOCK * (2 * 8 * 4 + 2 * 8 * 2 + 32)


def filled(memory, value):
    block = memory.new_block(LIKE)
    for part in block.parts:
        part.fill_(value)
    memory.stays(block)
    return block


@pytest.fixture
def memory():
    return HistoryMemory()


@pytest.fixture
def files(tmp_path):
    return HistoryFiles(tmp_path / "history" / "server", b"key", sync=True)


def test_what_is_counted(memory):
    blocks = [filled(memory, number) for number in range(4)]
    assert memory.bytes == 4 * BYTES
    leaving = memory.oldest(BYTES + 1)
    assert leaving == blocks[:2]
    assert memory.leaving == 2 * BYTES
    memory.stays(leaving[0])  # it could not
    leaving[1].moved(leaving[1].parts, BlockFile(Path("file"), "00"))
    assert (memory.bytes, memory.leaving) == (3 * BYTES, 0)
    assert memory.oldest(10 * BYTES) == [blocks[2], blocks[3], blocks[0]]
    assert memory.oldest(10 * BYTES) == []
    assert History(blocks).host_bytes == 3 * BYTES
    del blocks, leaving
    assert (memory.bytes, memory.leaving) == (0, 0)


def test_who_reads_while_blocks_leave_sees_what_was_written(memory, files):
    blocks = [filled(memory, number) for number in range(40)]
    history, wrong, ended = History(blocks), [], threading.Event()

    def read():
        while not ended.is_set():
            for number, (block, first, last) in enumerate(history.pieces(Span(0, history.tokens))):
                wrong.extend(part for part in block.parts if not bool((part[:, first:last] == number).all()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for block in blocks:
        files.write_out(block)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert (memory.bytes, files.unlisted_bytes) == (0, 40 * BYTES)


def test_files_move_to_their_session_and_go_with_who_holds_them(memory, files, tmp_path):
    history = History([filled(memory, 1), filled(memory, 2), filled(memory, 3)])
    files.write_out(history.blocks[0])
    kept = filled(memory, 4)
    files.write_out(kept)
    folder = tmp_path / "folder"
    folder.mkdir()
    listing = files.place(folder, history)[LISTING]
    assert (len(listing), memory.bytes, files.unlisted_bytes) == (3, 0, BYTES)
    found = files.take(folder, listing, LIKE)
    for mine, theirs in zip(history.blocks, found.blocks, strict=True):
        assert (mine.name, mine.file) == (theirs.name, theirs.file)
        assert all(torch.equal(one, other) for one, other in zip(mine.parts, theirs.parts, strict=True))
    del kept
    assert files.has_gone
    files.remove_gone()
    assert (files.unlisted_bytes, list((tmp_path / "history" / "server").iterdir())) == (0, [])
    files.sweep(folder, history.until(BLOCK))
    assert [path.name for path in folder.iterdir()] == [f"history.{history.blocks[0].name}.safetensors"]
    with pytest.raises(SnapshotRefused, match="is missing"):
        files.take(folder, listing, LIKE)
    with pytest.raises(SnapshotRefused, match="does not fit this model"):
        files.take(folder, listing[:1], LIKE[:2])
    with pytest.raises(SnapshotRefused, match="does not match"):
        HistoryFiles(tmp_path / "history" / "other", b"another", sync=False).take(folder, listing[:1], LIKE)
