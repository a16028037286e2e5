"""The specnorm-ext command: its data, its exit codes, and that no value claims more than it is."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from specnorm_ext import cli, report, report_conv
from specnorm_ext.cli_progress import ProgressBar
from specnorm_ext.report import Row, frobenius_norm

TOL = 1e-3


def run(*arguments: object):
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def true_sigma(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.double().flatten(1), 2).item()


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {
        "embed.weight": torch.randn(40, 12),
        "layers.2.fc.weight": 3 * torch.randn(24, 16),
        "layers.10.fc.weight": torch.randn(24, 16).bfloat16(),
        "conv.weight": torch.randn(8, 4, 3, 3),
        "half.weight": torch.randn(7, 9).half(),
        "double.weight": torch.randn(9, 7).double(),
        "zero.weight": torch.zeros(5, 4),
        "bias": torch.randn(4),
    }


@pytest.fixture
def file(tmp_path, weights) -> Path:
    torch.save(weights, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def row(name: str = "w", sigma: float = 2.0, **changes) -> Row:
    values = {
        "shape": (4, 4),
        "dtype": "float32",
        "kind": "linear",
        "frobenius": 3.0,
        "stable_rank": 2.25,
        "reads": 9,
        "converged": True,
        "lower": sigma,
    }
    return Row(name=name, sigma=sigma, **{**values, **changes})


def never_converging(monkeypatch) -> None:
    """Estimates that are honest lower bounds and did not converge."""
    module = importlib.import_module("specnorm_ext.estimate")

    def estimate_matrices(matrices, *, tol=1e-3, max_reads=1000, certified=False, progress=None):
        values = [0.9 * true_sigma(matrix.weight) for matrix in matrices]
        return [
            module.Estimate(v, v, math.inf, None, None, max_reads, False, "test") for v in values
        ]

    monkeypatch.setattr(report_conv, "estimate_matrices", estimate_matrices)


# ---- the values ---------------------------------------------------------------------------------


def test_json(file, weights):
    result = run("report", file, "--json")
    assert result.exit_code == 0
    records = json.loads(result.stdout)
    del weights["bias"]
    assert [record["name"] for record in records] == list(weights)
    for record, weight in zip(records, weights.values(), strict=True):
        assert tuple(record) == report.COLUMNS
        assert record["shape"] == list(weight.shape)
        assert f"torch.{record['dtype']}" == str(weight.dtype)
        assert record["converged"] is True
        assert isinstance(record["reads"], int)
        sigma, frobenius = true_sigma(weight), weight.double().norm().item()
        assert record["sigma"] == pytest.approx(sigma, rel=TOL)
        # Sums of squares in float64 in both; only their order differs.
        assert record["frobenius"] == pytest.approx(frobenius, rel=1e-12)
        rank = (frobenius / sigma) ** 2 if sigma else 0.0
        assert record["stable_rank"] == pytest.approx(rank, rel=2.01 * TOL)
    kinds = {record["name"]: record["kind"] for record in records}
    assert kinds["conv.weight"] == "conv"
    assert kinds["layers.2.fc.weight"] == "linear"


def test_csv(file, weights):
    result = run("report", file, "--csv")
    assert result.exit_code == 0
    records = list(csv.DictReader(io.StringIO(result.stdout)))
    assert tuple(records[0]) == report.COLUMNS
    conv = next(record for record in records if record["name"] == "conv.weight")
    assert conv["shape"] == "8x4x3x3"
    assert conv["converged"] == "true"
    assert float(conv["sigma"]) == pytest.approx(true_sigma(weights["conv.weight"]), rel=TOL)


def test_table(file, weights):
    result = run("report", file)
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name in weights.keys() - {"bias"}:
        assert "yes" in lines[name]
    assert "conv (flattened)" in lines["conv.weight"]
    assert "8x4x3x3" in lines["conv.weight"]
    assert "(flattened)" not in lines["embed.weight"]
    assert "bias" not in lines
    # What is no data goes to standard error.
    assert "not the operator norm" in result.stderr
    assert "7 of 7 matrices converged to 0.001" in result.stderr
    assert "not the operator norm" not in result.stdout


def test_safetensors_shards_through_the_command(tmp_path, weights):
    del weights["bias"]
    names = list(weights)
    weight_map = {}
    for i in range(2):
        shard = f"model-{i}.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, tmp_path / shard)
        weight_map.update(dict.fromkeys(names[i::2], shard))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for asked in (index, tmp_path):
        records = json.loads(run("report", asked, "--json").stdout)
        assert {record["name"] for record in records} == set(names)
        for record in records:
            assert record["sigma"] == pytest.approx(true_sigma(weights[record["name"]]), rel=TOL)


def test_tolerance_is_met(tmp_path):
    weight = torch.randn(200, 300).double()
    torch.save({"w": weight}, tmp_path / "m.pt")
    result = run("report", tmp_path / "m.pt", "--json", "--tol", "1e-8")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["sigma"] == pytest.approx(true_sigma(weight), rel=1e-8)
    (line,) = [
        x
        for x in run("report", tmp_path / "m.pt", "--tol", "1e-8").stdout.splitlines()
        if "200x300" in x
    ]
    assert f"{true_sigma(weight):.7g}" in line  # as many digits as were asked for


# ---- what did not converge ----------------------------------------------------------------------


def test_an_unconverged_value_is_printed_as_a_bound(file, weights, monkeypatch):
    never_converging(monkeypatch)
    result = run("report", file, "--match", "embed")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "embed" in line]
    assert "(not converged)" in line
    bound = float(line.split(">=")[1].split()[0])
    assert bound <= 0.9 * true_sigma(weights["embed.weight"])
    most = float(line.split("<=")[1].split()[0])
    assert most >= (weights["embed.weight"].double().norm() / bound).item() ** 2 * (1 - 1e-3)
    assert line.split()[-1] == "no"
    assert "0 of 1 matrix converged" in result.stderr
    assert "1 not converged within 1000 reads" in result.stderr
    record = json.loads(run("report", file, "--match", "embed", "--json").stdout)[0]
    assert record["converged"] is False
    assert record["sigma"] <= true_sigma(weights["embed.weight"])


def test_too_few_reads_are_admitted(tmp_path):
    torch.save({"w": torch.randn(300, 300)}, tmp_path / "m.pt")
    result = run("report", tmp_path / "m.pt", "--tol", "1e-6", "--max-reads", "2", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["converged"] is False


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights(tmp_path, value):
    weight = torch.randn(6, 5)
    weight[2, 3] = value
    torch.save({"bad": weight, "good": torch.eye(3)}, tmp_path / "m.pt")
    result = run("report", tmp_path / "m.pt", "--json")
    assert result.exit_code == 1
    bad, good = json.loads(result.stdout, parse_constant=pytest.fail)  # NaN is not JSON
    assert (bad["sigma"], bad["frobenius"], bad["stable_rank"]) == (None, None, None)
    assert bad["converged"] is False
    assert good["converged"] is True
    table = run("report", tmp_path / "m.pt")
    (line,) = [line for line in table.stdout.splitlines() if "bad" in line]
    assert line.split()[3:6] == ["linear", "nan", "nan"]
    assert "1 with NaN or Inf" in table.stderr
    csv_text = run("report", tmp_path / "m.pt", "--csv").stdout
    assert "bad,6x5,float32,linear,nan,nan,nan," in csv_text


def test_rounding_never_turns_a_bound_around():
    for value in [*(torch.rand(500) * 10 ** torch.randint(-9, 9, (500,))).tolist(), 9.9996, 1.0]:
        # Of the decimal text itself, in exact arithmetic.
        assert Fraction(report._bound_text(value, 4, upwards=False)) <= Fraction(value)
        assert Fraction(report._bound_text(value, 4, upwards=True)) >= Fraction(value)
        assert float(report._bound_text(value, 4, upwards=False)) >= value * (1 - 1e-3)


def test_hidden_rows_count_for_the_exit_code(tmp_path):
    torch.save({"good": torch.eye(3), "bad": torch.full((2, 2), math.nan)}, tmp_path / "m.pt")
    result = run("report", tmp_path / "m.pt", "--json", "--top", 1)
    assert [record["name"] for record in json.loads(result.stdout)] == ["good"]
    assert result.exit_code == 1


# ---- order and choice ---------------------------------------------------------------------------


def names_of(*arguments: object) -> list[str]:
    return [record["name"] for record in json.loads(run("report", *arguments, "--json").stdout)]


def test_sort(file, weights):
    del weights["bias"]
    by_sigma = sorted(weights, key=lambda name: true_sigma(weights[name]))
    assert names_of(file, "--sort", "sigma") == by_sigma
    assert names_of(file, "--sort", "sigma", "--descending") == by_sigma[::-1]
    assert names_of(file, "--sort", "sigma", "--reverse", "--top", 2) == by_sigma[:-3:-1]
    assert names_of(file, "--reverse") == list(weights)[::-1]
    by_name = names_of(file, "--sort", "name")
    assert by_name.index("layers.2.fc.weight") < by_name.index("layers.10.fc.weight")
    assert sorted(by_name) == sorted(weights)
    by_size = [weights[name].numel() for name in names_of(file, "--sort", "shape")]
    assert by_size == sorted(by_size)
    for key in ("frobenius", "stable_rank", "reads"):
        records = json.loads(run("report", file, "--sort", key, "--json").stdout)
        assert [r[key] for r in records] == sorted(r[key] for r in records)


def test_a_broken_matrix_sorts_as_the_largest():
    rows = [row("a", 1.0), row("nan", math.nan), row("b", 5.0)]
    assert [r.name for r in report.sort_rows(rows, "sigma")] == ["a", "b", "nan"]
    assert [r.name for r in report.sort_rows(rows, "sigma", descending=True)] == ["nan", "b", "a"]


def test_match_and_exclude(file):
    assert names_of(file, "--match", r"layers\.\d+") == [
        "layers.2.fc.weight",
        "layers.10.fc.weight",
    ]
    assert names_of(file, "--match", "conv", "--match", "^emb") == ["embed.weight", "conv.weight"]
    assert names_of(file, "--match", "layers", "--exclude", "10") == ["layers.2.fc.weight"]


def test_tied_weights_are_reported_once(tmp_path):
    weight = torch.randn(6, 4)
    torch.save({"embed.weight": weight, "lm_head.weight": weight}, tmp_path / "m.pt")
    result = run("report", tmp_path / "m.pt", "--match", "lm_head", "--json")
    assert [record["name"] for record in json.loads(result.stdout)] == ["embed.weight"]
    assert "tied, reported once: embed.weight = lm_head.weight" in result.stderr


def test_what_is_skipped_is_said(tmp_path):
    tensors = {"w": torch.eye(3), "q": torch.ones(3, 3, dtype=torch.int8)}
    save_file(tensors, tmp_path / "m.safetensors")
    result = run("report", tmp_path / "m.safetensors")
    assert result.exit_code == 0
    assert "skipped 1 tensor: int8 (1)" in result.stderr
    save_file({"q": tensors["q"]}, tmp_path / "m.safetensors")
    result = run("report", tmp_path / "m.safetensors")
    assert result.exit_code == 2
    assert "holds no matrix" in result.stderr
    assert "int8 (1)" in result.stderr


def test_threads_are_put_back(file):
    before = torch.get_num_threads()
    assert run("report", file, "--threads", 1).exit_code == 0
    assert torch.get_num_threads() == before


# ---- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--csv"], "--json and --csv"),
        (["--match", "("], "--match '(': not a regular expression"),
        (["--exclude", "["], "--exclude '['"),
        (["--match", "nothing"], "none of the 7 matrices"),
        (["--sort", "colour"], "expected one of file, name"),
        (["--tol", "0"], "--tol: expected a number between 0 and 1, got 0"),
        (["--tol", "nan"], "--tol"),
        (["--max-reads", "0"], "--max-reads: expected at least 1, got 0"),
        (["--top", "0"], "--top"),
        (["--threads", "0"], "--threads"),
        (["--plot", "x.docx"], "expected a name ending in .png"),
        (["--plot", "/no/such/folder/x.png"], "its directory does not exist"),
    ],
)
def test_wrong_options(file, arguments, message):
    result = run("report", file, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04cut off", b"text"])
def test_bad_files(tmp_path, content):
    path = tmp_path / "m.pt"
    if content is not None:
        path.write_bytes(content)
    result = run("report", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_usage_errors_exit_with_2(file):
    assert run("report").exit_code == 2
    assert run("report", file, "--no-such-option").exit_code == 2
    assert run("report", file, "--tol", "small").exit_code == 2


def test_help_documents_the_exit_codes():
    result = run("report", "--help")
    assert result.exit_code == 0
    assert "Exit codes: 0 every matrix converged" in result.stdout


def test_names_cannot_drive_the_terminal(tmp_path):
    hostile = "[red]\x1b]0;title\x07\nx"
    torch.save({hostile: torch.eye(2)}, tmp_path / "m.pt")
    for flags in ([], ["--csv"], ["--json"]):
        result = run("report", tmp_path / "m.pt", *flags)
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "[red]" in result.stdout
    assert json.loads(result.stdout)[0]["name"] == hostile


def test_as_a_process(tmp_path):
    """What a shell sees: streams, exit code, and a pickle's payload that does not run."""
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.system, (f"echo run > {marker}",)

    torch.save({"w": torch.eye(2), "x": Attack()}, tmp_path / "attack.pt")
    torch.save({"é": 2 * torch.eye(2), "bad": torch.full((2, 2), math.nan)}, tmp_path / "m.pt")
    script = (
        "import sys; from specnorm_ext.cli import main\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = ['specnorm-ext', 'report', path]\n"
        "    try: main()\n"
        "    except SystemExit as e: print('exit', e.code)\n"
    )
    # One process for two files: importing torch is most of the time.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    paths = [str(tmp_path / "attack.pt"), str(tmp_path / "m.pt")]
    result = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert not marker.exists()
    lines = result.stdout.splitlines()
    assert lines[0] == "exit 2"
    assert lines[-1] == "exit 1"
    assert any("\\xe9" in line and "2.000" in line for line in lines)
    assert "attack.pt: refused, the pickle needs more than tensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_python_dash_m(file):
    command = [sys.executable, "-m", "specnorm_ext.cli", "report", str(file), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 7
    assert "Traceback" not in result.stderr


# ---- the Frobenius norm -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e30, torch.float32),
        (1e-40, torch.float32),
        (1e38, torch.bfloat16),
        (1e4, torch.float16),
        (1e300, torch.float64),
        (1e-300, torch.float64),
    ],
)
def test_frobenius_neither_overflows_nor_underflows(scale, dtype):
    weight = (torch.rand(30, 20, dtype=torch.float64) * scale).to(dtype)
    exact = scale * (weight.double() / scale).norm().item()
    assert frobenius_norm(weight) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (7, 1), (1, 40), (2, 3, 4, 5), (0, 3), (9, 16), (2, 50)])
