"""The engine on CUDA's attention, with plain stand-ins for its kernels, gives the tokens of a CPU's."""

import dataclasses

import pytest

from pacellm.model.attention import cpu as attention_cpu
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.load import prepare
from tests.engine.helpers import assert_nothing_held, new_engine, prompt, request, run, tokens
from tests.model import stand_ins
from tests.models import tiny


def turns(engine):
    """Prompts that are read in several chunks beside each other and beside decoding, and a second question."""
    asked = [request(str(number), prompt(150 + 170 * number, number), session=str(number)) for number in range(3)]
    found = run(engine, *asked)
    history = prompt(490, 2) + tokens(found["2"])
    return {**found, **run(engine, request("again", history + prompt(333, 9), session="2"))}


@pytest.mark.parametrize("name", ["flash", "cudnn", "flash-attn-2", "flash-attn-3"])
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_the_engine_on_each_kernel(family, name, monkeypatch):
    model = prepare(tiny(family))
    expected = turns(new_engine(model, max_num_batched_tokens=200))
    stand_ins.everything(monkeypatch)
    monkeypatch.setattr(prefill_kernels, "CUDNN_STEP", 64)
    monkeypatch.setattr(
        attention_cpu,
        "attend_on_cpu",
        lambda step, layer, query, form: attention_cuda.attend_on_cuda(step, layer, query, form.scale, form.window),
    )
    engine = new_engine(model, max_num_batched_tokens=200)
    used, kernel = [], prefill_kernels.load(name)

    def counted(queries, *given):
        used.append(len(queries))
        return kernel.call(queries, *given)

    engine.runner.kernel = dataclasses.replace(kernel, call=counted)
    found = turns(engine)
    assert 200 in used
    for asked in expected:
        assert tokens(found[asked]) == tokens(expected[asked])
    assert_nothing_held(engine)
