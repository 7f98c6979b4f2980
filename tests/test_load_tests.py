"""The arithmetic of the load tests: what they print must be right."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "load_tests"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_loads_and_explains_itself(path):
    module = script(path.stem)
    assert f"python load_tests/{path.name}" in module.__doc__
    assert "last line is JSON" in module.__doc__.replace("\n", " ")
    assert callable(module.main)


def test_wilson_interval():
    low, high = script("recall").interval(95, 100)
    assert (low, high) == pytest.approx((0.888, 0.978), abs=1e-3)
    assert script("recall").interval(100, 100)[1] == pytest.approx(1.0)


def test_recall_is_summarised_by_length_and_mode():
    outcomes = [
        {"mode": mode, "length": 1024, "seed": seed, "depth": depth, "right": depth != 0.5}
        for mode in ("off", "on")
        for seed in range(2)
        for depth in (0.1, 0.5, 0.9, -1.0)
    ]
    off, _ = script("recall").summarise(outcomes)
    assert (off["asked"], off["right"], off["unknown"], off["not_stated_right"]) == (6, 4, 2, 2)


def test_fit_finds_a_quadratic_and_a_line():
    rows = [
        {"tokens": n, "seconds": 0.5 + 1e-3 * n + 2e-9 * n * n, "peak_mib": 500 + n * 8192 / 2**20}
        for n in (1000, 4000, 20_000, 100_000, 200_000)
    ]
    found = script("prefill_bench").fit(rows)
    assert found["seconds"] == pytest.approx([0.5, 1e-3, 2e-9], rel=1e-6)
    assert found["memory_bytes_per_token"] == pytest.approx(8192, rel=1e-6)
    assert found["memory_r2"] == pytest.approx(1.0)


def test_bootstrap_covers_the_mean():
    low, high = script("bank_experiment").bootstrap([0.0, 1.0, 2.0, 3.0])
    assert 0.0 <= low < 1.5 < high <= 3.0
