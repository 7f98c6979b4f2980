"""The GPU bench runs through on a tiny model; what it prints there is no measurement."""

import json

import pytest
import torch

from load_tests import gpu_bench
from load_tests.gpu import rig as rigs
from load_tests.gpu import sets
from pacellm.model import prefill_kernels
from tests.model import stand_ins


def bench(path, parts, *more):
    gpu_bench.main(["--small", "--parts", parts, "--output", str(path), "--folder", str(path.parent), *more])
    return json.loads(path.read_text())


def test_parts_are_added_to_the_file(tmp_path):
    first = bench(tmp_path / "out.json", "growth")
    found = bench(tmp_path / "out.json", "growth,second,forks")
    assert found["growth"] == first["growth"], "a part that is there is not measured again"
    assert found["second"]["resident"]["session"] == "resident"
    assert found["second"]["host"]["session"] == found["second"]["disk"]["session"] == "restored"
    assert found["forks"]["100"]["bytes_added_each"] < 100 * 512 * 512
    assert found["limits"].keys() >= {"matrix_flops", "copy_bytes", "host_to_device_bytes", "disk_read_bytes"}


def test_working_sets(tmp_path):
    found = bench(tmp_path / "out.json", "sets")["sets"]
    assert found["2"]["whole"]["part_read"] == 1.0
    assert found["2"]["half_alike"]["part_read"] == found["1"]["half"]["part_read"] == 0.5
    assert 0.5 < found["2"]["half"]["part_read"] < 1.0


def test_steps_ahead_give_the_same_tokens(tmp_path):
    found = bench(tmp_path / "out.json", "ahead")
    assert all(found["ahead"][batch]["same_tokens"] for batch in ("1", "3"))


def test_kernels_that_are_not_there_say_so(tmp_path):
    found = bench(tmp_path / "out.json", "kernels")["kernels"]
    assert all("why_not" in found[name] for name in ("flash", "cudnn", "flash-attn-2", "flash-attn-3"))


def test_kernels(tmp_path, monkeypatch):
    stand_ins.everything(monkeypatch)
    monkeypatch.setattr(prefill_kernels, "CUDNN_STEP", 128)
    found = bench(tmp_path / "out.json", "kernels")["kernels"]
    for name in ("flash", "cudnn", "flash-attn-2", "flash-attn-3"):
        assert found[name]["error"] < 1e-4
        assert found[name]["128"]["of_limit"] > 0
        assert found[name]["200"]["floor_seconds"] > found[name]["128"]["floor_seconds"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_other_parts(tmp_path):
    found = bench(tmp_path / "out.json", "prefill,decode,mixed,pa")
    assert isinstance(found["prefill"]["generate"], float)
    assert isinstance(found["decode"]["1x40"]["continuous"], float)
    assert found["mixed"]["share_2"]["times_alone"] > 0
    assert len(found["pa"]["ratios"]) == 2


def test_unknown_parts_are_named(tmp_path):
    with pytest.raises(SystemExit, match="sideways"):
        bench(tmp_path / "out.json", "growth,sideways")


def test_floors_of_the_7b_shape():
    """The numbers in docs/performance.md."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        module = Qwen2ForCausalLM(Qwen2Config(**rigs._SHAPE_7B))

    class Shape:
        dtype, bytes_per_token = torch.bfloat16, 2 * 28 * 4 * 128 * 2

    shape = Shape()
    shape.module = module
    rig = rigs.Rig(shape, False, None)
    assert rig.linear_weights == pytest.approx(6.525e9, rel=1e-3)
    assert rig.decode_bytes([]) == pytest.approx(14.14e9, rel=1e-3)
    assert rig.prefill_flops(200_000) / 790e12 == pytest.approx(13.5, abs=0.1)
    assert sets._bytes(rig, 0, 0, 0.5) == pytest.approx(14.14e9 - 5.70e9, rel=1e-3)
    for batch, floor in ((1, 3.3), (16, 4.2), (64, 6.8)):
        assert rig.decode_bytes([4096] * batch) / 4.3e12 * 1e3 == pytest.approx(floor, abs=0.1)
