"""The file: what comes back, what is kept, what is refused, and what a server does with it."""

import json
import logging

import numpy as np
import pytest

from pacellm.calibration.file import NAME, Calibration, beside, pack, pack_bytes, pack_halves, text
from pacellm.calibration.gate import FLAG, Gate, find
from pacellm.config import PAConfig
from pacellm.errors import ConfigError, RequestError
from pacellm.experts.apply import apply_layout
from pacellm.model.fingerprint import model_sample
from pacellm.model.load import prepare
from pacellm.model.patch import patch
from tests.experts.test_layout import random_layout
from tests.models import tiny

PRINT, LAYOUT = "ab" * 32, "cd" * 32


def effects(decoded, prompt=1.0):
    def one(ratio):
        return {"ratio": ratio, "low": ratio, "high": ratio, "tokens": 100}

    return {"prompt": None if prompt is None else one(prompt), "decoded": one(decoded)}


NULL_CODES = pack_bytes(np.zeros(3 * 32, np.uint8))


def retrieval(**activity):
    found = {"own": 1.0, "other": 0.5}
    codes = {"layer": 1, "bits": 256, "seed": 0, "mean": pack(np.zeros(48)), "deviation": pack(np.ones(48))}
    return {
        "facts": 24,
        "lexical": {"own": 0.9, "other": 0.1},
        "attention": {
            "layers": [1, 2], "found": found, "alone": {"0": found, "1": found},
            "nulls": {"1": pack_halves(np.ones(24)), "2": pack_halves(np.ones(12))},
        },
        "activity": {**codes, "found": found, "alone": {"1": found}, "nulls": NULL_CODES, **activity},
        "nulls": [1, 2],
    }  # fmt: skip


def content(**changes):
    return {
        "format": "pacellm-calibration",
        "version": 1,
        "made": "here",
        "model": {"name": "m", "fingerprint": PRINT, "dtype": "float32"},
        "text": {"name": "built in", "digest": "ef" * 32, "tokens": 3000, "part": 900},
        "plain": {"prompt": 11.0, "decoded": 12.5},
        "banks": {
            "bank_size": 100,
            "segment": 1024,
            "layers": {
                "reference": {"0": effects(1.0), "2": effects(1.3)},
                "paper": {"0": effects(1.1), "2": effects(9)},
            },
            "sets": [
                {"preset": "reference", "layers": [0, 1], "effects": effects(1.02, 1.04)},
                {"preset": "reference", "layers": [0, 2], "effects": effects(1.2, 2.309)},
                {"preset": "paper", "layers": [0, 2], "effects": effects(9.5, 94.46)},
            ],
            "auto": {"reference": [0, 1], "paper": []},
        },
        "experts": {
            "layout": LAYOUT,
            "densities": [
                {"density": 0.75, "effects": effects(1.03, None)},
                {"density": 0.5, "effects": effects(1.4, None)},
            ],
        },
        "retrieval": retrieval(),
        **changes,
    }


def written(path, **changes):
    path.write_text(json.dumps(content(**changes)))
    return path


def gate(calibration=None, **changes):
    settings = {"missing": "nothing there", "bank": PAConfig(), "layers": (0, 2), "layout": LAYOUT, **changes}
    return Gate(calibration, **settings)


@pytest.fixture
def known(tmp_path):
    return Calibration.load(written(tmp_path / NAME))


