"""Kernels of prompts' chunks and the choice among them, with plain stand-ins; tests/gpu has the kernels themselves."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pacellm.config import ATTENTION_KERNELS, EngineConfig
from pacellm.engine.device import attention_kernel
from pacellm.errors import ConfigError
from pacellm.model.attention import choice as kernel_choice
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.attention.prefill import new_plan
from pacellm.model.context import Chunk, Run
from pacellm.model.load import prepare
from tests.engine.helpers import new_engine
from tests.model import stand_ins
from tests.model.cuda_steps import check
from tests.models import tiny

CPU = torch.device("cpu")
SHAPE = (2, ((1, 8), (1, 8)))
NAMES = kernel_choice.NAMES


@pytest.fixture
def installed(monkeypatch):
    """All kernels are there, and timing works on little."""
    stand_ins.everything(monkeypatch)
    monkeypatch.setattr(prefill_kernels, "CUDNN_STEP", 128)
    short = partial(kernel_choice.seconds_of, queries=128, behind=200, repeats=1)
    monkeypatch.setattr(kernel_choice, "seconds_of", short)


def choose(wanted="auto"):
    return kernel_choice.choose(wanted, [SHAPE, SHAPE], torch.float32, CPU)


def replace(monkeypatch, name, change):
    """Let a kernel's results go through ``change``."""
    load = prefill_kernels.load

    def changed(wanted):
        kernel = load(wanted)
        if wanted != name:
            return kernel
        return PrefillKernel(name, lambda *given: change(*kernel.call(*given)), kernel.least, kernel.windows)

    monkeypatch.setattr(prefill_kernels, "load", changed)


@pytest.mark.parametrize("windows", [(None, 100), (4, 700, None)])
@pytest.mark.parametrize("name", NAMES)
def test_every_sequence_gets_its_own_attention(installed, name, windows):
    kernel = prefill_kernels.load(name)
    assert kernel.name == name
    check(torch.float32, "cpu", windows, 1e-4, kernel=kernel)


def test_a_step_uses_the_kernel_it_is_given(installed, monkeypatch):
    seen = []

    def counted(queries, keys, values, plan, scale, window):
        seen.append((window, [part.count for part in plan.parts]))
        return prefill_kernels.FLASH.call(queries, keys, values, plan, scale, window)

    check(torch.float32, "cpu", (None, 100), 1e-4, kernel=PrefillKernel("mine", counted, least=70, windows=False))
    # 300 queries have two runs; 40 and 20 are fewer than 70, and windows are not for it
    assert sorted(seen, key=str) == [(None, [300]), (None, [300]), (None, [70])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("count", "length"), [(128, 128), (128, 256), (150, 150), (150, 500), (384, 400), (128, 7 * 128 + 3)]
)
def test_split_and_merged_is_the_whole(installed, causal, count, length):
    kernel, (query, keys, values) = (
        prefill_kernels.load("cudnn"),
        kernel_choice._random(SHAPE, count, length + 512, torch.float32, CPU),
    )
    plan = new_plan([(Chunk(0, count, length - count, ()), Run(0, 512, length))], causal, CPU)
    output, lse = kernel.call(query, keys, values, plan, 0.3, None)
    expected, expected_lse = stand_ins.one(query, keys[512:], values[512:], causal, 0.3)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_keys_before_a_chunk_are_cut_into_powers_of_two():
    def sizes(length):
        cuts = list(prefill_kernels._powers(length))
        assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
        return [cut.stop - cut.start for cut in cuts]

    assert sizes(1023) == []
    assert sizes(1024 * 11 + 77) == [8192, 2048, 1024]
    found = [sizes(length) for length in range(0, 200_000, 321)]
    assert max(map(len, found)) == 7
    assert {size for lengths in found for size in lengths} == {1024 << power for power in range(8)}


def test_cudnn_leaves_windows_and_short_chunks_to_flash(installed):
    kernel = prefill_kernels.load("cudnn")
    plan = new_plan([(Chunk(0, 130, 0, ()), Run(0, 0, 130)), (Chunk(130, 200, 0, ()), Run(0, 512, 70))], True, CPU)
    assert not kernel.takes(plan, None)
    long = new_plan([(Chunk(0, 130, 0, ()), Run(0, 0, 130))], True, CPU)
    assert kernel.takes(long, None)
    assert not kernel.takes(long, 100)
    assert prefill_kernels.FLASH.takes(plan, 100)


def test_the_fastest_is_used(installed, monkeypatch):
    times = {"flash": 3.0, "cudnn": 2.0, "flash-attn-2": 4.0, "flash-attn-3": 1.0}
    monkeypatch.setattr(kernel_choice, "seconds_of", lambda kernel, *given: times[kernel.name])
    trial = choose()
    assert trial.kernel.name == "flash-attn-3"
    assert not trial.refused
    assert trial.seconds == {name: 2 * seconds for name, seconds in times.items()}, "two layers"


@pytest.mark.parametrize(
    "change",
    [
        lambda output, lse: (output + 0.5, lse),
        lambda output, lse: (output, lse + 0.5),
        lambda output, lse: (output.masked_fill(output == output[129, 0, 0], torch.nan), lse),
    ],
)
def test_a_wrong_kernel_is_not_used(installed, monkeypatch, change):
    replace(monkeypatch, "flash-attn-3", change)
    trial = choose()
    assert "off by" in trial.refused["flash-attn-3"]
    assert trial.seconds.keys() == set(NAMES) - {"flash-attn-3"}
    with pytest.raises(ConfigError, match=r"flash-attn-3 cannot be used here: .*off by"):
        choose("flash-attn-3")