def test_frobenius_in_pieces(shape, monkeypatch):
    monkeypatch.setattr(report, "_CHUNK", 7)
    weight = torch.randn(shape)
    for view in (weight, weight.transpose(0, 1)):
        pieces = report._pieces(view)
        assert all(piece.numel() <= 7 for piece in pieces)
        assert sum(piece.numel() for piece in pieces) == weight.numel()
        assert frobenius_norm(view) == pytest.approx(weight.double().norm().item(), rel=1e-12)


# ---- picture and progress -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 90])
def test_plot(tmp_path, count):
    pytest.importorskip("matplotlib")
    kinds = ["linear", "embedding", "recurrent", "conv", "conv_transpose", "other", "unheard of"]
    rows = [
        row(f"model.layers.{i // 4}.$a_{i}$.weight", 1.0 + i * i, kind=kinds[i % len(kinds)])
        for i in range(count)
    ]
    if count > 1:
        rows[3] = row("unconverged.weight", 2.0, converged=False, lower=1.9)
        rows[5] = row("zero.weight", 0.0, frobenius=0.0, stable_rank=0.0)
        rows[6] = row("\x1b[31m中.weight", math.nan, stable_rank=math.nan, converged=False)
    path = tmp_path / "out.png"
    report.plot(rows, path, "model $x$.safetensors")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert 1000 < width < 3200
    assert 400 < height < 3200
    assert len(content) > 10_000