def test_a_file_comes_back_with_what_others_wrote(tmp_path):
    later = {"later": {"layers": [3, 4], "heads": {"3": [1]}}}
    found = Calibration.load(written(tmp_path / "a.json", **later))
    found.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == content(**later)
    assert Calibration.load(tmp_path / "b.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert Calibration.load(written(tmp_path / "c.json", banks=None, experts=None)).banks is None
    old = {name: section for name, section in content().items() if name != "retrieval"}
    (tmp_path / "d.json").write_text(json.dumps(old))
    assert Calibration.load(tmp_path / "d.json").retrieval is None
    older = retrieval(nulls="") | {"nulls": []}
    older["attention"] = {**older["attention"], "nulls": {}}
    found = Calibration.load(written(tmp_path / "e.json", retrieval=older)).retrieval
    assert (found.nulls, found.activity.nulls, found.attention.nulls) == ([], "", {})


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is not a calibration file"),
        ("{}", "is not a calibration file"),
        (json.dumps(content(version=2)), "is of version 2"),
        (json.dumps(content(version=None)), "is of version None"),
        (json.dumps(content(model={"name": "m"})), "is damaged: model.fingerprint"),
        (json.dumps(content(plain={"prompt": "11", "decoded": 1})), "is damaged: plain.prompt"),
        (
            json.dumps(content(banks={**content()["banks"], "layers": {"observe": {}}})),
            "is damaged: banks.layers.observe",
        ),
        (json.dumps(content(banks={**content()["banks"], "sets": [{"preset": "paper"}]})), "is damaged: banks.sets.0"),
        (json.dumps(content(banks={**content()["banks"], "surprise": 1})), "is damaged: banks.surprise"),
        (json.dumps(content()).replace("94.46", "-94.46"), "is damaged: banks.sets.2.effects.prompt.ratio"),
        (json.dumps(content()).replace("94.46", "NaN"), "is damaged: banks.sets.2.effects.prompt.ratio"),
        (json.dumps(content())[:400], "cannot be read"),
        (json.dumps(content(retrieval={"layers": [3]})), "is damaged: retrieval.facts"),
        (json.dumps(content(retrieval=retrieval(bits=100))), "is damaged: retrieval.activity.bits"),
        (json.dumps(content(retrieval=retrieval(mean="AAA"))), "is damaged: retrieval.activity.mean"),
        (json.dumps(content(retrieval=retrieval(mean=""))), "is damaged: retrieval.activity.mean"),
        (json.dumps(content(retrieval=retrieval(mean=pack(np.full(48, np.nan))))), "retrieval.activity.mean"),
        (json.dumps(content(retrieval=retrieval(mean=pack(np.zeros(47))))), "is damaged: retrieval.activity: "),
        (json.dumps(content(retrieval=retrieval(deviation=pack(np.zeros(48))))), "is damaged: retrieval.activity: "),
        (json.dumps(content(retrieval=retrieval(nulls="A"))), "is damaged: retrieval.activity.nulls"),
        (json.dumps(content(retrieval={**retrieval(), "nulls": [2, 3]})), "is damaged: retrieval: "),
        (json.dumps(content(retrieval={**retrieval(), "nulls": []})), "nulls without their lengths"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, broken, says):
    (tmp_path / NAME).write_text(broken)
    with pytest.raises(ConfigError) as caught:
        find(tmp_path, None, lambda: PRINT)
    assert str(tmp_path / NAME) in str(caught.value)
    assert says in str(caught.value)
    assert "pacellm calibrate" in str(caught.value)
    assert caught.value.param == "calibration"


def test_where_it_lies(tmp_path, caplog):
    assert beside(tmp_path) == tmp_path / NAME
    (tmp_path / "x.gguf").write_text("")
    assert beside(tmp_path / "x.gguf") == tmp_path / f"x.gguf.{NAME}"
    assert beside("owner/name") is None
    assert find("owner/name", None, lambda: PRINT)[0] is None
    assert find(tmp_path, None, lambda: PRINT) == (None, "no calibration of it was found")
    path = written(tmp_path / NAME)
    assert find(tmp_path, None, lambda: PRINT)[0] == Calibration.load(path)
    assert find("owner/name", path, lambda: PRINT)[0] == Calibration.load(path)
    assert "split" in find(tmp_path, None, lambda: None)[1]
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, None, lambda: "00" * 32) == (None, caplog.messages[0].split(": ignored")[0])
    assert "is of another model (fingerprint abab" in caplog.text
    for named in (path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match=r"another model|cannot be read"):
            find(tmp_path, named, lambda: "00" * 32)