def test_causal_from_the_upper_left_is_found_out(installed, monkeypatch):
    def upper_left(queries, keys, values, causal, scale, window):
        length = len(queries) if causal else len(keys)
        output, lse = stand_ins.one(queries, keys[:length], values[:length], causal, scale)
        return output, lse.transpose(0, 1)

    wrong = PrefillKernel("cudnn", prefill_kernels._each(upper_left), windows=False)
    assert not kernel_choice.error(wrong, SHAPE, torch.float32, CPU) <= kernel_choice.TOLERANCE


def test_a_kernel_that_raises_is_passed_over_with_its_reason(installed, monkeypatch):
    def raises(*found):
        raise RuntimeError("no engine for these heads\nand much more")

    replace(monkeypatch, "cudnn", raises)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    trial = choose()
    assert trial.refused["cudnn"] == "RuntimeError: no engine for these heads"
    assert "flash_attn" in trial.refused["flash-attn-2"]
    assert trial.seconds.keys() == {"flash", "flash-attn-3"}


def test_a_kernel_that_fails_where_it_is_timed_is_passed_over(installed, monkeypatch):
    seconds_of = kernel_choice.seconds_of

    def measure(kernel, *given):
        if kernel.name == "cudnn":
            raise MemoryError
        return seconds_of(kernel, *given)

    monkeypatch.setattr(kernel_choice, "seconds_of", measure)
    trial = choose()
    assert trial.refused == {"cudnn": "MemoryError"}
    assert trial.kernel.name != "cudnn"


def test_a_signature_that_does_not_fit_is_named(installed, monkeypatch):
    stand_ins.flash_attn_3(monkeypatch).flash_attn_varlen_func = lambda q, k, v, softmax_scale, causal: None
    with pytest.raises(TypeError, match="takes no seqused_k and no window_size"):
        prefill_kernels.load("flash-attn-3")


def test_without_a_right_kernel_nothing_is_served(installed, monkeypatch):
    def none(name):
        raise ImportError(f"there is no {name}")

    monkeypatch.setattr(prefill_kernels, "load", none)
    with pytest.raises(ConfigError, match="flash: ImportError: there is no flash; cudnn: ") as caught:
        choose()
    assert caught.value.param == "attention_kernel"


@pytest.mark.parametrize("name", NAMES)
def test_a_forced_kernel_is_tried_but_not_timed(installed, name):
    trial = choose(name)
    assert trial.kernel.name == name
    assert not trial.seconds


def test_on_a_cpu_there_is_nothing_to_choose():
    assert new_engine(prepare(tiny("llama"))).kernel is None
    with pytest.raises(ConfigError, match=r"cudnn is for a GPU.*on a cpu; leave it at auto") as caught:
        new_engine(prepare(tiny("llama")), attention_kernel="cudnn")
    assert caught.value.param == "attention_kernel"


def test_names_and_deterministic():
    for name in ATTENTION_KERNELS:
        assert EngineConfig(attention_kernel=name).attention_kernel == name
    EngineConfig(deterministic=True, attention_kernel="flash")
    with pytest.raises(ConfigError, match="one of auto, flash, cudnn"):
        EngineConfig(attention_kernel="eager")
    with pytest.raises(ConfigError, match="auto or flash with deterministic, not 'cudnn'"):
        EngineConfig(deterministic=True, attention_kernel="cudnn")


@pytest.mark.parametrize(("deterministic", "used"), [(False, "cudnn"), (True, "flash")])
def test_the_engine_asks_for_its_own_layers_and_says_what_it_uses(monkeypatch, caplog, deterministic, used):
    asked = []

    def chosen(wanted, shapes, dtype, device):
        asked.append((wanted, shapes))
        kernel = PrefillKernel(used, prefill_kernels.FLASH.call)
        timed = {} if deterministic else {"flash": 0.25, "cudnn": 0.125}
        return kernel_choice.Trial(kernel, timed, {} if deterministic else {"flash-attn-3": "it is off by 0.5"})

    monkeypatch.setattr(kernel_choice, "choose", chosen)
    model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, query_heads=[4, 8], kv_shapes=[((2, 8), (2, 8))] * 2
    )
    config = EngineConfig(deterministic=deterministic)
    with caplog.at_level("INFO", logger="pacellm.engine"):
        assert attention_kernel(model, config).name == used
    assert asked == [("flash" if deterministic else "auto", [(4, ((2, 8), (2, 8))), (8, ((2, 8), (2, 8)))])]
    assert f"prompt attention by {used}" in caplog.text
    if not deterministic:
        assert "not by flash-attn-3: it is off by 0.5" in caplog.text
        assert "2,048 tokens behind 32,768: flash 250.0, cudnn 125.0" in caplog.text


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_torch_takes_these_arguments_and_gives_these_shapes(name):
    meta, kernel = torch.device("meta"), prefill_kernels.load(name)
    query = torch.empty(2100, 8, 64, device=meta, dtype=torch.bfloat16)
    keys = torch.empty(2, 9000, 64, device=meta, dtype=torch.bfloat16).transpose(0, 1)
    plan = new_plan([(Chunk(0, 2100, 4000, ()), Run(0, 512, 6100))], True, meta)
    output, lse = kernel.call(query, keys, keys, plan, 0.125, None)
    assert (output.shape, output.dtype) == (query.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (query.shape[:2], torch.float32)
