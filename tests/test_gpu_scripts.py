"""The GPU scripts run through on a tiny model on a CPU; what they print there is no measurement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from load_tests.gpu import kernels, more, parts, sets
from load_tests.gpu import rig as rigs
from pacellm.model.attention import prefill as prefill_kernels
from tests.model import stand_ins

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def lines(folder, script, *arguments):
    """What a script finds."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "load_tests" / "gpu" / script), str(folder), "--small", *arguments]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-4000:]
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_first_light(tmp_path):
    """All of it, end to end: every part is there, ends well, and says what it is for."""
    found = lines(tmp_path, "first_light.sh")
    ended = [line["part"] for line in found if line["name"] == "end"]
    assert ended == ["card", "tests", "attention", "decode", "bundled", "prefill", "beside"]
    by_name = {(line["part"], line["name"]): line for line in found}
    assert by_name["card", "limits"].keys() >= {"matrix_flops", "copy_bytes", "host_to_device_bytes", "disk_read_bytes"}
    assert all(line["outcome"] == "passed" for line in found if "outcome" in line)
    for mode in rigs.MODES:
        assert by_name["decode", f"{mode}, batch 3"]["of_limit"] > 0
        assert by_name["prefill", f"300 tokens, {mode}"]["of_limit"] > 0
    ways = [line for line in found if line["part"] == "bundled" and "asked" in line]
    assert len(ways) == 5
    assert all(line["as_on_cpu"] == line["right"] == line["asked"] for line in ways)
    assert by_name["bundled", "demo"]["status"] == 0
    assert by_name["beside", "a second question, host"]["tokens"] > 400


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path):
    with pytest.raises(AssertionError, match="invalid choice"):
        lines(tmp_path, "first_light.sh", "sideways", "card")
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["part"], line["status"]) for line in found if line["name"] == "end"] == [("sideways", 2), ("card", 0)]


@pytest.fixture(scope="module")
def rig():
    return rigs.build(CPU, small=True)


@pytest.fixture(scope="module")
def limits():
    return rigs.limits(CPU, small=True)


def test_forks_share_their_document(rig, limits):
    found = more.forks(rig, limits)["100"]
    assert found["bytes_held"] <= 2 * (found["count"] + 1) * 512 * rig.model.bytes_per_token
    assert found["times_faster"] > 0


def test_growth(rig, limits):
    assert more.growth(rig, limits)["fit"].keys() == {"a", "b", "c", "largest_residual"}


def test_working_sets(rig, limits):
    found = sets.sets(rig, limits)
    assert found["2"]["whole"]["part_read"] == 1.0
    assert found["2"]["half_alike"]["part_read"] == found["1"]["half"]["part_read"] == 0.5
    assert 0.5 < found["2"]["half"]["part_read"] < 1.0


def test_kernels_that_are_not_there_say_so(rig, limits):
    found = kernels.kernels(rig, limits)
    assert all("why_not" in found[name] for name in ("flash", "cudnn", "flash-attn-2", "flash-attn-3"))


def test_kernels(rig, limits, monkeypatch):
    stand_ins.everything(monkeypatch)
    monkeypatch.setattr(prefill_kernels, "CUDNN_STEP", 128)
    found = kernels.kernels(rig, limits)
    for name in ("flash", "cudnn", "flash-attn-2", "flash-attn-3"):
        assert found[name]["error"] < 1e-4
        assert found[name]["128"]["of_limit"] > 0
        assert found[name]["200"]["floor_seconds"] > found[name]["128"]["floor_seconds"]


def test_a_real_models_answers_are_compared():
    assert parts._same([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5, 6]]) == [1, 2]


def test_floors_of_the_7b_shape():
    """The numbers in docs/performance.md."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        module = Qwen2ForCausalLM(Qwen2Config(**rigs._SHAPE_7B))

    class Shape:
        dtype, bytes_per_token = torch.bfloat16, 2 * 28 * 4 * 128 * 2

    shape = Shape()
    shape.module = module
    big = rigs.Rig(shape, False, None)
    assert big.linear_weights == pytest.approx(6.525e9, rel=1e-3)
    assert big.decode_bytes([]) == pytest.approx(14.14e9, rel=1e-3)
    assert big.prefill_flops(200_000) / 790e12 == pytest.approx(13.5, abs=0.1)
    assert sets._bytes(big, 0, 0, 0.5) == pytest.approx(14.14e9 - 5.70e9, rel=1e-3)
    for batch, floor in ((1, 3.3), (16, 4.2), (64, 6.8)):
        assert big.decode_bytes([4096] * batch) / 4.3e12 * 1e3 == pytest.approx(floor, abs=0.1)