def test_what_does_no_harm_passes(known, caplog):
    for layers in ((0, 1), (0,)):
        gate(known, layers=layers).check_start("reference", 0.75)
    gate(None).check_start("observe", 1.0)
    gate(None).check_start(None, 1.0)
    gate(None, layout=None).check_start("observe", 0.5)  # refused by the engine, which says what is missing
    gate(known).check_start("observe", 0.9)
    gate(known, layers=(0, 1)).check_request("reference", 0.75)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "preset", "density", "says"),
    [
        (
            {},
            "reference",
            1.0,
            "preset reference in layers 0,2 makes this model worse: its perplexity becomes 2.309 times",
        ),
        ({}, "paper", 1.0, "its perplexity becomes 94.46 times the plain model's (limit 1.05)"),
        ({"layers": (2,)}, "reference", 1.0, "becomes 1.3 times"),
        ({}, "observe", 0.5, "density 0.5 makes this model worse: its perplexity becomes 1.4 times"),
        ({}, "observe", 0.7, "density 0.7 (measured at 0.5) makes this model worse"),
        (
            {"layers": (1, 2)},
            "paper",
            1.0,
            "(its calibration has other layers): run `pacellm calibrate MODEL --pa-layers 1,2`",
        ),
        (
            {"bank": PAConfig(bank_size=50)},
            "paper",
            1.0,
            "its calibration is of banks of 100 slots and segments of 1024",
        ),
        ({"bank": PAConfig(segment=64)}, "paper", 1.0, "100 and 64 are served"),
        ({"layout": "00" * 32}, "observe", 0.5, "(its calibration is of another layout)"),
        ({}, "observe", 0.3, "(its calibration ends above that)"),
        (
            {"calibration": None},
            "reference",
            1.0,
            "nobody has measured what preset reference in layers 0,2 does to this",
        ),
        (
            {"calibration": None},
            "observe",
            0.5,
            "nobody has measured what density 0.5 does to this model (nothing there)",
        ),
    ],
)
def test_harm_and_ignorance_need_the_flag(known, caplog, changes, preset, density, says):
    found = gate(**{"calibration": known, **changes})
    param = "pa_preset" if preset != "observe" else "ce_density"
    with pytest.raises(ConfigError) as caught:
        found.check_start(preset, density)
    assert says in str(caught.value)
    assert FLAG in str(caught.value)
    assert caught.value.param == param
    with pytest.raises(RequestError) as refused:
        found.check_request(preset, density)
    assert (refused.value.status, refused.value.code) == (400, "worse_answers")
    assert refused.value.param == {"pa_preset": "pacellm.pa", "ce_density": "pacellm.ce_density"}[param]
    assert says in str(refused.value)
    assert FLAG in str(refused.value)
    open_gate = gate(**{"calibration": known, **changes, "accepts": True})
    with caplog.at_level(logging.WARNING):
        open_gate.check_start(preset, density)
    assert says in caplog.text
    open_gate.check_request(preset, density)


def test_auto_takes_what_was_found(known):
    assert gate(known).harmless_layers("reference") == (0, 1)
    assert gate(known).harmless_layers("observe") == (0, 1)
    for found, preset, says in (
        (gate(known), "paper", "found no layer in which preset paper does no harm"),
        (gate(None), "observe", "nothing there; run `pacellm calibrate MODEL`"),
        (gate(known, bank=PAConfig(segment=64)), "observe", "its calibration has no such banks"),
    ):
        with pytest.raises(ConfigError) as caught:
            found.harmless_layers(preset)
        assert says in str(caught.value)
        assert caught.value.param == "pa_layers"


def test_a_fingerprint_tells_models_apart_and_not_formats():
    import torch

    found = model_sample(tiny("llama"))
    assert found == model_sample(tiny("llama"))
    assert found == model_sample(tiny("llama").to(torch.bfloat16))
    assert found != model_sample(tiny("llama", seed=1))
    assert found != model_sample(tiny("qwen2"))
    module = tiny("llama")
    patch(module, [1])
    assert found == model_sample(module)
    for name in ("q_proj.weight", "norm.weight", "lm_head.weight"):
        module = tiny("llama")
        next(weight for own, weight in module.named_parameters() if own.endswith(name)).data[-1] += 0.5
        assert found != model_sample(module), name
    module = tiny("llama")
    module.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert found != model_sample(module)
    module = tiny("llama")
    assert found != model_sample(apply_layout(prepare(module), random_layout(module)).module)


def test_the_text_is_a_few_thousand_tokens_of_prose():
    found = text()
    assert 14_000 < len(found) < 18_000
    assert len(set(found.split())) > 1_000
