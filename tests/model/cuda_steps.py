"""Steps that meet every branch of the CUDA attention."""

import torch

from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.context import Chunk, Run, StepContext
from tests.model.attention_reference import plain, scatter

#: (tokens before the step, tokens of the step, runs)
SEQUENCES = (
    (0, 70, (Run(0, 512, 512),)),  # a prompt's first chunk
    (900, 1, (Run(0, 1024, 512), Run(512, 2048, 512))),  # decode, two runs in place
    (500, 40, (Run(0, 3072, 512), Run(512, 4096, 512))),  # new tokens in two runs: gathered
    (1300, 20, (Run(0, 5120, 1024), Run(1024, 0, 512))),  # the second run lies before the first
    (30, 1, (Run(0, 1536, 512),)),  # decode, one run
    (1100, 300, (Run(0, 6656, 1024), Run(1024, 7680, 512))),  # a long chunk, some of its keys before it in its run
    (2300, 30, (Run(0, 8704, 2560),)),  # a short chunk behind many keys: cut
    (2900, 30, (Run(0, 11264, 1024), Run(1024, 12288, 2048))),  # the same, over two runs
)
SLAB = 14400


def check(kernel_dtype, device, windows, tolerance, size=16, heads=(6, 2), kernel=None):
    """Run one step for each window in turn, as layers of one model do, and compare every sequence."""
    generator = torch.Generator().manual_seed(0)

    def random(count, length):
        return torch.randn(count, length, size, generator=generator).to(kernel_dtype).to(device)

    sequences = [
        (*item, random(heads[1], item[0] + item[1]), random(heads[1], item[0] + item[1])) for item in SEQUENCES
    ]
    chunks, row = [], 0
    for past, count, runs, _, _ in sequences:
        chunks.append(Chunk(row, row + count, past, runs, num_decoded=1 if count == 1 else 0))
        row += count
    slabs = []
    for which in (3, 4):
        slab = torch.full((heads[1], SLAB, size), 9.0, dtype=kernel_dtype, device=device)
        for item in sequences:
            for run in item[2]:
                slots = slice(run.slot, run.slot + run.length)
                slab[:, slots] = scatter(item[which], item[2], SLAB)[:, slots]
        slabs.append(slab)
    query = random(heads[0], row)
    step = StepContext(chunks, [slabs[0]], [slabs[1]], kernel=kernel)
    for window in windows:
        found = attention_cuda.attend_on_cuda(step, 0, query, 0.3, window)
        for chunk, (_, _, _, key, value) in zip(chunks, sequences, strict=True):
            expected = plain(query[:, chunk.start : chunk.stop], key, value, 0.3, window)
            torch.testing.assert_close(
                found[chunk.start : chunk.stop].double(), expected, rtol=tolerance, atol=tolerance
            )
