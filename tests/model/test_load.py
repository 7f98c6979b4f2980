"""What is served, and what is refused with a reason."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pacellm.errors import ModelError
from pacellm.model.context import StepContext, current_step, step_context
from pacellm.model.load import _check_cuda, load, prepare, probe_layers
from pacellm.model.patch import patch
from tests.model import family_models
from tests.models import COMMON, FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_shapes_are_what_the_model_produces(family):
    model = prepare(tiny(family))
    size = 16 if family == "qwen3" else 8
    assert model.kv_shapes == [((2, size), (2, size))] * 3
    assert model.bytes_per_token == 3 * 2 * 2 * size * 4
    assert model.context_length == 4096
    assert model.eos_token_ids == {2}


def test_other_architectures_are_refused():
    model = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=20))
    with pytest.raises(ModelError, match="'bloom' is not served: its attention adds a bias by distance"):
        prepare(model)


def test_rope_that_depends_on_the_batch_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=rope))
    with pytest.raises(ModelError, match="dynamic"):
        prepare(model)


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_saved_and_loaded(tmp_path):
    model = tiny("qwen2")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for (name, mine), (_, theirs) in zip(loaded.module.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_patching_twice_is_refused():
    model = tiny("llama")
    patch(model, [1])
    with pytest.raises(ModelError, match="already patched"):
        patch(model, [1])


def test_a_served_model_does_not_run_outside_a_step():
    model = prepare(tiny("llama")).module
    with pytest.raises(RuntimeError, match="inside the engine's step"):
        model(torch.tensor([[1, 2, 3]]))


def test_steps_do_not_nest():
    step = StepContext([], [], [])
    with step_context(step):
        assert current_step() is step
        with pytest.raises(RuntimeError, match="cannot nest"), step_context(step):
            pass
    assert current_step() is None


@pytest.mark.parametrize(
    ("family", "named"), [("gemma2", "soft-capping"), ("gpt_oss", "sinks"), ("llama4_text", "chunked attention")]
)
def test_what_cuda_kernels_do_not_compute_is_refused_there(family, named):
    module = family_models.tiny(family)
    prepare(module)
    probed, _ = probe_layers(module, torch.zeros(4, dtype=torch.long), torch.arange(4))
    with pytest.raises(ModelError, match=f"^{named} is served on a CPU only; use --device cpu$"):
        _check_cuda(torch.bfloat16, probed)


def test_types_that_cuda_kernels_do_not_take_are_refused_there():
    module = tiny("llama")
    prepare(module)
    probed, _ = probe_layers(module, torch.zeros(4, dtype=torch.long), torch.arange(4))
    _check_cuda(torch.bfloat16, probed)
    with pytest.raises(ModelError, match="use --dtype bfloat16 or --device cpu"):
        _check_cuda(torch.float32, probed)
