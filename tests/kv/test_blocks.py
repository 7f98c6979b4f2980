"""Blocks and runs."""

import random

import pytest

from pacellm.kv.blocks import BlockAllocator, KVTable, OutOfBlocks, blocks_for
from pacellm.model.attention import cpu as attention_cpu
from pacellm.view import BLOCK


def test_blocks_are_the_cpu_kernels_own_split():
    assert BLOCK % attention_cpu.BLOCK == 0
    assert attention_cpu.TILE % attention_cpu.BLOCK == 0
    assert attention_cpu.WINDOW % attention_cpu.TILE == 0


def test_extends_the_last_run_while_it_can():
    allocator = BlockAllocator(8)
    first = allocator.allocate(2)
    assert allocator.allocate(2, first[-1]) == [2, 3]
    other = allocator.allocate(1)
    assert other == [4]
    assert allocator.allocate(1, 3) == [5]


def test_takes_the_smallest_hole_that_fits_else_the_largest():
    allocator = BlockAllocator(12)
    held = allocator.allocate(12)
    allocator.release([*held[1:3], *held[5:9], *held[10:11]])
    assert allocator.allocate(2) == [1, 2]
    assert allocator.allocate(5) == [5, 6, 7, 8, 10]


def test_shared_blocks_are_free_when_the_last_holder_goes():
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.share(blocks)
    allocator.release(blocks)
    assert allocator.num_free == 2
    allocator.release(blocks)
    assert allocator.num_free == 4


def test_nothing_is_taken_where_there_is_not_enough():
    allocator = BlockAllocator(3)
    with pytest.raises(OutOfBlocks):
        allocator.allocate(4)
    assert allocator.num_free == 3


def test_runs_cover_the_table():
    assert KVTable().runs() == ()
    table = KVTable([4, 5, 9])
    assert [(run.start, run.slot, run.length) for run in table.runs()] == [
        (0, 4 * BLOCK, 2 * BLOCK),
        (2 * BLOCK, 9 * BLOCK, BLOCK),
    ]
    table.extend([10])
    assert len(table.runs()) == 2
    assert table.capacity == 4 * BLOCK
    assert (blocks_for(0), blocks_for(1), blocks_for(BLOCK), blocks_for(BLOCK + 1)) == (0, 1, 1, 2)


def test_random_traffic_adds_up():
    rng, allocator, held = random.Random(0), BlockAllocator(40), []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            allocator.release(held.pop(rng.randrange(len(held))))
        else:
            count = rng.randint(1, 9)
            if count <= allocator.num_free:
                held.append(allocator.allocate(count, rng.choice(held)[-1] if held else None))
        used = [block for blocks in held for block in blocks]
        assert len(used) == len(set(used)) == 40 - allocator.num_free
