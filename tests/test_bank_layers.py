"""The experiment on real models: its documents, its banks beside the engine's, a stopped run that goes on."""

import json
import random
import sys

import pytest
import torch

from load_tests import bank_layers
from load_tests.layers.bench import Bench
from load_tests.layers.documents import OPENING, Library
from load_tests.layers.rig import Rig, branch
from pacellm import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.probe import Probe
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.llm import TENANT
from pacellm.model.load import load
from pacellm.types import GenerationRequest, SamplingParams

WORDS = (
    "the",
    "a",
    "house",
    "river",
    "stands",
    "where",
    "people",
    "walk",
    "at",
    "night",
    "and",
    "nobody",
    "knows",
    "why",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two kinds of prose of a few thousand tokens."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for kind in ("essays", "manual"):
        (folder / kind).mkdir()
        for name in ("one", "two"):
            sentences = [" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(200)]
            (folder / kind / f"{name}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="module")
def library(texts):
    return Library(str(MODEL_PATH), texts, tokens=256, rest=32, questions=3)


@pytest.fixture(scope="module")
def rig():
    return Rig(str(MODEL_PATH))


def test_documents_hold_their_facts_and_alternate_in_kind(library):
    documents = library.documents(4)
    assert [document.name for document in documents] == ["essays/one.0", "manual/one.0", "essays/two.0", "manual/two.0"]
    for document in documents:
        assert (len(document.read), len(document.rest), len(document.asked)) == (256, 32, 3)
        text = library._tokenizer.decode(document.read)
        for question, answer in document.asked:
            name = library._tokenizer.decode(question).split("access code of the ")[1].split(" archive")[0]
            code = library._tokenizer.decode(answer).strip()
            assert f"{OPENING.format(name)} {code}." in text
    assert len({tuple(document.rest) for document in documents}) == 4


def test_a_folder_with_too_little_prose_is_refused(library):
    with pytest.raises(SystemExit, match="not 1000"):
        library.documents(1000)


@torch.inference_mode()
def test_layers_below_the_banks_are_left_out_to_the_bit(rig, library):
    document = library.documents(1)[0]
    bench, config = Bench(rig, document, 1), PAConfig(segment=64, bank_size=8, preset="paper")
    banks = rig.banks((2, 4), config)
    scores = bench.go_on(banks, bench.read(banks))

    learned = bench.learn(rig.banks((2, 4), config))
    again, cache = rig.banks((2, 4), config), rig.cache()
    for layer, bank in again.items():
        rig.downs[layer].bank, rig.downs[layer].writes = bank, True
    rig._forward(document.head + document.read, cache, [0])
    for layer in again:
        rig.downs[layer].writes = False
    found = bench._scores([rig._forward(turn.ids, branch(cache), turn.rows) for turn in bench.turns]).found
    for layer, bank in again.items():
        rig.downs[layer].bank = None
        assert torch.equal(bank.keys, banks[layer].keys)
        assert torch.equal(bank.values, banks[layer].values)
        assert all(torch.equal(*pair) for pair in zip(learned[layer], bank.state, strict=True) if pair[0].ndim == 2)
    assert all(torch.equal(one, other) for one, other in zip(found, scores.found, strict=True))


@torch.inference_mode()
def test_banks_are_those_of_the_engine(rig, library):
    document = library.documents(1)[0]
    config = PAConfig(preset="reference", segment=64, bank_size=8)
    banks = rig.banks((2, 3), config)
    Bench(rig, document, 1).read(banks)

    engine = Engine(load(MODEL_PATH), EngineConfig(bank=config, pa_layers=(2, 3), kv_cache_memory=2**26))
    ids = document.head + document.read
    engine.add(GenerationRequest("read", ids, SamplingParams(max_tokens=0), session=(TENANT, "s")))
    run_until_idle(engine)
    for layer, state in Probe(engine).banks("s").items():
        assert torch.equal(state.usage, banks[layer].usage)
        assert torch.allclose(state.keys, banks[layer].keys, atol=1e-4)
        assert torch.allclose(state.values, banks[layer].values, atol=1e-4)


def test_a_run_ends_with_json_and_a_second_takes_what_is_there(texts, tmp_path, monkeypatch, capsys):
    arguments = ["bank_layers.py", str(MODEL_PATH), "--texts", str(texts), "--out", str(tmp_path / "run"), "--small"]
    monkeypatch.setattr(sys, "argv", arguments)
    bank_layers.main()
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    layers = len(first["layers"]["alone, own/foreign"]["paper"])
    assert [row["documents"] for row in first["rows"]] == [2] * 10
    assert all(row["alone"]["own/off"][1] <= row["alone"]["own/off"][2] for row in first["rows"])

    lines = (tmp_path / "run.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6 * layers + 20
    (tmp_path / "run.jsonl").write_text("".join(lines[:-7]))  # as if it had been stopped
    bank_layers.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
