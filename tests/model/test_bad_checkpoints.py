"""Checkpoints that are missing, damaged, made for another task or not to be trusted: refused with a way out."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pacellm.errors import ConfigError, ModelError
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer, read_template
from tests.models import COMMON, tiny


@pytest.fixture
def saved(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def change(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_missing(saved):
    with pytest.raises(ModelError, match="does not exist; give a checkpoint's directory"):
        load(saved / "not" / "there")
    with pytest.raises(ModelError, match="is a file; give the directory"):
        load(saved / "config.json")
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not JSON"):
        load(saved)


def test_damaged_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged or cut short"):
        load(saved)
    file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load(saved)


def test_pickles_only_where_allowed(saved):
    state = LlamaForCausalLM(LlamaConfig(**COMMON)).state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles.*--allow-pickle"):
        load(saved)
    assert load(saved, allow_pickle=True).num_layers == 3


def test_weights_that_do_not_fit(saved):
    change(saved, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"are missing: model.layers.3"):
        load(saved)
    change(saved, num_hidden_layers=3, intermediate_size=64)
    with pytest.raises(ModelError, match=r"cannot load|another shape"):
        load(saved)


def test_other_tasks_and_code_of_its_own(saved, tmp_path):
    other = tmp_path / "classifier"
    LlamaForSequenceClassification(LlamaConfig(**COMMON)).save_pretrained(other)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, which writes no text"):
        load(other)
    change(saved, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    with pytest.raises(ModelError, match="cannot load"):
        load(saved)


def test_quantised_without_its_package(saved):
    change(saved, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="cannot load"):
        load(saved)


def test_rope_scaling(saved):
    model = load(saved, rope_scaling={"rope_type": "yarn", "factor": 4})
    assert model.context_length == 4 * 4096
    assert model.module.config.rope_parameters["original_max_position_embeddings"] == 4096
    for wrong, match in (
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type must be one of"),
        ({"rope_type": "yarn"}, "needs a factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be a number from 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "has no field 'beta_fast'"),
    ):
        with pytest.raises(ConfigError, match=match):
            load(saved, rope_scaling=wrong)


def test_tokenizer_and_template(saved, tmp_path):
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        ChatTokenizer(saved)
    file = tmp_path / "template.jinja"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(file)
    file.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="not valid Jinja, line 1"):
        read_template(file)
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "m.content" in read_template(file)
