"""specnorm-ext report --model, --conv operator and --lipschitz: what they print, and that nothing runs unasked."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import F32, F64, tolerance
from torch import Tensor, nn

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors.torch import save_file
from typer.testing import CliRunner

from specnorm_ext import cli, report
from specnorm_ext.cli_model import conv_calls, load_model, one_line, tied_names
from specnorm_ext.lipschitz import lipschitz_bound
from specnorm_ext.matrices import collect_matrices

TOL = 1e-3
SIZE = "3,6,6"

# Every kind of layer once, small enough to be written out as matrices.
SOURCE = '''
import pathlib
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

print("chatter")
pathlib.Path("imported").touch()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
        self.dilated = spectral_norm(nn.Conv2d(2, 2, (1, 3), dilation=2, padding="same"))
        self.fc = nn.Linear(2, 5)

    def forward(self, x):
        x = self.grouped(torch.relu(self.norm(self.strided(x))))
        return self.fc(self.dilated(self.up(x)).mean((2, 3)))


def make():
    print("more chatter")
    torch.manual_seed(0)
    return Net()


class Inner:
    make = staticmethod(make)


class Many(nn.Module):
    """One layer at two sizes, one weight in two layers, one not run, one run by other code, and one of its own kind."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv1d(2, 2, 3, padding=1, bias=False)
        self.tied = nn.Conv1d(2, 2, 3, bias=False, padding=1, padding_mode="circular")
        self.tied.weight = self.twice.weight
        self.unused = nn.Conv1d(2, 2, 3)
        self.by_hand = nn.Conv1d(2, 2, 3)
        self.own = Standardized(2, 2, 3)
        self.sized = nn.ConvTranspose1d(2, 2, 3, stride=2)

    def forward(self, x):
        x = self.twice(self.tied(self.twice(x))[..., ::2])
        x = nn.functional.conv1d(x, self.by_hand.weight, padding=1)
        return self.sized(self.own(x), output_size=[14])


class Standardized(nn.Conv1d):
    def forward(self, x):
        return nn.functional.conv1d(x, self.weight - self.weight.mean(), self.bias)


def many():
    torch.manual_seed(1)
    return Many()


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 3, 3)

    def forward(self, x):
        return self.conv(self.embed(x).mT)


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("index", torch.arange(6))

    def forward(self, x):
        return self.fc(x)


def complex_model():
    model = Indexed()
    model.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
    return model