def test_plot_of_nothing_but_broken_or_zero_rows(tmp_path):
    pytest.importorskip("matplotlib")
    for sigma in (math.nan, 0.0):
        rows = [row(f"a.{i}.w", sigma, stable_rank=sigma) for i in range(2)]
        report.plot(rows, tmp_path / "out.svg", "m")
        assert b"<svg" in (tmp_path / "out.svg").read_bytes()


def test_plot_option(tmp_path, file):
    pytest.importorskip("matplotlib")
    result = run("report", file, "--plot", tmp_path / "out.png", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_short_names():
    names = [f"model.layers.{i}.q.weight" for i in range(9)] + ["lm_head.weight"]
    assert report._short_names(names) == [*(f"layers.{i}.q" for i in range(9)), "lm_head"]
    assert report._short_names(["a.x.weight", "x.weight"]) == ["a.x", "x"]
    assert len(report._short_names(["n" * 200, "m"])[0]) <= 44


def shown(delay: float, seconds: float, enabled: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with ProgressBar(enabled, delay=delay, console=console) as bar:
        bar.update(3, 7)
        time.sleep(seconds)
        bar.update(7, 7)
    return console.file.getvalue()


def test_the_bar_appears_only_after_its_delay():
    assert "7/7" in shown(delay=0.0, seconds=0.2)
    assert shown(delay=5.0, seconds=0.0) == ""
    assert shown(delay=0.0, seconds=0.1, enabled=False) == ""


def test_the_bar_hears_of_every_matrix(file, monkeypatch):
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(ProgressBar, "update", lambda _, done, total: heard.append((done, total)))
    assert run("report", file).exit_code == 0
    assert heard == [(i, 7) for i in range(1, 8)]


def test_no_bar_where_standard_error_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressBar(True, delay=0.0) as bar:
        bar.update(1, 2)
        time.sleep(0.05)
    assert sys.stderr.getvalue() == ""


# ---- missing packages, info, bench --------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "flags"),
    [("rich.console", []), ("matplotlib.figure", ["--plot", "x.png"]), ("safetensors", [])],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, package, flags):
    save_file({"w": torch.eye(2)}, tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    code = cli._run_guarded(
        cli.run_report,
        cli.ReportOptions(
            tmp_path / "m.safetensors", plot=Path("x.png") if "--plot" in flags else None
        ),
    )
    assert code == 2


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert 'pip install "specnorm_ext[cli]"' in capsys.readouterr().err


def test_info():
    result = run("info", "--json")
    assert result.exit_code == 0
    info = json.loads(result.stdout)
    assert info["torch_running"] == torch.__version__
    assert torch.__version__ in run("info").stdout


def test_bench_lists_and_runs_the_scripts(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    scripts = tmp_path / "bench"
    scripts.mkdir()
    main = 'if __name__ == "__main__":\n    raise SystemExit({})\n'
    (scripts / "bench_good.py").write_text(main.format(0))
    (scripts / "bench_bad.py").write_text(main.format(3))
    (scripts / "module.py").write_text("x = 1\n")
    (scripts / "demo.py").write_text(main.format(0))  # runs, but is no benchmark
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "specnorm_ext" / "cli.py"))
    assert run("bench", "--list").stdout.split()[::2] == ["bench_bad", "bench_good"]
    assert run("bench", "bench_good").exit_code == 0
    assert run("bench").exit_code == 1
    result = run("bench", "module")
    assert result.exit_code == 2
    assert "expected one of bench_bad, bench_good" in result.stderr


def test_bench_without_the_repository(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "specnorm_ext" / "cli.py"))
    result = run("bench")
    assert result.exit_code == 2
    assert "clone the repository" in result.stderr


def test_stable_rank_of_a_hopeless_estimate():
    assert report._stable_rank(1e200, 1e-100) == math.inf
    assert report._stable_rank(0.0, 0.0) == 0.0
    assert math.isnan(report._stable_rank(1.0, 0.0))
    text = report._stable_rank_text(row(converged=False, lower=0.0), 4)
    assert text == "unknown"


def test_certified_gives_brackets(file, weights) -> None:
    result = run("report", file, "--json", "--certified")
    assert result.exit_code == 0
    plain = json.loads(run("report", file, "--json").stdout)
    del weights["bias"]
    for record, without, weight in zip(
        json.loads(result.stdout), plain, weights.values(), strict=True
    ):
        sigma = true_sigma(weight)
        # float64 SVDs themselves are good to a few eps
        assert record["lower"] <= sigma * (1 + 1e-14)
        assert sigma * (1 - 1e-14) <= record["upper"] <= sigma * (1 + 1e-7)
        assert without["upper"] is None
        assert without["lower"] == pytest.approx(record["lower"])
    text = run("report", file, "--certified").stdout
    assert re.search(r"sigma\s+lower\s+upper\s+Frobenius", text)
    assert "upper" not in run("report", file).stdout
