"""bench_penalties.py: once with --quick, and a wrong result stops it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("bench_penalties")
    sys.modules.pop("bench_penalties")  # what a test has replaced in it


def run_quick(bench, tmp_path, only):
    arguments = ["--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    return bench.main([*arguments, "--only", only])


@pytest.mark.parametrize("only", ["64 x 64", "Critic"])
def test_quick_run(bench, tmp_path, only):
    assert run_quick(bench, tmp_path, only) == 0
    (group,) = json.loads((tmp_path / "penalties.json").read_text())["groups"]
    rows = {row["what"]: row for row in group["rows"]}
    assert rows[bench.PLAIN]["ratio"]["median"] == 1
    assert not any(row["ours"] for name, row in rows.items() if name == bench.PLAIN or bench.TWIN in name)  # fmt: skip
    assert sum(row["ours"] for row in rows.values()) >= 3
    assert group["facts"]["largest error"] < sys.modules["training_steps"].RTOL


def test_the_promise_for_twenty_layers_is_a_target_beside_a_twin(bench):
    title, build = bench.groups()[0]
    assert title.startswith("20 Linear")
    group = build(bench.harness.parser("").parse_args(["--quick"]))
    variants = {v.name: v for v in group.variants}
    assert bench.SPECTRAL_TWIN in variants
    assert group.unit == bench.PLAIN
    assert any(t.than == "" and t.limit <= 1.15 for t in variants[bench.SPECTRAL].targets)


@pytest.mark.parametrize(
    ("name", "only", "message"),
    [
        ("frobenius_penalty", "64 x 64", "frobenius_penalty"),
        ("power_iteration", "64 x 64", "power_iteration, 5 rounds"),
        ("spectral_twin", "64 x 64", "SpectralNormPenalty: the same in torch"),
        ("gradient_penalty", "Critic", "gradient_penalty"),
        ("r1_penalty", "Critic", "r1_penalty"),
    ],
)
def test_a_wrong_result_stops_it(bench, tmp_path, capsys, monkeypatch, name, only, message):
    right = getattr(bench, name)
    monkeypatch.setattr(bench, name, lambda *a, **k: 1.5 * right(*a, **k))
    assert run_quick(bench, tmp_path, only) == 1
    error = capsys.readouterr().err
    assert "wrong result, not timed" in error
    assert f"a step: {message}" in error
    assert not (tmp_path / "penalties.json").exists()
