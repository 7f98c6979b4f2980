"""``pacellm calibrate`` and what ``pacellm serve`` makes of its file, on the bundled model."""

import hashlib
import json
import logging
import shutil

import httpx
import pytest

from pacellm.calibration import perplexity as measure
from pacellm.calibration.file import NAME, Calibration
from pacellm.calibration.gate import FLAG
from pacellm.calibration.run import ACTING
from pacellm.cli.main import main, serve_options
from pacellm.cli.serve import build
from pacellm.config import EngineConfig, default_pa_layers
from pacellm.demo import MODEL_PATH
from pacellm.demo.known_text import known_text
from pacellm.experts.apply import model_fingerprint, weight_features
from pacellm.experts.cluster import shuffled
from pacellm.experts.layout import Layout
from pacellm.model.fingerprint import model_sample
from pacellm.model.load import load
from tests.server.conftest import NAME as MODEL
from tests.server.conftest import Live

pytestmark = pytest.mark.usefixtures("root_logger")
WORKING = ("--kv-cache-memory-bytes", "256M", "--working-memory", "4K", "--max-history", "16K")
SMALL = ("--kv-cache-memory-bytes", "256M", "--max-model-len", "4K")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The beginning of the text that the bundled model knows: some 400 tokens."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(known_text()[:1700])
    return path


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Random experts for the bundled model."""
    module = load(MODEL_PATH).module
    layers = {layer: shuffled(one, 64, layer) for layer, one in weight_features(module).items()}
    path = tmp_path_factory.mktemp("layout") / "layout.safetensors"
    Layout(layers, "random", "none", 0, model_fingerprint(module), {}).save(path)
    return path


@pytest.fixture(scope="module")
def calibrated(short, layout, tmp_path_factory):
    """A file, made with all there is."""
    path = tmp_path_factory.mktemp("made") / "made.json"
    flags = ["--text", str(short), "-o", str(path), "--ce-layout", str(layout), "--pa-layers", "3,2"]
    assert main(["calibrate", *flags]) == 0
    return path


def test_the_shipped_file_is_of_the_shipped_model():
    found = Calibration.load(MODEL_PATH / NAME)
    assert found.model.fingerprint == model_sample(load(MODEL_PATH).module)
    assert found.text.digest == hashlib.sha256(known_text().encode()).hexdigest()
    layers = default_pa_layers(5)
    assert found.banks.of("reference", layers).worst < 1.05 < found.banks.of("paper", layers).worst
    assert found.banks.auto["reference"]
    assert found.experts is not None


def test_the_shipped_file_knows_what_retrieves():
    found = Calibration.load(MODEL_PATH / NAME).retrieval
    assert found.facts == 24
    assert set(found.attention.alone) == {"3", "4"}
    assert min(found.attention.found.own, found.attention.found.other) > 0.8
    assert min(found.activity.found.own, found.activity.found.other) > 0.9


@pytest.mark.parametrize(
    ("flags", "indexes"),
    [
        ([], ("lexical", "activity")),
        (["--working-memory-index", "attention"], ("attention",)),
        (["--working-memory-index", "activity,lexical"], ("activity", "lexical")),
    ],
)
def test_serve_takes_indexes_from_the_calibration(flags, indexes, caplog):
    service, _, _ = build(serve_options([*WORKING, *flags]))
    assert service.engine.config.working_memory_index == indexes
    service.engine.close()
    assert "by words alone" not in caplog.text


def test_serve_without_a_calibration_goes_by_words(tmp_path, capsys, caplog):
    plain = tmp_path / "model"
    shutil.copytree(MODEL_PATH, plain, ignore=shutil.ignore_patterns(NAME))
    service, _, _ = build(serve_options([str(plain), *WORKING]))
    assert service.engine.config.working_memory_index == ("lexical",)
    service.engine.close()
    assert "by words alone: nobody has calibrated" in caplog.text
    assert main(["serve", str(plain), *WORKING, "--working-memory-index", "activity"]) == 2
    assert "working_memory_index names activity" in capsys.readouterr().err
    for wrong in ("", "lexical,lexical", "words"):
        with pytest.raises(SystemExit):
            serve_options([*WORKING, "--working-memory-index", wrong])
        assert "argument --working-memory-index" in capsys.readouterr().err


def test_a_table_a_picture_and_what_was_measured(short, layout, calibrated, tmp_path, capsys, monkeypatch):
    found = Calibration.load(calibrated)
    assert list(found.banks.layers) == list(ACTING)
    assert all(list(layers) == list("01234") for layers in found.banks.layers.values())
    assert all(found.banks.of(preset, layers) for preset in ACTING for layers in ((1, 4), (2, 3)))
    assert found.experts.layout == Layout.load(layout).digest
    monkeypatch.setattr(measure.Meter, "banks", lambda *_: pytest.fail("measured again"))
    again = tmp_path / "again.json"
    again.write_text(calibrated.read_text())
    flags = ["--text", str(short), "-o", str(again), "--ce-layout", str(layout), "--plot", str(tmp_path / "a.png")]
    assert main(["calibrate", *flags]) == 0
    printed = capsys.readouterr()
    assert Calibration.load(again) == found
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    for line in ("plain perplexity", "reference in layers 1,4", "paper in layers 2,3", "density 0.75", str(again)):
        assert line in printed.out
    assert "left" in printed.err


def test_a_stopped_run_goes_on_and_others_sections_stay(short, calibrated, tmp_path, monkeypatch):
    path, whole = tmp_path / "a.json", Calibration.load(calibrated)
    own = {"later": {"layers": [3]}}
    path.write_text(json.dumps(json.loads(calibrated.read_text()) | {"banks": None, "experts": None} | own))
    banks = measure.Meter.banks
    calls = []

    def stops(*arguments):
        calls.append(arguments[2])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return banks(*arguments)

    monkeypatch.setattr(measure.Meter, "banks", stops)
    assert main(["calibrate", "--text", str(short), "-o", str(path)]) == 130
    assert Calibration.load(path).banks is None
    assert main(["calibrate", "--text", str(short), "-o", str(path), "--pa-layers", "2,3"]) == 0
    assert calls[4:8] == [[2], [2], [2], [3]]
    found = Calibration.load(path)
    assert found.banks == whole.banks
    assert found.model_extra == own
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--text", "no/such.txt"], "no/such.txt cannot be read"),
        (["--pa-layers", "1,9"], "pa_layers names layer 9; layers that can have a bank: 0, 1, 2, 3, 4"),
        (["--pa-segment", "0"], "segment must be at least 1"),
        (["owner/name"], "say where the calibration goes: -o FILE"),
        (["no/such/model"], "does not exist"),
        (["--ce-layout", "no.safetensors"], "no.safetensors cannot be read"),
        (["-o", "no/such/place.json"], "cannot be written to no/such/place.json"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(flags, says, capsys):
    assert main(["calibrate", *flags]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_text_that_means_nothing_to_the_model_is_refused(tmp_path, capsys):
    """The bundled model knows one kind of document; by other prose everything looks harmless."""
    assert main(["calibrate", str(MODEL_PATH), "-o", str(tmp_path / "a.json")]) == 2
    assert "does not know this kind of text" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "a.txt").write_text("a word or two")
    assert main(["calibrate", "--text", str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.json")]) == 2
    assert "at least 96 are needed" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.json").exists()


def refused(capsys, *flags):
    assert main(["serve", *SMALL, *flags]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_serve_refuses_harm(capsys, tmp_path, layout, calibrated):
    says = refused(capsys, "--pa-preset", "paper")
    assert "preset paper in layers 1,4 makes this model worse" in says
    assert FLAG in says
    assert "nobody has measured" in refused(capsys, "--pa-preset", "paper", "--pa-layers", "0,2")
    assert "nobody has measured" in refused(capsys, "--ce-layout", str(layout), "--ce-density", "0.5")
    says = refused(capsys, "--calibration", str(calibrated), "--ce-layout", str(layout), "--ce-density", "0.3")
    assert "ends above that" in says
    (tmp_path / "a.json").write_text("{")
    assert f"calibration {tmp_path / 'a.json'} cannot be read" in refused(
        capsys, "--calibration", str(tmp_path / "a.json")
    )
    foreign = json.loads(calibrated.read_text())
    foreign["model"]["fingerprint"] = "00" * 32
    (tmp_path / "a.json").write_text(json.dumps(foreign))
    assert "is of another model" in refused(capsys, "--calibration", str(tmp_path / "a.json"))


def test_auto_takes_the_harmless_layers():
    auto = Calibration.load(MODEL_PATH / NAME).banks.auto
    for preset in ("observe", *ACTING):
        service, _, _ = build(serve_options([*SMALL, "--pa-layers", "auto", "--pa-preset", preset]))
        assert service.engine.config.pa_layers == tuple(auto["reference" if preset == "observe" else preset])
        service.engine.close()
    service, _, _ = build(serve_options([*SMALL, "--pa-layers", "auto", "--no-pa"]))
    assert not service.engine.config.pa
    service.engine.close()


@pytest.mark.parametrize("accepts", [False, True])
def test_requests_are_held_to_it(layout, accepts, caplog):
    flags = [*SMALL, "--ce-layout", str(layout), *([FLAG] if accepts else [])]
    service, _, _ = build(serve_options(flags))
    with Live(service) as live:
        for asked, is_fine in (
            ({}, True),
            ({"pa": "on"}, True),
            ({"pa": "off"}, True),
            ({"pa": "observe"}, True),
            ({"pa": "reference"}, True),
            ({"pa": "paper"}, accepts),
            ({"pa": "paper_read_only"}, accepts),
            ({"ce_density": 0.5}, accepts),
            ({"ce_density": 1.0}, True),
        ):
            for path, body in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
                ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
                ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
            ):
                answer: httpx.Response = live.http.post(path, json={"model": MODEL, "pacellm": asked, **body})
                assert answer.status_code == (200 if is_fine else 400), (asked, answer.text)
                if not is_fine:
                    error = answer.json()["error"]
                    assert error["code"] == "worse_answers"
                    assert error["param"] == f"pacellm.{next(iter(asked))}"
                    assert FLAG in error["message"]


def test_an_engine_of_ones_own_is_exempt():
    """Offline everything may be tried."""
    from pacellm.config import PAConfig
    from pacellm.engine.engine import Engine

    Engine(load(MODEL_PATH), EngineConfig(bank=PAConfig(preset="paper"), kv_cache_memory=2**26)).close()


def test_serve_says_what_was_accepted(caplog):
    with caplog.at_level(logging.WARNING):
        service, _, _ = build(serve_options([*SMALL, "--pa-preset", "paper", FLAG]))
    service.engine.close()
    assert "preset paper in layers 1,4 makes this model worse" in caplog.text
    assert f"accepted ({FLAG})" in caplog.text