model = Net()
number = 3
def lazy(): return nn.LazyLinear(3)
def meta(): return nn.Linear(3, 3, device="meta")
def without_matrices(): return nn.PReLU()
def needs(x): return Net()
def returns_a_dict(): return {"a": 1}
def fails(): raise RuntimeError("first line\\n\\x1b[31msecond line")
def leaves(): raise SystemExit(0)
def relu_only(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
def half(): return nn.Sequential(nn.Conv2d(3, 2, 3)).bfloat16()
def attention(): return nn.TransformerEncoderLayer(4, 2, batch_first=True)
'''


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with the module networks, in which the command runs."""
    (tmp_path / "networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    torch.set_num_threads(1)  # all matrices here are small
    yield tmp_path
    sys.modules.pop("networks", None)


def run(*arguments: object):
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def records_of(*arguments: object) -> dict[str, dict]:
    result = run("report", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return {record["name"]: record for record in json.loads(result.stdout)}


def model_of(here: Path, factory: str) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(here))
        return load_model(f"networks:{factory}").eval()


def matrix_of(layer: nn.Module, *shape: int) -> Tensor:
    """The linear part of a layer, as a matrix: what it does to unit vectors, through torch's own forward."""
    n = math.prod(shape)
    layer = layer.eval().double()
    with torch.no_grad():
        images = torch.cat([torch.eye(n, dtype=F64), torch.zeros(1, n, dtype=F64)])
        y = layer(images.view(n + 1, *shape)).flatten(1)
    return (y[:-1] - y[-1]).mT


# What each convolution of Net sees for an input of 3 x 6 x 6.
SEEN = {
    "strided": (3, 6, 6),
    "grouped": (4, 3, 3),
    "up": (4, 3, 3),
    "dilated": (2, 6, 6),
}


# ---- --model ------------------------------------------------------------------------------------


def test_model_without_a_file(here):
    path = list(sys.path)
    result = run("report", "--model", "networks:make", "--json")
    assert result.exit_code == 0
    assert sys.path == path  # put back
    records = {r["name"]: r for r in json.loads(result.stdout)}  # the chatter is not in it
    assert result.stderr.splitlines()[:2] == ["chatter", "more chatter"]
    matrices = collect_matrices(model_of(here, "make"))
    assert list(records) == [m.name for m in matrices]
    for m in matrices:
        exact = torch.linalg.matrix_norm(m.weight.double(), 2).item()
        assert records[m.name]["sigma"] == pytest.approx(exact, rel=TOL)
        assert records[m.name]["kind"] == m.kind
    assert records["up.weight"]["kind"] == "conv_transpose"
    assert records["dilated.weight"]["sigma"] == pytest.approx(1.0, rel=0.2)  # as it is applied
    assert "networks" in sys.modules


def test_a_dotted_factory(here):
    assert "fc.weight" in records_of("--model", "networks:Inner.make")


def test_nothing_runs_without_the_flag(here):
    torch.save(model_of(here, "make").state_dict(), here / "m.pt")
    (here / "imported").unlink()
    sys.modules.pop("networks")
    assert run("report", "m.pt", "--conv", "operator", "--input-size", SIZE).exit_code == 0
    assert run("report", "m.pt", "--input-size", SIZE).exit_code == 2
    # neither a wrong option, nor a file that cannot be read
    wrong = run("report", "m.pt", "--model", "networks:make", "--conv", "operator")
    assert wrong.exit_code == 2
    assert run("report", "missing.pt", "--model", "networks:make").exit_code == 2
    assert not (here / "imported").exists()
    assert "networks" not in sys.modules
    assert run("report", "m.pt", "--model", "networks:make").exit_code == 0
    assert (here / "imported").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_is_loaded_into_the_model(here, suffix):
    model = model_of(here, "make")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        model.norm.num_batches_tracked += 7  # an integer, which a checkpoint is not read for
    save = torch.save if suffix == "pt" else save_file
    save(model.state_dict(), here / f"m.{suffix}")
    records = records_of(f"m.{suffix}", "--model", "networks:make")
    for m in collect_matrices(model):
        exact = torch.linalg.matrix_norm(m.weight.double(), 2).item()
        assert records[m.name]["sigma"] == pytest.approx(exact, rel=TOL)


def test_what_stays_is_said(here):
    state = model_of(here, "Indexed").state_dict()
    torch.save({**state, "index": state["index"] + 1}, here / "m.pt")
    result = run("report", "m.pt", "--model", "networks:Indexed")
    assert result.exit_code == 0
    assert "as the factory made them: index" in result.stderr


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "int8"])
def test_a_file_that_does_not_fit(here, change):
    state = model_of(here, "make").state_dict()
    if change == "missing":
        del state["fc.weight"]
    elif change == "unexpected":
        state["other.weight"] = torch.eye(2)
    elif change == "int8":
        state["fc.weight"] = state["fc.weight"].to(torch.int8)
    else:
        state["fc.weight"] = torch.eye(3)
    torch.save(state, here / "m.pt")
    result = run("report", "m.pt", "--model", "networks:make")
    assert result.exit_code == 2
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("specnorm-ext: error: m.pt: does not fit the model (RuntimeError: ")
    assert ("other" if change == "unexpected" else "fc.weight") in message
    assert ("skipped 1 tensor: int8 (1)" in message) == (change == "int8")
    assert "Traceback" not in result.output


def test_tied_weights_of_a_model(here):
    result = run("report", "--model", "networks:many", "--match", "tied")
    assert result.exit_code == 0
    assert "tied, reported once: twice.weight = tied.weight" in result.stderr
    assert "twice.weight" in result.stdout
    shared = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)})
    assert tied_names(model) == {"a.weight": ["b.weight"], "a.bias": ["b.bias"]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("networks", "expected package.module:factory"),
        ("networks:", "expected package.module:factory"),
        (":make", "expected package.module:factory"),
        ("networks:make:more", "expected package.module:factory"),
        ("networks.py:make", "networks.py cannot be imported (ModuleNotFoundError"),
        ("../networks:make", "expected package.module:factory"),
        ("missing_networks:make", "cannot be imported (ModuleNotFoundError: No module named 'miss"),
        ("broken:make", "broken cannot be imported (SyntaxError: "),
        ("networks:missing", "the module networks has no 'missing' to call (AttributeError"),
        ("networks:Inner.missing", "Inner has no 'missing' to call (AttributeError"),
        ("networks:number", "expected a function or class that makes the model, got a value"),
        ("networks:model", "expected a function or class that makes the model, got an object"),
        ("networks:needs", "failed (TypeError: needs() missing 1 required positional argument"),
        ("networks:fails", r"failed (RuntimeError: first line \x1b[31msecond line)"),
        ("networks:leaves", "failed (SystemExit: 0)"),
        ("networks:returns_a_dict", "to return a torch.nn.Module, got dict"),
        ("networks:lazy", "expected parameters with values, got weight lazy"),
        ("networks:meta", "got weight on the meta device"),
        ("networks:without_matrices", "holds no matrix"),
    ],
)
def test_models_that_cannot_be_made(here, spec, message):
    (here / "broken.py").write_text("def make(:\n")
    result = run("report", "--model", spec)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "chatter" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("specnorm-ext: error: --model")
    assert message in lines[0]
    assert isinstance(result.exception, SystemExit)  # no traceback


def test_a_complex_model_is_not_half_loaded(here):
    torch.save(model_of(here, "Indexed").state_dict(), here / "m.pt")
    result = run("report", "m.pt", "--model", "networks:complex_model")
    assert result.exit_code == 2
    assert "got phase of torch.complex64; load it in the factory" in result.stderr


def test_long_messages_are_cut():
    text = one_line(ValueError("word " * 1000))
    assert len(text) == 600
    assert text.endswith("...")


# ---- --conv operator ----------------------------------------------------------------------------


def test_operator_norms_of_a_model(here):
    """Against the singular values of each layer, written out through torch's own forward at the size that it sees."""
    model = model_of(here, "make")
    options = ("--model", "networks:make", "--conv", "operator", "--input-size", SIZE)
    records = records_of(*options, "--certified")
    flattened = records_of("--model", "networks:make")
    assert list(records) == list(flattened)
    assert records["fc.weight"]["kind"] == "linear"
    for name, shape in SEEN.items():
        exact = matrix_of(getattr(model, name), *shape)
        sigma, frobenius = torch.linalg.matrix_norm(exact, 2).item(), exact.norm().item()
        record = records[f"{name}.weight"]
        assert tuple(record) == report.COLUMNS
        assert record["kind"] == flattened[f"{name}.weight"]["kind"] + " (operator)"
        assert record["sigma"] == pytest.approx(sigma, rel=TOL)
        # the singular values are good to some n eps; the weight of `dilated` is divided by a sigma in float32, here
        # computed again in float64
        slack = tolerance("sigma", F32, 6) if name == "dilated" else 1e-13
        assert record["lower"] <= sigma * (1 + slack)
        assert sigma * (1 - slack) <= record["upper"] <= sigma * (1 + slack + 1e-8)
        assert record["frobenius"] == pytest.approx(frobenius, rel=max(slack, 1e-12))
        assert record["stable_rank"] == pytest.approx(
            (record["frobenius"] / record["sigma"]) ** 2, rel=1e-12
        )
        assert record["stable_rank"] >= 1
    # and these are other numbers than those of the flattened kernels
    assert records["strided.weight"]["sigma"] > 1.05 * flattened["strided.weight"]["sigma"]


def test_operator_in_the_table_and_the_csv(here, monkeypatch):
    options = ("report", "--model", "networks:make", "--conv", "operator", "--input-size", SIZE)
    result = run(*options)
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "conv (operator)" in lines["strided.weight"]
    assert "conv_transpose (operator)" in lines["up.weight"]
    assert "flattened" not in result.output
    assert "operator norms, at the sizes that they see for an input of 3x6x6" in result.stderr
    assert "assum" not in result.stderr
    rows = list(csv.DictReader(io.StringIO(run(*options, "--csv").stdout)))
    assert tuple(rows[0]) == report.COLUMNS
    assert rows[0]["kind"] == "conv (operator)"
    assert records_of(*options[1:], "--sort", "sigma")


def test_plot_of_both_kinds(here):
    pytest.importorskip("matplotlib")
    options = ("--model", "networks:many", "--conv", "operator", "--input-size", "2,16")
    assert run("report", *options, "--plot", "out.svg").exit_code == 0
    assert b"<svg" in (here / "out.svg").read_bytes()


def test_layers_at_several_sizes_and_layers_without_an_operator(here):
    model = model_of(here, "many")
    result = run(
        "report", "--model", "networks:many", "--conv", "operator", "--input-size", "2,16",
        "--json", "--certified",
    )  # fmt: skip
    assert result.exit_code == 0
    records = {r["name"]: r for r in json.loads(result.stdout)}
    # `twice` on 16 and on 8, and its weight in `tied`, where circular padding makes for the largest norm
    norms = [
        torch.linalg.matrix_norm(matrix_of(layer, 2, n), 2).item()
        for layer, n in ((model.twice, 16), (model.tied, 16), (model.twice, 8))
    ]
    assert norms[1] > max(norms[0], norms[2]) * (1 + 2 * TOL)
    record = records["twice.weight"]
    assert record["sigma"] == pytest.approx(norms[1], rel=TOL)
    assert norms[1] * (1 - TOL) <= record["lower"] <= norms[1] * (1 + 1e-13)
    assert norms[1] * (1 - 1e-13) <= record["upper"]
    assert "the largest norm is reported: twice.weight" in result.stderr
    for name, why in (
        ("unused", "no layer was seen to apply it"),
        ("by_hand", "no layer was seen to apply it"),
        ("own", "Standardized may compute otherwise than torch's layer"),
        ("sized", "called with an output_size"),
    ):
        assert f"{name}.weight ({why})" in result.stderr
        assert records[f"{name}.weight"]["kind"] in ("conv", "conv_transpose")


def test_calls_leave_the_model_as_it_was(here):
    model = model_of(here, "make").train()
    model.grouped.eval()  # BatchNorm in training would count, and learn from the zeros
    before = {k: x.clone() for k, x in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    calls = conv_calls(model, (3, 6, 6))
    assert {n.removesuffix(".weight"): c[0].input_size for n, c in calls.items()} == {
        n: s[1:] for n, s in SEEN.items()
    }
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"--input-size: the model fails on zeros of 1x4x6x6"):
        conv_calls(model, (4, 6, 6))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("factory", "size"), [("Text", "12"), ("half", "3,5,5")])
def test_inputs_of_the_models_own_kind(here, factory, size):
    """Indices where it begins with an Embedding; bfloat16 where it computes in that."""
    options = ("--model", f"networks:{factory}", "--conv", "operator", "--input-size", size)
    assert any(r["kind"] == "conv (operator)" for r in records_of(*options).values())


def test_operator_norms_of_a_checkpoint(here):
    """The assumptions are made, and said."""
    weights = {
        "first.weight": torch.randn(6, 4, 3, 3),
        "grouped.weight": torch.randn(6, 2, 1, 3).bfloat16(),
        "deep.weight": torch.randn(4, 6, 3, 3).double(),
        "even.weight": torch.randn(4, 4, 2, 2),
        "line.weight": torch.randn(4, 4, 3),
        "empty.weight": torch.zeros(4, 0, 3, 3),
        "fc.weight": torch.randn(5, 4),
    }
    torch.save(weights, here / "m.pt")
    result = run("report", "m.pt", "--conv", "operator", "--input-size", "4, 5,6", "--json")
    assert result.exit_code == 0
    records = {r["name"]: r for r in json.loads(result.stdout)}
    for name, groups in (("first", 1), ("grouped", 2), ("deep", 1)):
        w = weights[f"{name}.weight"]
        layer = nn.Conv2d(w.shape[1] * groups, w.shape[0], w.shape[2:], padding="same",
                          groups=groups, bias=False)  # fmt: skip
        layer.weight = nn.Parameter(w.double())
        exact = matrix_of(layer, layer.in_channels, 5, 6)
        record = records[f"{name}.weight"]
        assert record["kind"] == "conv (operator)"
        sigma = torch.linalg.matrix_norm(exact, 2).item()
        assert record["sigma"] == pytest.approx(sigma, rel=TOL)
        assert record["frobenius"] == pytest.approx(exact.norm().item(), rel=1e-12)
        assert record["lower"] <= sigma * (1 + 1e-13)
        assert record["upper"] is None
    for name in ("even", "line"):
        w = weights[f"{name}.weight"].double()
        record = records[f"{name}.weight"]
        assert record["kind"] == "conv"
        assert record["sigma"] == pytest.approx(
            torch.linalg.matrix_norm(w.flatten(1), 2).item(), rel=TOL
        )
    assert (records["empty.weight"]["sigma"], records["empty.weight"]["frobenius"]) == (0.0, 0.0)
    notes = result.stderr
    assert "under assumptions, as a checkpoint holds no geometry: all on inputs of 5x6" in notes
    assert "stride 1, dilation 1, zero padding (k - 1) / 2, not transposed" in notes
    assert "grouped.weight: taken with 2 groups, of 4 input channels" in notes
    assert "even.weight (kernel of 2x2, not odd), line.weight (1 kernel dimension)" in notes
    assert "as torch's spectral_norm" not in notes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_operator_that_is_not_finite(here, value):
    weight = torch.randn(2, 3, 3, 3)
    weight[0, 0, 1, 1] = value
    torch.save({"bad": weight}, here / "m.pt")
    options = ("m.pt", "--conv", "operator", "--input-size", "3,4,4", "--certified", "--json")
    result = run("report", *options)
    assert result.exit_code == 1
    (bad,) = json.loads(result.stdout, parse_constant=pytest.fail)
    keys = ("sigma", "frobenius", "stable_rank", "lower", "upper", "converged")
    assert [bad[k] for k in keys] == [None, None, None, None, None, False]


def test_too_few_reads_of_an_operator_are_admitted(here):
    torch.save({"w": torch.randn(8, 8, 3, 3)}, here / "m.pt")
    options = ("--conv", "operator", "--input-size", "8,16,16", "--tol", "1e-8")
    result = run("report", "m.pt", *options, "--max-reads", 2)
    assert result.exit_code == 1
    assert "(not converged)" in result.stdout
    assert "1 not converged within 2 reads" in result.stderr


def test_the_bar_hears_of_operators(here, monkeypatch):
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(
        cli.ProgressBar, "update", lambda _, done, total: heard.append((done, total))
    )
    records_of("--model", "networks:make", "--conv", "operator", "--input-size", SIZE)
    assert heard == [(i, 5) for i in range(1, 6)]


# ---- --lipschitz --------------------------------------------------------------------------------


def test_lipschitz(here):
    options = ("report", "--model", "networks:make", "--lipschitz", "--input-size", SIZE)
    expected = lipschitz_bound(model_of(here, "make"), (3, 6, 6))
    result = run(*options)
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith(expected.table())
    assert "conv (flattened)" in result.stdout  # the report itself is as without it
    both = json.loads(run(*options, "--json").stdout)
    assert list(both) == ["matrices", "lipschitz"]
    alone = json.loads(run(*options[:3], "--json").stdout)
    assert both["matrices"] == alone
    assert both["lipschitz"]["bound"] == expected.bound
    layers = both["lipschitz"]["layers"]
    assert [x["name"] for x in layers] == [x.name for x in expected.layers]
    assert [x["bound"] for x in layers] == [x.bound for x in expected.layers]
    assert layers[0]["input_shape"] == [3, 6, 6]
    # rows chosen or not, the bound is that of the model
    one = json.loads(run(*options, "--json", "--match", "fc").stdout)
    assert len(one["matrices"]) == 1
    assert one["lipschitz"] == both["lipschitz"]


def test_lipschitz_of_a_broken_model_is_still_json(here):
    state = model_of(here, "relu_only").state_dict()
    state["0.weight"].fill_(math.nan)
    torch.save(state, here / "m.pt")
    options = ("--model", "networks:relu_only", "--lipschitz", "--input-size", SIZE, "--json")
    result = run("report", "m.pt", *options)
    assert result.exit_code == 1
    both = json.loads(result.stdout, parse_constant=pytest.fail)
    assert both["lipschitz"]["bound"] is None
    assert both["lipschitz"]["layers"][0]["factor"] is None


@pytest.mark.parametrize(
    ("factory", "size", "message"),
    [
        ("attention", "5,4", "attention has no Lipschitz constant"),
        ("Chooses", "3,4,4", "expected a model that torch.fx can trace"),
        ("relu_only", "3,6", "expected an input_size that the model takes, got [3, 6]"),
    ],
)
def test_models_without_a_bound(here, factory, size, message):
    result = run("report", "--model", f"networks:{factory}", "--lipschitz", "--input-size", size)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "chatter" not in line]
    assert re.match(r"specnorm-ext: error: --lipschitz \(\w+: lipschitz_bound: expected", line)
    assert message in line


# ---- wrong options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected FILE, a checkpoint, or --model package.module:factory"),
        (["m.pt", "--conv", "true"], "--conv: expected flattened or operator, got 'true'"),
        (["m.pt", "--conv", "operator"], "--conv operator: expected --input-size C,H,W"),
        (["m.pt", "--conv", "operator", "--input-size", "3"], "channels and 1 to 3 spatial sizes"),
        (["m.pt", "--conv", "operator", "--input-size", "3,4,4,4,4"], "1 to 3 spatial sizes"),
        (
            ["m.pt", "--conv", "operator", "--input-size", "3,4"],
            "--input-size 3,4: fits no convolution: conv.weight (2 kernel dimensions)",
        ),
        (
            ["m.pt", "--conv", "operator", "--input-size", "3,a,4"],
            "C,H,W, such as 3,32,32, got '3,",
        ),
        (["m.pt", "--conv", "operator", "--input-size", "3,4.5,4"], "got '3,4.5,4'"),
        (["m.pt", "--conv", "operator", "--input-size", "3,-4,4"], "got '3,-4,4'"),
        (["m.pt", "--conv", "operator", "--input-size", "3,,4"], "got '3,,4'"),
        (["m.pt", "--conv", "operator", "--input-size", ""], "got ''"),
        (["m.pt", "--conv", "operator", "--input-size", "3,٤,4"], "--input-size: expected C,H,W"),
        (
            ["m.pt", "--conv", "operator", "--input-size", "3," + "9" * 5000],
            "--input-size: expected",
        ),
        (["m.pt", "--conv", "operator", "--input-size", "3,0,4"], "sizes are at least 1"),
        (
            ["m.pt", "--conv", "operator", "--input-size", "3,999999999,999999999"],
            "--input-size: conv.weight cannot be computed at it",
        ),
        (["m.pt", "--input-size", "3,4,4"], "--conv operator or --lipschitz beside it"),
        (["m.pt", "--lipschitz", "--input-size", "3,4,4"], "--lipschitz: expected --model package"),
        (["--model", "networks:make", "--lipschitz"], "--lipschitz: expected --input-size C,H,W"),
        (
            ["--model", "networks:make", "--lipschitz", "--input-size", SIZE, "--csv"],
            "--lipschitz and --csv exclude each other",
        ),
        (
            ["--model", "networks:make", "--conv", "operator", "--input-size", "4,6,6"],
            "--input-size: the model fails on zeros of 1x4x6x6 (RuntimeError: Given groups=1",
        ),
        (
            ["--model", "networks:make", "--conv", "operator", "--input-size", "3"],
            "--input-size: the model fails on zeros of 1x3 (RuntimeError: ",
        ),
    ],
)
def test_wrong_options(here, arguments, message):
    torch.save({"conv.weight": torch.randn(4, 3, 3, 3)}, here / "m.pt")
    result = run("report", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "chatter" not in line]
    assert line.startswith("specnorm-ext: error: ")
    assert message in line


def test_help_warns_of_the_code_that_runs():
    text = " ".join(run("report", "--help").stdout.split())
    assert "--model package.module:factory runs your code" in text
    assert "Without this flag no code but this program's runs." in text
