"""bench_cuda.py and gpu_check.sh as far as a machine without a GPU goes: a dry run, wrong results, what they say."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

TESTS = Path(__file__).resolve().parent
BENCH = TESTS.parent / "bench"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_cuda")


def dry_run(bench, out, *options):
    return bench.main(["--dry-run", "--no-compile", "--out", str(out), *options])


def test_a_dry_run_writes_json_csv_and_a_table(bench, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    code = dry_run(bench, tmp_path, "--only", "SN-GAN", "--csv", str(rows), "--commit", "abc123")
    assert code == 0
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["dry_run"]
    assert found["finished"]
    assert found["commit"] == "abc123"
    assert found["groups"][0]["name"] == "measured bandwidth"
    ours = {r["what"]: r for r in found["groups"][1]["rows"]}[bench.OURS]
    assert ours["seconds"] > 0
    assert ours["quartiles"][0] <= ours["seconds"] <= ours["quartiles"][1]
    assert "a CPU has no CUDA graphs" in found["groups"][1]["rows"][-1]["note"]
    printed = capsys.readouterr().out
    assert "no figure here means anything" in printed
    assert "| SN-GAN ImageNet discriminator, float32 | specnorm_ext |" in printed
    assert rows.read_text().startswith("case,variant,seconds,")


def test_a_wrong_result_is_not_timed_and_the_rest_is(bench, tmp_path, monkeypatch, capsys):
    right = bench.our_steps

    def wrong(ws, us, vs):
        sigma = right(ws, us, vs)
        if len(ws) == 1:
            vs[0].mul_(1.001)
        return sigma

    monkeypatch.setattr(bench, "our_steps", wrong)
    assert dry_run(bench, tmp_path, "--only", "float32") == bench.EXIT_WRONG
    groups = {
        g["name"]: g["rows"] for g in json.loads((tmp_path / "dry_run.json").read_text())["groups"]
    }
    (row,) = groups["4096 x 4096, float32"]
    assert row["seconds"] is None
    assert "WRONG: v of specnorm_ext, matrix 0" in row["note"]
    assert groups["SN-GAN CIFAR discriminator, float32"][0]["seconds"] > 0
    assert "WRONG" in capsys.readouterr().out


def test_every_strategy_has_a_row(bench, tmp_path):
    assert dry_run(bench, tmp_path, "--strategies", "--only", "64 x 64, float32, strat") == 0
    found = json.loads((tmp_path / "dry_run_strategies.json").read_text())
    rows = {g["name"]: [r["what"] for r in g["rows"]] for g in found["groups"][1:]}
    assert rows["64 x 64, float32, strategies"] == list(bench.STRATEGIES)
    assert rows["200 of 64 x 64, float32, strategies"] == ["auto", "block", "cluster", "stream"]


def test_the_budget_ends_it(bench, tmp_path):
    assert dry_run(bench, tmp_path, "--budget", "0") == 0
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert all(g["rows"][0]["note"] == "out of budget" for g in found["groups"])


def test_the_weights_are_those_of_the_networks(bench):
    layers = importlib.import_module("bench_layers")
    weights = [
        tuple(m.weight.flatten(1).shape)
        for m in layers.Discriminator().modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    assert sorted(bench.sn_gan_cifar()) == sorted(weights)
    assert len(bench.sn_gan_imagenet()) == 19
    assert sum(m * n for m, n in bench.resnet50()) == 25_502_912  # without biases and batch norm
    assert len(bench.resnet50()) == 54
    assert len(bench.llama_7b()) == 224
    assert sum(m * n for m, n in bench.llama_7b()) == 32 * 202_375_168


def test_what_takes_too_long_is_interrupted(bench):
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="not done within"), bench.at_most(0.2):
        time.sleep(30)
    assert time.monotonic() - begin < 10


@without_gpu
def test_without_a_gpu_it_says_so(bench, tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path)]) == bench.EXIT_NO_GPU
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def gpu_check(*options):
    return subprocess.run(
        ["bash", BENCH / "gpu_check.sh", *options],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        timeout=120,
    )


@needs_bash
@without_gpu
def test_gpu_check_without_a_gpu_is_one_line():
    done = gpu_check()
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("gpu_check: no GPU for ")
    assert "torch.cuda.is_available() is False" in line


@needs_bash
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "build,tests"), "expected build, test, sanitize, bench or device, got tests"),
        (("--only",), "--only: expected a value after it"),
        (("--seconds", "8m"), "--seconds: expected a whole number, got 8m"),
        (("--fast",), "got --fast"),
    ],
)
def test_gpu_check_refuses_wrong_options(options, said):
    done = gpu_check(*options)
    assert done.returncode == 2
    assert said in done.stderr


def test_gpu_check_runs_every_file_of_gpu_tests():
    script = (BENCH / "gpu_check.sh").read_text()
    files = [p for p in TESTS.glob("test_*.py") if "\nskip_without_kernels()\n" in p.read_text()]
    assert len(files) >= 3
    for path in files:
        assert f'"$repo/tests/{path.name}"' in script


@needs_bash
def test_gpu_check_explains_itself():
    done = gpu_check("--help")
    assert done.returncode == 0
    assert "--only" in done.stdout
    assert "set -" not in done.stdout
