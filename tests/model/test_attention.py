"""The CPU attention: right against a plain one, and the same bits however the work is cut."""

import pytest
import torch

from pacellm.model.attention import cpu as attention_cpu
from pacellm.model.attention.form import Form
from pacellm.model.context import Chunk, Run, StepContext
from tests.model.attention_reference import plain, scatter


def attend(query, key, value, runs, start, window, scale=0.3, num_decoded=0):
    """Attention of queries that stand at ``start`` on, with KV scattered over ``runs``."""
    size = max(run.slot + run.length for run in runs)
    chunk = Chunk(0, query.shape[1], start, runs, num_decoded=num_decoded)
    step = StepContext([chunk], [scatter(key, runs, size)], [scatter(value, runs, size)])
    return attention_cpu.attend_on_cpu(step, 0, query, Form(scale, window))


ONE_RUN = (Run(0, 0, 12288),)
SCATTERED = tuple(Run(512 * n, 1024 * (23 - n), 512) for n in range(24))


@pytest.mark.parametrize("window", [None, 4, 100, 700, 5000])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3), (4, 1)])
def test_right_and_invariant(window, heads):
    generator = torch.Generator().manual_seed(0)
    length, size = 9300, 16
    query = torch.randn(heads[0], 300, size, generator=generator)
    key, value = (torch.randn(heads[1], length, size, generator=generator) for _ in range(2))
    start = length - 300
    whole = attend(query, key, value, ONE_RUN, start, window)
    torch.testing.assert_close(whole.double(), plain(query, key, value, 0.3, window), rtol=1e-4, atol=1e-5)
    assert torch.equal(attend(query, key, value, SCATTERED, start, window), whole)
    at = 0
    for count in (1, 2, 3, 5, 60, 29, 128, 72):
        part = attend(query[:, at : at + count], key, value, ONE_RUN, start + at, window)
        assert torch.equal(part, whole[at : at + count])
        at += count
    assert at == 300


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_parts_are_merged_to_the_same_bits_wherever_they_stand(heads):
    """16 rows of an odd number of heads leave numbers behind the last whole vector of AVX-512."""
    generator = torch.Generator().manual_seed(3)
    results = [torch.randn(1, heads, 2048, 8, generator=generator) for _ in range(2)]
    sums = [3 * torch.randn(1, heads, 2048, generator=generator) for _ in range(2)]
    form = Form(0.3, sinks=torch.randn(heads, generator=generator))

    def merged(part):
        one, other = ((result[:, :, part], lse[:, :, part]) for result, lse in zip(results, sums, strict=True))
        output, lse = attention_cpu._merge(*one, *other)
        return output, lse, form.with_sinks(output, lse, 1)

    whole = merged(slice(None))
    torch.testing.assert_close(whole[1], torch.logaddexp(*sums))
    torch.testing.assert_close(whole[2], whole[0] * torch.sigmoid(whole[1] - form.sinks[:, None])[..., None])
    for count in (4, 16, 48, 80):
        for start in range(0, 2048 - count, count):
            part = slice(start, start + count)
            for mine, theirs in zip(merged(part), whole, strict=True):
                assert torch.equal(mine, theirs[:, :, part])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (4, 1)])
def test_a_prompt_in_one_go(window, heads):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(heads[0], 2500, 8, generator=generator)
    key, value = (torch.randn(heads[1], 2500, 8, generator=generator) for _ in range(2))
    whole = attend(query, key, value, ONE_RUN, 0, window)
    torch.testing.assert_close(whole.double(), plain(query, key, value, 0.3, window), rtol=1e-4, atol=1e-5)
    for cut in (1, 511, 1024, 1153, 1300, 2491):
        parts = [
            attend(query[:, :cut], key, value, ONE_RUN, 0, window),
            attend(query[:, cut:], key, value, ONE_RUN, cut, window),
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("heads", [(4, 1), (9, 3)])
def test_every_cut_behind_a_tile(heads):
    """Where parts are merged, a row must not depend on how near it is to the last one."""
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(heads[0], 1100, 8, generator=generator)
    key, value = (torch.randn(heads[1], 1100, 8, generator=generator) for _ in range(2))
    whole = attend(query, key, value, ONE_RUN, 0, None)
    for cut in range(1025, 1100):
        assert torch.equal(attend(query[:, :cut], key, value, ONE_RUN, 0, None), whole[:cut]), cut


@pytest.mark.parametrize("window", [None, 4, 700, 9000])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3), (4, 1)])
def test_decoded_tokens_alone_and_in_a_replay(window, heads):
    generator = torch.Generator().manual_seed(2)
    length, size, count = 9300, 16, 40
    query = torch.randn(heads[0], count, size, generator=generator)
    key, value = (torch.randn(heads[1], length, size, generator=generator) for _ in range(2))
    start = length - count
    replay = attend(query, key, value, ONE_RUN, start, window, num_decoded=30)
    torch.testing.assert_close(replay.double(), plain(query, key, value, 0.3, window), rtol=1e-4, atol=1e-5)
    assert torch.equal(attend(query, key, value, SCATTERED, start, window, num_decoded=30), replay)
    prompt = attend(query[:, :10], key, value, ONE_RUN, start, window)
    assert torch.equal(replay[:10], prompt)
    for row in range(10, count):
        alone = attend(query[:, row : row + 1], key, value, ONE_RUN, start + row, window, num_decoded=1)
        assert torch.equal(replay[row : row + 1], alone)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_decoded", [0, 1])
