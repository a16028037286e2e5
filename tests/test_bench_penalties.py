"""bench_penalties.py: once with --quick, and a wrong result stops it."""

from __future__ import annotations

import importlib
import json
import re
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


def checked(bench, only):
    """What the check of that group finds, without timing; on one thread, for two wait for each other in tiny ops."""
    (build,) = [build for title, build in bench.groups() if only in title]
    with bench.harness.threads(1):
        return build(bench.harness.parser("").parse_args(["--quick"])).check()


@pytest.mark.parametrize("only", ["64 x 64", "Critic", "Classifier", "Embedding"])
def test_quick_run(bench, tmp_path, only):
    assert run_quick(bench, tmp_path, only) == 0
    (group,) = json.loads((tmp_path / "penalties.json").read_text())["groups"]
    rows = {row["what"]: row for row in group["rows"]}
    assert rows[bench.PLAIN]["ratio"]["median"] == 1
    assert not any(row["ours"] for name, row in rows.items() if name == bench.PLAIN or bench.TWIN in name)  # fmt: skip
    assert sum(row["ours"] for row in rows.values()) >= 2
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


def without(*names):
    """A function that does not do what these arguments ask for."""
    return lambda right: lambda *a, **k: right(*a, **{x: v for x, v in k.items() if x not in names})


def scaled(right):
    return lambda *a, **k: 1.5 * right(*a, **k)


def instead(**other):
    return lambda right: lambda *a, **k: right(*a, **{**k, **other})


def further(right):
    """Its second argument, the size of what is done, half as large again; fgm_embedding and fgsm alike."""

    def changed(x, size, *rest, **k):
        return right(x, [1.5 * s for s in size] if isinstance(size, list) else 1.5 * size, *rest, **k)  # fmt: skip

    return changed


def further_from_x(right):
    return lambda loss, x, size, **k: right(loss, x, 1.5 * size, **k)


def one_step(right):
    return lambda *a, n_steps, **k: right(*a, n_steps=1, step_size=a[2], **k)


def never_updated(right):
    class Unmoved(right):
        def update(self, *_, **__): ...

    return Unmoved


PENALTIES, PERTURBATIONS = "bench_penalties", "perturbation_cases"


@pytest.mark.parametrize(
    ("module", "name", "fault", "only", "row"),
    [
        (PENALTIES, "SpectralNormPenalty", without("bound"), "64 x 64", "SPECTRAL_HINGE"),
        (PENALTIES, "frobenius_penalty", without("bound"), "64 x 64", "FROBENIUS_HINGE"),
        (PENALTIES, "parameter_gradient_penalty", scaled, "64 x 64", None),
        (PENALTIES, "gradient_penalty", without("one_sided"), "Critic", "ONE_SIDED"),
        (PENALTIES, "gradient_penalty", without("generator"), "Critic", "BETWEEN"),
        (PENALTIES, "r2_penalty", scaled, "Critic", None),
        (PERTURBATIONS, "gaussian_noise", further, "Classifier", "NOISE"),
        (PERTURBATIONS, "gaussian_noise", without("generator"), "Classifier", "NOISE"),
        (PERTURBATIONS, "noise_penalty", scaled, "Classifier", "NOISE_PENALTY"),
        (PERTURBATIONS, "noise_penalty", without("generator"), "Classifier", "NOISE_PENALTY"),
        (PERTURBATIONS, "fgm", further_from_x, "Classifier", "FGM"),
        (PERTURBATIONS, "fgsm", further_from_x, "Classifier", "FGSM"),
        (PERTURBATIONS, "pgd", one_step, "Classifier", "PGD"),
        (PERTURBATIONS, "virtual_adversarial_loss", instead(n_power_iterations=0), "Classifier", "VIRTUAL"),
        (PERTURBATIONS, "virtual_adversarial_loss", without("generator"), "Classifier", "VIRTUAL"),
        (PERTURBATIONS, "weight_noise", further, "Classifier", "WEIGHT_NOISE"),
        (PERTURBATIONS, "weight_noise", without("distribution"), "Classifier", "WEIGHT_NOISE"),
        (PERTURBATIONS, "PerturbedOptimizer", never_updated, "Classifier", "PERTURBED"),
        (PERTURBATIONS, "PerturbedOptimizer", instead(eta=1e3), "Classifier", "PERTURBED"),
        (PERTURBATIONS, "PerturbedOptimizer", instead(gamma=1e3), "Classifier", "PERTURBED"),
        (PERTURBATIONS, "fgm_embedding", further, "Embedding", "FGM_EMBEDDING"),
        (PERTURBATIONS, "pgd_embedding", one_step, "Embedding", "PGD_EMBEDDING"),
    ],
)  # fmt: skip
def test_what_a_row_adds_is_seen_by_its_check(bench, monkeypatch, module, name, fault, only, row):
    """Rows differ from the plain step by so much that a wrong size, a bound not kept or other draws stop them."""
    where = sys.modules[module]
    monkeypatch.setattr(where, name, fault(getattr(where, name)))
    what = name if row is None else getattr(where, row)
    with pytest.raises(bench.harness.WrongResult, match=f"^{re.escape(what)}: relative error"):
        checked(bench, only)
