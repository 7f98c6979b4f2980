"""Layouts: made, written, read, applied; what is damaged or foreign is refused."""

import dataclasses

import pytest
import torch

from pacellm.cli.main import main
from pacellm.errors import ConfigError
from pacellm.experts.apply import apply_layout, model_fingerprint, weight_features
from pacellm.experts.cluster import Features, cluster, cluster_layers, shuffled
from pacellm.experts.layout import Layout
from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import new_engine, prompt, request, run
from tests.models import FAMILIES, tiny


def random_layout(module, experts=6, seed=0):
    """Random experts for a tiny model."""
    layers = {layer: shuffled(one, experts, seed + layer) for layer, one in weight_features(module).items()}
    return Layout(layers, "random", "none", seed, model_fingerprint(module), {})


def first_logits(model, ids, **changes):
    """The log-probabilities of the alternatives after a prompt, and of those after it with what was chosen."""
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=20, ignore_eos=True)
    events = run(new_engine(model, **changes), request("a", ids, sampling))["a"]
    return [dict(one.top) for event in events for one in getattr(event, "logprobs", ())]


@pytest.mark.parametrize("pa", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_changes_rounding_only(family, pa):
    """The paper's claim about CE as the released code has it: alone, and beside banks, it changes nothing."""
    ids = prompt(300)
    plain = first_logits(prepare(tiny(family)), ids, pa=pa)
    module = tiny(family)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    model = apply_layout(prepare(module), random_layout(module))
    assert any(not torch.equal(before[name], weight) for name, weight in module.named_parameters())
    found = first_logits(model, ids, pa=pa)
    assert len(found) == len(plain) == 6
    for mine, theirs in zip(found, plain, strict=True):
        shared = mine.keys() & theirs.keys()
        assert len(shared) >= 19
        assert all(abs(mine[token] - theirs[token]) < 2e-4 for token in shared)


def test_two_layouts_on_one_model_are_refused():
    module = tiny("llama")
    layout = random_layout(module)
    model = apply_layout(prepare(module), layout)
    with pytest.raises(ConfigError, match="already"):
        apply_layout(model, layout)


def test_a_file_comes_back(tmp_path):
    layout = random_layout(tiny("llama"))
    layout.save(tmp_path / "a.safetensors")
    found = Layout.load(tmp_path / "a.safetensors")
    assert found.digest == layout.digest
    assert (found.method, found.features, found.seed, found.fingerprint) == ("random", "none", 0, layout.fingerprint)
    assert found.layers.keys() == layout.layers.keys()
    for layer, one in layout.layers.items():
        assert torch.equal(found.layers[layer].permutation, one.permutation)
        assert found.layers[layer].objective == one.objective


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    random_layout(tiny("llama")).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in range(header, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ConfigError, match="ce_layout"):
            Layout.load(path)


@pytest.mark.parametrize("content", [None, b"", b"not a layout", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_what_is_no_layout_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="pacellm cluster"):
        Layout.load(path)


def test_another_model_is_refused():
    layout = random_layout(tiny("llama"))
    with pytest.raises(ConfigError, match="another model"):
        apply_layout(prepare(tiny("llama", seed=1)), layout)
    missing = dataclasses.replace(layout, layers={0: layout.layers[0]})
    with pytest.raises(ConfigError, match="other layers"):
        apply_layout(prepare(tiny("llama")), missing)


def test_the_dtype_does_not_matter_to_the_fingerprint():
    module = tiny("llama", dtype=torch.bfloat16)
    assert model_fingerprint(module) == model_fingerprint(module.float())


def test_clusters_are_balanced_and_tighter_than_chance(tmp_path):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=generator)
    points = centres.repeat_interleave(6, 0)[torch.randperm(48, generator=generator)]
    features = Features(points + 0.01 * torch.randn(48, 16, generator=generator), torch.ones(48))
    found = cluster(features, 8, seed=0)
    assert found.bounds.tolist() == list(range(0, 49, 6))
    assert found.objective < 0.6 * shuffled(features, 8, 0).objective
    assert found.heat.sum() == pytest.approx(1)


def test_a_stopped_run_goes_on(tmp_path):
    features = weight_features(tiny("llama"))
    seen = []

    def stop(layer, found, is_new):
        seen.append((layer, is_new))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster_layers(features, 6, 0, tmp_path, workers=1, on_layer=stop)
    again = []
    found = cluster_layers(
        features, 6, 0, tmp_path, workers=1, on_layer=lambda layer, one, is_new: again.append((layer, is_new))
    )
    assert again == [(0, False), (1, False), (2, True)]
    whole = cluster_layers(features, 6, 0, tmp_path / "other", workers=2)
    for layer in features:
        assert torch.equal(found[layer].permutation, whole[layer].permutation)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--experts", "7"], "must divide the 512 neurons"),
    (["--features", "activations"], "go together"),
    (["--calibration", "missing.txt"], "go together"),
    (["--features", "activations", "--calibration", "missing.txt"], "cannot be read"),
    (["--workers", "0"], "workers must be at least 1"),
    (["--inspect", "missing.safetensors"], "ce_layout"),
])  # fmt: skip
def test_bad_arguments(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["cluster", "-o", "out.safetensors", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_commands_on_the_bundled_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The access code of the amber archive is 48213. " * 40)
    made = ["--features", "activations", "--calibration", "text.txt", "--experts", "16", "--workers", "1"]
    assert main(["cluster", "-o", "out.safetensors", *made]) == 0
    assert main(["cluster", "--inspect", "out.safetensors"]) == 0
    assert "kmeans on activations" in capsys.readouterr().out
    assert main(["experts", "text.txt", "--ce-layout", "out.safetensors", "-o", "fire.png"]) == 0
    for name in ("out.png", "fire.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out.safetensors.parts").exists()
