"""Spectral complexity and margins: the formulas written out, and the bound that the norms promise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, eps_of, here, norm
from torch import Tensor, nn

import specnorm_ext
from specnorm_ext.complexity import (
    margin_distribution,
    margins,
    normalized_margins,
    spectral_complexity,
)


def relu_net() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()


def norms_of(net: nn.Module) -> dict[str, float]:
    return {k: norm(v) for k, v in net.state_dict().items() if v.dim() > 1}


def formula(weights: list[Tensor], norms: list[float], rho: float = 1.0) -> float:
    total = sum(
        (sum(row.norm().item() for row in w) / s) ** (2 / 3)
        for w, s in zip(weights, norms, strict=True)
    )
    return math.prod(rho * s for s in norms) * total**1.5


# ---- complexity -------------------------------------------------------------------------------------------------


def test_the_formula_written_out() -> None:
    net = relu_net()
    norms = norms_of(net)
    got = spectral_complexity(net, norms=norms)
    weights = [net[i].weight.detach() for i in (0, 2, 4)]
    exact = formula(weights, list(norms.values()))
    assert abs(got.value / exact - 1) < 1e-12
    assert abs(got.log - math.log(exact)) < 1e-12
    assert abs(got.lipschitz / math.prod(norms.values()) - 1) < 1e-12
    assert got.norms == norms
    assert abs(got.distances["2.weight"] - sum(r.norm().item() for r in weights[1])) < 1e-12
    half = spectral_complexity(net, norms=norms, lipschitz=0.5)
    assert abs(half.value / (exact / 8) - 1) < 1e-12
    assert abs(half.lipschitz / (got.lipschitz / 8) - 1) < 1e-12
    each = spectral_complexity(net, norms=norms, lipschitz=[1.0, 0.5, 0.25])
    assert abs(each.value / (exact / 8) - 1) < 1e-12


def test_estimated_norms_by_default() -> None:
    net = relu_net()
    got = spectral_complexity(net)
    exact = spectral_complexity(net, norms=norms_of(net))
    # every norm to 1e-3 (spectral_norms' tolerance); each enters the product once at most
    assert abs(got.value / exact.value - 1) < 3.1e-3
    assert got.value <= exact.value * (1 + 1e-12)  # from below, as documented
    state = spectral_complexity(net.state_dict())
    assert abs(state.value / got.value - 1) < 1e-12


def test_certified_norms_are_taken_by_their_upper_bound() -> None:
    net = relu_net()
    exact = norms_of(net)

    def bounds(weights) -> dict[str, specnorm_ext.Estimate]:
        return {
            k: specnorm_ext.Estimate(norm(w), norm(w), 1.5 * norm(w), None, None, 1, True, "test")
            for k, w in weights.items()
        }

    got = spectral_complexity(net, norms=bounds)
    assert got.norms == {k: 1.5 * v for k, v in exact.items()}
    assert got.value > spectral_complexity(net, norms=exact).value
    open_ended = {
        k: specnorm_ext.Estimate(v, v, math.inf, None, None, 1, True, "test")
        for k, v in exact.items()
    }
    assert spectral_complexity(net, norms=open_ended).norms == exact
    tensors = {k: torch.tensor(v, dtype=F64) for k, v in exact.items()}
    assert spectral_complexity(net, norms=tensors).norms == exact


def test_certified_norms_bound_the_complexity_from_above() -> None:
    net = relu_net()
    with pytest.raises(
        ValueError,
        match="spectral_complexity: expected norms to be 'estimate' or 'certified', a mapping",
    ):
        spectral_complexity(net, norms="certain")
    below, above = (spectral_complexity(net, norms=kind) for kind in ("estimate", "certified"))
    exact = spectral_complexity(net, norms=norms_of(net))
    assert below.value <= exact.value * (1 + 1e-12)
    assert exact.value * (1 - 1e-12) <= above.value <= exact.value * (1 + 1e-6)


def test_a_certified_norm_that_is_not_bounded_is_inf_and_not_an_estimate() -> None:
    huge = {"a": torch.full((2, 2), 1.7e308, dtype=F64)}  # its norm, 3.4e308, is past float64
    got = spectral_complexity(huge, norms="certified")
    assert got.norms == {"a": math.inf}
    assert got.lipschitz == math.inf
    assert spectral_complexity({"a": torch.eye(2)}, norms={"a": math.inf}).lipschitz == math.inf


def test_the_product_of_the_norms_bounds_the_slope_of_a_relu_network() -> None:
    net = relu_net()
    bound = spectral_complexity(net, norms=norms_of(net)).lipschitz
    x = torch.randn(500, 5, dtype=F64)
    y = x + 0.1 * torch.randn(500, 5, dtype=F64)
    slopes = (net(x) - net(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert slopes.max() <= bound * (1 + 1e-12)
    assert slopes.max() > 0.02 * bound


def test_a_reference_is_subtracted() -> None:
    net = relu_net()
    start = copy.deepcopy(net)
    same = spectral_complexity(net, norms=norms_of(net), reference=start)
    assert same.value == 0
    assert same.log == -math.inf
    with torch.no_grad():
        net[2].weight.add_(0.5)
    moved = spectral_complexity(net, norms=norms_of(net), reference=start.state_dict())
    # one layer has left its place: 6 rows of 7 entries of 0.5, times the other layers' norms
    others = norm(net[0].weight) * norm(net[4].weight)
    assert abs(moved.value / (others * 6 * 0.5 * math.sqrt(7)) - 1) < 1e-10


def test_zero_layers_and_very_deep_networks() -> None:
    zero = {"a": torch.zeros(3, 3), "b": torch.eye(3)}
    got = spectral_complexity(zero)
    assert got.value == got.lipschitz == 0
    assert got.log == -math.inf
    deep = {f"{i}": 100 * torch.eye(2) for i in range(400)}
    got = spectral_complexity(deep, norms=dict.fromkeys(deep, 100.0))
    assert got.value == got.lipschitz == math.inf
    # 100^400 (400 * 2^(2/3))^(3/2)
    assert abs(got.log - (400 * math.log(100) + 1.5 * math.log(400 * 2 ** (2 / 3)))) < 1e-8


def test_a_bad_weight_gives_nan() -> None:
    bad = torch.eye(3)
    bad[0, 1] = math.nan
    got = spectral_complexity({"a": bad, "b": torch.eye(3)})
    assert math.isnan(got.value)
    assert math.isnan(got.log)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_every_kind(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(11, 4),
        nn.Conv1d(4, 6, 3),
        nn.ConvTranspose1d(6, 5, 3),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    ).to(dtype)
    got = spectral_complexity(net)
    assert set(got.norms) == {"0.weight", "1.weight", "2.weight", "4.weight"}
    # rows of A: outputs. An embedding maps one-hot rows to 4 outputs.
    rows = {
        "0.weight": net[0].weight.mT,
        "1.weight": net[1].weight.flatten(1),
        "2.weight": net[2].weight.transpose(0, 1).flatten(1),
        "4.weight": net[4].weight,
    }
    for name, a in rows.items():
        assert (
            abs(got.distances[name] - a.detach().double().norm(dim=1).sum().item())
            < 1e-12 * got.distances[name]
        )
    same = spectral_complexity(net, reference=net.state_dict())
    assert same.value == 0  # a state dict does not say which one is transposed
    assert spectral_complexity(net, reference=net).value == 0


def test_spectrally_normalized_layers_count_as_applied_and_stay_as_they_are() -> None:
    net = nn.Sequential(
        specnorm_ext.spectral_norm(nn.Linear(6, 6)),
        specnorm_ext.SpectralLinear(6, 3),
        specnorm_ext.SpectralConvTranspose1d(3, 4, 2),
        specnorm_ext.SpectralEmbedding(7, 5),
    )
    for module in net:
        shape = (2, 3, 8) if isinstance(module, nn.ConvTranspose1d) else (2, 6)
        x = (
            torch.zeros(2, dtype=torch.long)
            if isinstance(module, nn.Embedding)
            else torch.randn(shape)
        )
        for _ in range(100):
            module(x)
    before = copy.deepcopy(net.state_dict())
    got = spectral_complexity(net)
    assert set(got.norms) == {f"{i}.weight" for i in range(4)}
    # a hundred iterations at a ratio of singular values below 0.95, and an estimate to 1e-3
    assert all(abs(v - 1) < 2e-3 for v in got.norms.values())
    rows = net[2].normalized_weight.transpose(0, 1).flatten(1).double().norm(dim=1).sum().item()
    assert abs(got.distances["2.weight"] / rows - 1) < 1e-12
    assert spectral_complexity(net, reference=copy.deepcopy(net)).value == 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training


def test_u_and_v_in_a_state_dict_are_no_layers() -> None:
    net = nn.Sequential(
        specnorm_ext.SpectralLinear(6, 5, n_vectors=3),
        specnorm_ext.spectral_norm(nn.Linear(5, 4), n_vectors=2),
    )
    got = spectral_complexity(net.state_dict())
    assert set(got.norms) == {"0.weight", "1.parametrizations.weight.original"}


def test_a_shared_weight_counts_once_and_by_its_names_in_a_mapping() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.eye(3))
    net = nn.Sequential(layer, nn.ReLU(), layer)
    # one layer: 3 rows of length 2; two: 4 (3^(2/3) + 3^(2/3))^(3/2)
    assert abs(spectral_complexity(net).value - 6) < 6 * 1e-3
    assert abs(spectral_complexity(net.state_dict()).value - 12 * 2**1.5) < 12 * 2**1.5 * 2e-3


def test_refused() -> None:
    net = relu_net()
    op = "spectral_complexity"
    with pytest.raises(TypeError, match=f"{op}: expected model to be a module or a mapping"):
        spectral_complexity([torch.eye(2)])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"{op}: expected a model with a weight of rank 2 or more, got none"
    ):
        spectral_complexity(nn.LayerNorm(3))
    with pytest.raises(
        ValueError, match=rf"{op}: expected a norm for each of 3 matrices, got none for \['2.wei"
    ):
        spectral_complexity(net, norms={"0.weight": 1.0, "4.weight": 2.0})
    with pytest.raises(ValueError, match=rf"{op}: expected norms\['0.weight'\] to be >= 0, got -1"):
        spectral_complexity(net, norms=dict.fromkeys(norms_of(net), -1.0))
    with pytest.raises(
        TypeError, match=rf"{op}: expected norms\['0.weight'\] to be a number, got str"
    ):
        spectral_complexity(net, norms=dict.fromkeys(norms_of(net), "1"))
    with pytest.raises(TypeError, match=f"{op}: expected norms to be a string, a mapping"):
        spectral_complexity(net, norms=[1.0, 2.0, 3.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{op}: expected lipschitz for each of 3 layers, got 2"):
        spectral_complexity(net, lipschitz=[1.0, 1.0])
    with pytest.raises(TypeError, match=f"{op}: expected reference to be a module or a mapping"):
        spectral_complexity(net, reference=[torch.eye(2)])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"{op}: expected a reference for each of 3 matrices, got none for '2.wei"
    ):
        spectral_complexity(net, reference={"0.weight": net[0].weight})
    with pytest.raises(
        ValueError, match=r"expected reference\['0.weight'\] of shape \[7, 5\], got \[7, 4\]"
    ):
        spectral_complexity(net, reference={**net.state_dict(), "0.weight": torch.zeros(7, 4)})


# ---- margins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_are_those_of_a_loop(dtype: torch.dtype) -> None:
    logits, y = torch.randn(20, 4, dtype=F64).to(dtype), torch.randint(0, 4, (20,))
    got = margins(logits, y)
    assert got.dtype == dtype
    for i in range(20):
        others = [logits[i, j] for j in range(4) if j != y[i]]
        assert got[i] == logits[i, y[i]] - max(others)
    assert torch.equal(margins(logits, y.int()), got)
    assert ((got > 0) == (logits.argmax(1) == y)).all()
    assert margins(logits[:0], y[:0]).shape == (0,)


def test_margins_differentiate() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    margins(logits, torch.tensor([1])).sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 1.0, -1.0]]))
    leaf = torch.randn(6, 3, dtype=F64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda z: margins(z, y), leaf)
    bad = torch.tensor([[math.nan, 1.0], [1.0, 0.0]])
    got = margins(bad, torch.tensor([1, 0]))
    assert got[0].isnan()
    assert got[1] == 1


def test_normalized_margins_do_not_change_with_the_scale_of_a_relu_network() -> None:
    net = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)
    ).double()
    x, y = torch.randn(12, 4, dtype=F64), torch.randint(0, 3, (12,))
    one = normalized_margins(net(x), y, spectral_complexity(net, norms=norms_of(net)), x)
    exact = margins(net(x), y) / (
        formula([net[0].weight, net[2].weight], list(norms_of(net).values())) * x.norm() / 12
    )
    torch.testing.assert_close(one, exact)
    with torch.no_grad():
        net[0].weight.mul_(5)
        net[2].weight.mul_(0.1)
    other = normalized_margins(net(3 * x), y, spectral_complexity(net, norms=norms_of(net)), 3 * x)
    torch.testing.assert_close(other, one)
    plain = normalized_margins(net(x), y, 2.0, x)
    torch.testing.assert_close(plain, margins(net(x), y) * 12 / (2 * x.norm()))


def test_the_distribution_is_that_of_the_whole_set_in_eval() -> None:
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    )
    net[2].eval()
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    before = copy.deepcopy(net.state_dict())
    got = margin_distribution(net, [(x[:7], y[:7]), (x[7:], y[7:])], 3.0)
    assert [m.training for m in net] == [True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not got.requires_grad
    assert got.dtype == F64
    net.eval()
    whole = normalized_margins(net(x), y, 3.0, x).detach().double().cpu().sort().values
    # logits of batches of another size, in float32: sums of 8 terms in another order
    torch.testing.assert_close(got, whole, rtol=0, atol=64 * eps_of(F32) * float(whole.abs().max()))
    default = margin_distribution(net, [(x, y)])
    torch.testing.assert_close(
        default * spectral_complexity(net).value, whole * 3.0, rtol=1e-4, atol=1e-6
    )
    with torch.autocast(here().type, dtype=BF16):
        assert margin_distribution(net, iter([(x, y)]), 3.0).isfinite().all()

    def failing():
        yield x, y
        raise KeyError("mine")

    net.train()
    with pytest.raises(KeyError, match="mine"):
        margin_distribution(net, failing(), 3.0)
    assert net.training


def test_refused_margins() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(
        ValueError,
        match=r"margins: expected logits to have shape \[N, C\] with C >= 2, got \[4, 1\]",
    ):
        margins(logits[:, :1], y)
    with pytest.raises(
        TypeError, match=r"margins: expected targets to be integers, got torch\.float32"
    ):
        margins(logits, y.float())
    with pytest.raises(
        TypeError, match=r"margins: expected logits to be floating point, got torch\.int64"
    ):
        margins(y, y)
    with pytest.raises(
        ValueError, match=r"margins: expected targets to have shape \[4\], got \[3\]"
    ):
        margins(logits, y[:3])
    for bad in (3, -1):
        with pytest.raises(ValueError, match="margins: expected targets from 0 to 2, got"):
            margins(logits, torch.tensor([0, 1, bad, 0]))
    with pytest.raises(
        ValueError, match=r"normalized_margins: expected x to have shape \[4, ...\], got \[3, 2\]"
    ):
        normalized_margins(logits, y, 1.0, torch.randn(3, 2))
    with pytest.raises(
        ValueError, match="normalized_margins: expected complexity to be >= 0, got -1"
    ):
        normalized_margins(logits, y, -1.0, torch.randn(4, 2))
    with pytest.raises(
        ValueError, match="margin_distribution: expected at least one batch, got none"
    ):
        margin_distribution(nn.Linear(2, 3), [], 1.0)
    for batch in (torch.randn(2, 2), {"x": logits, "y": y}, (logits, y, y)):
        with pytest.raises(
            TypeError,
            match=r"margin_distribution: expected batches to hold pairs \(x, targets\), got",
        ):
            margin_distribution(nn.Linear(2, 3), [batch], 1.0)
    with pytest.raises(
        TypeError, match="margin_distribution: expected model to be a module, got function"
    ):
        margin_distribution(lambda x: x, [], 1.0)  # type: ignore[arg-type]