@pytest.mark.parametrize("num_wanted", [0, 1])
def test_the_last_layer_attends_only_what_the_head_reads(window, num_decoded, num_wanted):
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 700, 8, generator=generator) for _ in range(3))
    found = {}
    for name, wanted in (("whole", None), ("part", [699] * num_wanted)):
        chunk = Chunk(0, 700, 0, ONE_RUN, num_decoded=num_decoded)
        slabs = [scatter(key, ONE_RUN, 12288)] * 2, [scatter(value, ONE_RUN, 12288)] * 2
        step = StepContext([chunk], *slabs, wanted=wanted)
        found[name] = [attention_cpu.attend_on_cpu(step, layer, query, Form(0.3, window)) for layer in (0, 1)]
    whole, part = found["whole"], found["part"]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(part[0], whole[0])
    assert torch.equal(part[1][700 - num_wanted :], whole[1][700 - num_wanted :])
    assert not part[1][: 700 - num_wanted].any()


@pytest.mark.parametrize("window", [None, 4, 100, 300])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3), (4, 1)])
def test_decoded_tokens_of_many_sequences(window, heads):
    generator = torch.Generator().manual_seed(4)
    lengths, size = (1, 3, 90, 300, 511, 513, 900), 16
    for chosen in (lengths, lengths[3:]):
        query = torch.randn(heads[0], len(chosen), size, generator=generator)
        slabs = [torch.full((heads[1], 1024 * len(chosen), size), 9.0) for _ in range(2)]
        chunks, parts = [], []
        for row, length in enumerate(chosen):
            runs = (Run(0, 1024 * row + 512, 512), Run(512, 1024 * row, 512))
            key, value = (torch.randn(heads[1], length, size, generator=generator) for _ in range(2))
            for slab, new in zip(slabs, (key, value), strict=True):
                part = slice(1024 * row, 1024 * row + 1024)
                slab[:, part] = scatter(new, (Run(0, 512, 512), Run(512, 0, 512)), 1024)
            chunks.append(Chunk(row, row + 1, length - 1, runs, num_decoded=1))
            parts.append((key, value))
        found = attention_cpu.attend_on_cpu(StepContext(chunks, [slabs[0]], [slabs[1]]), 0, query, Form(0.3, window))
        for row, (key, value) in enumerate(parts):
            own = query[:, row : row + 1]
            torch.testing.assert_close(
                found[row : row + 1].double(), plain(own, key, value, 0.3, window), rtol=1e-4, atol=1e-5
            )
            runs = (Run(0, 0, 1024),)
            assert torch.equal(
                found[row : row + 1], attend(own, key, value, runs, len(key[0]) - 1, window, num_decoded=1)
            )


@pytest.mark.parametrize("window", [4, 128, 700])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3), (4, 1)])
@pytest.mark.parametrize("start", [0, 130, 1500])
def test_tiles_of_a_window_side_by_side_and_one_by_one(window, heads, start):
    generator = torch.Generator().manual_seed(5)
    count = 2100
    query = torch.randn(heads[0], count, 16, generator=generator)
    key, value = (torch.randn(heads[1], start + count, 16, generator=generator) for _ in range(2))
    for runs in (ONE_RUN, SCATTERED):
        whole = attend(query, key, value, runs, start, window)
        torch.testing.assert_close(whole.double(), plain(query, key, value, 0.3, window), rtol=1e-4, atol=1e-5)
        at = 0
        while at < count:
            size = min(100 + at % 37, count - at)
            part = attend(query[:, at : at + size], key, value, runs, start + at, window)
            assert torch.equal(part, whole[at : at + size])
            at += size
