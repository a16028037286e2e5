"""Penalties on weights beside their closed forms in float64, and what SpectralNormPenalty keeps from call to call."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    eps_of,
    matrix_with_spectrum,
    random_weight,
    smallest,
    state_dtype,
    tolerance,
    true_norm,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext import functional, penalties
from specnorm_ext.penalties import (
    SpectralNormPenalty,
    frobenius_penalty,
    orthogonality_penalty,
    power_iteration,
    weights_of,
)

LAMBDA = 0.25


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def network(dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 5),
    ).to(dtype)


def matrices(model: nn.Module) -> list[Tensor]:
    """As the penalty is to see the weights of `network`: rows are outputs."""
    return [w.movedim(d, 0).flatten(1) for w, d in (
        (model[0].weight, 0), (model[2].weight, 1), (model[4].weight, 0), (model[6].weight, 0))]  # fmt: skip


NAMES = ["0.weight", "2.weight", "4.weight", "6.weight"]


def pairs(penalty: SpectralNormPenalty) -> list[tuple[Tensor, Tensor]]:
    buffers = dict(penalty.named_buffers())
    return [(buffers[f"states.{n}._u"], buffers[f"states.{n}._v"]) for n in NAMES]


def lead(x: Tensor) -> Tensor:
    return (x if x.dim() == 1 else x[:, 0]).double()


def closed_form(
    weights: list[Tensor], uv: list[tuple[Tensor, Tensor]], bound: float | None = None
) -> tuple[float, float, list[Tensor], list[Tensor]]:
    """P, its error, dW and their errors: sigma by the row "dot", and rounded once or twice in each later operation."""
    value = error = 0.0
    gradients, errors = [], []
    for w, (u, v) in zip(weights, uv, strict=True):
        w64, u64, v64 = w.detach().double(), lead(u), lead(v)
        eps = eps_of(state_dtype(w.dtype))
        sigma = torch.dot(u64, w64 @ v64).item()
        off = tolerance("dot", w.dtype, w.shape[1]) * torch.dot(u64.abs(), w64.abs() @ v64.abs())
        off = off.item() + 2 * eps * abs(sigma)
        above = abs(sigma) if bound is None else max(0.0, abs(sigma) - bound)
        value += LAMBDA / 2 * above**2
        error += LAMBDA / 2 * (2 * above * off + off**2 + 4 * eps * above**2)
        outer = torch.outer(u64, v64) * LAMBDA * math.copysign(1, sigma)
        gradients.append(above * outer)
        errors.append((off + (6 * eps + eps_of(w.dtype)) * above) * outer.abs() + smallest(w.dtype))
    return value, error + 4 * eps * value, gradients, errors


def check(penalty: SpectralNormPenalty, model: nn.Module, bound: float | None = None) -> None:
    model.zero_grad()
    value = penalty()
    assert value.shape == ()
    value.backward()
    expected, error, gradients, errors = closed_form(matrices(model), pairs(penalty), bound)
    assert abs(value.double().item() - expected) <= error
    parameters = [model[0].weight, model[2].weight, model[4].weight, model[6].weight]
    assert all(p.grad.dtype == p.dtype for p in parameters)
    grads = [p.grad.movedim(d, 0).flatten(1) for p, d in zip(parameters, (0, 1, 0, 0), strict=True)]
    for got, want, off in zip(grads, gradients, errors, strict=True):
        assert ((got.double() - want).abs() <= off).all()
    assert model[4].bias.grad is None
    assert model[5].weight.grad is None


# ---- SpectralNormPenalty: values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_vectors", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_are_those_of_the_formula(dtype, n_vectors, training):
    model = network(dtype)
    penalty = SpectralNormPenalty(model, LAMBDA, n_vectors=n_vectors).train(training)
    assert penalty().dtype == state_dtype(dtype)
    check(penalty, model)


def test_hinge():
    model = network(F64)
    norms = sorted(true_norm(w) for w in matrices(model))
    bound = (norms[1] + norms[2]) / 2  # two are above
    penalty = SpectralNormPenalty(model, LAMBDA, 30, bound=bound)
    check(penalty, model, bound)
    above = [bool(model.get_parameter(n).grad.any()) for n in NAMES]
    assert sum(above) == 2
    assert penalty() > 0
    penalty.bound = 10 * norms[-1]
    assert penalty() == 0


def test_each_call_in_training_is_one_iteration_and_none_in_eval():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA, n_power_iterations=2)
    expected = [(u.clone(), v.clone()) for u, v in pairs(penalty)]
    for _ in range(3):
        penalty()
        for w, (u, v) in zip(matrices(model), expected, strict=True):
            functional.power_iteration(w.detach(), u, v, 2)
        assert all(
            torch.equal(x, y)
            for a, b in zip(pairs(penalty), expected, strict=True)
            for x, y in zip(a, b, strict=True)
        )
    penalty.eval()
    first = penalty()
    assert first == penalty()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs(penalty), expected, strict=True))
    penalty.train()
    penalty()
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(pairs(penalty), expected, strict=True))


def test_all_layers_in_one_call(monkeypatch):
    calls = []
    for name in ("power_iteration", "sigma"):
        run = getattr(functional, name)

        def count(weights, *args, run=run, name=name):
            calls.append((name, len(weights)))
            return run(weights, *args)

        monkeypatch.setattr(functional, name, count)
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    penalty()
    assert calls == [("power_iteration", 4), ("sigma", 4)]
    calls.clear()
    model[4].double()
    assert penalty().dtype == F64  # two dtypes: a call for each
    assert sorted(calls) == [("power_iteration", 1), ("power_iteration", 3), ("sigma", 1), ("sigma", 3)]  # fmt: skip


def test_a_step_of_descent_shrinks_the_largest_singular_value_alone():
    """With converged u and v, W - eta lambda sigma_1 u v^T has (1 - eta lambda) sigma_1 in place of sigma_1."""
    spectrum = [2.0, 1.0, 0.5, 0.25]
    model = nn.Linear(6, 4, bias=False, dtype=F64)
    with torch.no_grad():
        model.weight.copy_(matrix_with_spectrum(4, 6, spectrum))
    penalty = SpectralNormPenalty(model, coefficient=0.1, n_power_iterations=40)
    penalty().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    # the angle of u and v to the true ones after 55 iterations is 2^-110; what is left is rounding
    rest = 100 * tolerance("sigma", F64, 6)
    values = torch.linalg.svdvals(model.weight.detach())
    assert torch.allclose(values, torch.tensor([1.8, 1.0, 0.5, 0.25], dtype=F64), rtol=rest, atol=0)


def test_gradients_of_two_calls_before_one_backward():
    model = network(F64)
    penalty = SpectralNormPenalty(model, LAMBDA)
    first = penalty()
    one = [x.grad.clone() for x in _backward(model, first, retain_graph=True)]
    second = penalty()
    two = [x.grad.clone() for x in _backward(model, second, retain_graph=True)]
    both = _backward(model, first + second)
    assert not torch.equal(one[0], two[0])
    for p, a, b in zip(both, one, two, strict=True):
        assert torch.allclose(p.grad, a + b, rtol=4 * eps_of(F64), atol=1e-17)


def _backward(model, loss, **kwargs):
    model.zero_grad()
    loss.backward(**kwargs)
    return [model.get_parameter(n) for n in NAMES]


def test_derivatives_to_second_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.ConvTranspose1d(2, 3, 2, dtype=F64))
    penalty = SpectralNormPenalty(model, LAMBDA, bound=0.01).eval()
    keys = ("0.weight", "1.weight")

    def value(*weights):
        both = nn.ModuleDict({"model": model, "penalty": penalty})
        return torch.func.functional_call(
            _Call(both), {f"both.model.{k}": w for k, w in zip(keys, weights, strict=True)}, ()
        )

    weights = [model.get_parameter(k).detach().clone().requires_grad_() for k in keys]
    assert torch.autograd.gradcheck(value, weights)
    assert torch.autograd.gradgradcheck(value, weights)
    gradient = torch.func.grad(value)(*weights)
    assert torch.allclose(gradient, torch.autograd.grad(value(*weights), weights[0])[0])


class _Call(nn.Module):
    def __init__(self, both: nn.ModuleDict) -> None:
        super().__init__()
        self.both = both

    def forward(self) -> Tensor:
        return self.both["penalty"]()


# ---- which weights ------------------------------------------------------------------------------------------------


def test_kinds_and_select():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "rnn": nn.GRU(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "head": nn.Linear(4, 2),
            "bilinear": nn.Bilinear(2, 3, 4),
            "norm": nn.LayerNorm((3, 4)),
        }
    )

    def names(**options):
        return list(SpectralNormPenalty(model, 1.0, **options).sigmas())

    linear = ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert names() == linear
    assert names(select=["embedding"]) == ["embedding.weight"]
    assert names(select={"recurrent"}) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert names(select=("other",)) == ["bilinear.weight"]
    assert names(select=lambda x: x.name.startswith("head") and x.kind == "linear") == linear[2:]
    shapes = []
    names(select=lambda x: shapes.append((x.shape, tuple(x.weight.shape))) or True)
    assert ((4, 2, 3), (4, 6)) in shapes
    assert [w is model["head"].weight for w in weights_of(model)] == [False, False, True]


def test_weights_of_transposed_convolutions_write_through():
    model = network()
    views = weights_of(model)
    assert views[0] is model[0].weight
    assert views[1].shape == (4, 6, 3, 3)
    with torch.no_grad():
        views[1].zero_()
    assert not model[2].weight.any()


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    penalty = SpectralNormPenalty(model, 1.0)
    assert list(penalty.sigmas()) == ["0.weight"]
    other = nn.Linear(4, 4)
    other.weight = model[0].weight
    alone = SpectralNormPenalty(other, 1.0)
    alone.load_state_dict({k.replace("0.", ""): x for k, x in penalty.state_dict().items()})
    assert penalty() == alone()


def test_frozen_weights_are_passed_over():
    model = network(F64)
    penalty = SpectralNormPenalty(model, LAMBDA)
    still = pairs(penalty)[0][0].clone()
    model[0].requires_grad_(False)
    value = penalty()
    assert torch.equal(pairs(penalty)[0][0], still)
    expected = closed_form(matrices(model)[1:], pairs(penalty)[1:])[0]
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert model[0].weight.grad is None
    with torch.no_grad():
        assert (
            penalty() > 0
        )  # what gradients are recorded does not count, what could be trained does
    assert list(penalty.sigmas()) == NAMES
    model.requires_grad_(False)
    value = penalty()
    assert value == 0
    assert value.dtype == F64
    assert not value.requires_grad


def test_normalized_weights_are_left_out():
    model = nn.Sequential(
        specnorm_ext.SpectralLinear(3, 3),
        specnorm_ext.spectral_norm(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    assert list(SpectralNormPenalty(model, 1.0).sigmas()) == ["4.weight"]
    with pytest.raises(ValueError, match="SpectralNormPenalty: expected a model with weights to act on, got SpectralLinear"):  # fmt: skip
        SpectralNormPenalty(model[0], 1.0)


def test_a_parametrized_weight_counts_as_computed():
    layer = parametrizations.weight_norm(nn.Linear(4, 3, dtype=F64))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    penalty = SpectralNormPenalty(layer, 1.0, n_power_iterations=200)
    penalty.eval()
    for _ in range(2):
        value = penalty()
        assert value.item() <= true_norm(layer.weight) ** 2 / 2 * (1 + 1e-12)
    penalty.train()
    value = penalty()
    assert value.item() == pytest.approx(true_norm(layer.weight) ** 2 / 2, rel=1e-9)
    value.backward()
    # P is homogeneous of degree 2 in the lengths: <g, dP/dg> = 2 P
    g = layer.parametrizations.weight.original0
    assert (g * g.grad).sum().item() == pytest.approx(2 * value.item(), rel=1e-9)


# ---- SpectralNormPenalty: what it keeps ---------------------------------------------------------------------------


def test_the_model_is_not_a_part_of_it():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    assert list(penalty.parameters()) == []
    assert list(penalty.state_dict()) == [f"states.{n}.{x}" for n in NAMES for x in ("_u", "_v")]
    assert repr(penalty) == "SpectralNormPenalty(4 weights, coefficient=0.25)"
    assert repr(SpectralNormPenalty(model[6], 1.0, bound=0.5)) == "SpectralNormPenalty(1 weights, coefficient=1, bound=0.5)"  # fmt: skip
    model.penalty = penalty  # inside of its model: no circle
    assert len(list(model.modules())) < 30
    before = penalty.eval()()
    assert before > 0
    state = model.state_dict()
    assert [k for k in state if k.startswith("penalty.")] == [f"penalty.{k}" for k in penalty.state_dict()]  # fmt: skip
    other = copy.deepcopy(model)
    assert other.penalty() == before
    assert other.penalty._model[0] is other


def test_state_dict_continues_the_trajectory():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA, n_vectors=2)
    penalty()
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    other = SpectralNormPenalty(model, LAMBDA, n_vectors=2)
    other.load_state_dict(torch.load(file))
    assert penalty() == other()


def test_loaded_rubbish_is_mended():
    model = network()
    good = SpectralNormPenalty(model, LAMBDA, n_power_iterations=50)
    expected = good().item()
    bad = good.state_dict()
    bad["states.0.weight._v"] = torch.full_like(bad["states.0.weight._v"], torch.nan)
    penalty = SpectralNormPenalty(model, LAMBDA, n_power_iterations=50)
    penalty.load_state_dict(bad)
    with pytest.warns(UserWarning, match="held NaN, Inf or zeros"):
        assert penalty().item() == pytest.approx(expected, rel=1e-3)
    bad["states.0.weight._v"] = 3 * good.state_dict()["states.0.weight._v"]
    penalty.load_state_dict(bad)
    penalty.eval()
    with pytest.warns(UserWarning, match="not normalized"):
        assert penalty().item() == pytest.approx(expected, rel=1e-3)


def test_weights_that_changed_in_eval_are_looked_at():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA, n_vectors=4).eval()
    with torch.no_grad():
        for w in weights_of(model):
            w.copy_(torch.randn(w.shape))
    with pytest.warns(UserWarning, match="do not belong to it"):
        value = penalty().item()
    expected = LAMBDA / 2 * sum(true_norm(w) ** 2 for w in matrices(model))
    assert 0.8 * expected < value < expected * (1 + 1e-5)
    assert penalty().item() == value


def test_copies():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    for twins in (
        copy.deepcopy((model, penalty)),
        pickle.loads(pickle.dumps((model, penalty))),
    ):
        other_model, other = twins
        assert other._model[0] is other_model
        assert other._found[0].module is other_model[0]
        assert penalty.eval()() == other.eval()()
        with torch.no_grad():
            other_model[0].weight.zero_()
        assert penalty() != other()
    penalty.train()
    alone = copy.deepcopy(penalty)
    assert alone._model[0] is not model
    assert alone() == penalty()


def test_dtypes_and_devices_follow_the_weights():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    penalty.half()
    assert all(x.dtype == F32 for x in penalty.buffers())
    model.double()
    check(penalty, model)
    assert all(x.dtype == F64 for x in penalty.buffers())
    model.bfloat16()
    check(penalty, model)
    assert all(x.dtype == F32 for x in penalty.buffers())


def test_made_on_meta():
    with torch.device("meta"):
        model = nn.Linear(5, 4)
        penalty = SpectralNormPenalty(model, LAMBDA, n_power_iterations=60)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert penalty().item() == pytest.approx(LAMBDA / 2 * true_norm(model.weight) ** 2, rel=1e-2)
    assert all(x.device.type == "cpu" for x in penalty.buffers())


def test_under_inference_mode():
    model = network()
    with torch.inference_mode():
        penalty = SpectralNormPenalty(model, LAMBDA)
        assert penalty() > 0
        assert penalty.eval()() > 0
    check(penalty.train(), model)


def test_modules_that_come_and_go():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    kept = pairs(penalty)[0][0].clone()
    model.append(nn.Linear(5, 5))
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"expected the model's modules and parameters as they were found, got others; call refresh\(\)"):  # fmt: skip
            penalty.train(training)()
    penalty.refresh()
    assert torch.equal(pairs(penalty)[0][0], kept)
    assert list(penalty.sigmas()) == [*NAMES, "7.weight"]
    assert penalty.states.training == penalty.training
    model[7] = nn.Linear(5, 5)  # as many as before, but another one
    with pytest.raises(RuntimeError, match="got others"):
        penalty()
    penalty.refresh()
    model[7].weight = nn.Parameter(torch.zeros(6, 5))
    with pytest.raises(
        RuntimeError,
        match=r"expected 7.weight to have the shape that it was found with, got \[6, 5\]",
    ):
        penalty()
    model[7].weight = nn.Parameter(torch.zeros(5, 5))  # of the same shape: is taken as it is
    assert penalty.sigmas()["7.weight"] == 0
    del model[7]
    penalty.refresh()
    assert list(penalty.sigmas()) == NAMES


def test_what_has_become_no_tensor():
    model = nn.Sequential(nn.Linear(3, 3))
    penalty = SpectralNormPenalty(model, LAMBDA)
    model[0].weight = None
    with pytest.raises(
        RuntimeError, match="expected 0.weight to be a tensor, as it was found, got none"
    ):
        penalty()


def test_nan_zero_and_empty_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(torch.zeros(0, 4))
    model[2].weight = nn.Parameter(torch.zeros(4, 0))
    with torch.no_grad():
        model[0].weight.zero_()
    penalty = SpectralNormPenalty(model, 1.0, n_power_iterations=40)
    penalty().backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(4, 4))
    expected = true_norm(model[3].weight) ** 2 / 2
    assert penalty().item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        good = model[3].weight.clone()
        model[3].weight[0, 0] = torch.inf
    kept = penalty.state_dict()["states.3.weight._u"].clone()
    assert penalty().isnan()
    assert torch.equal(penalty.state_dict()["states.3.weight._u"], kept)
    with torch.no_grad():
        model[3].weight.copy_(good)
    assert penalty().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_vectors", [1, 4])
def test_compiled_with_the_step(n_vectors):
    def step(model, penalty, x):
        loss = model(x).square().mean() + penalty()
        loss.backward()
        return loss

    x = torch.randn(4, 6)
    results = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        penalty = SpectralNormPenalty(model, LAMBDA, n_vectors=n_vectors)
        total = _Total(model, penalty)
        run = torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total
        values = []
        for _ in range(3):
            loss = run(x)
            loss.backward()
            values.append(loss.detach())
        results.append([*values, model[0].weight.grad, *penalty.buffers()])
    torch._dynamo.reset()
    # the same ops in the same order, but for the fusion of sums
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=8 * eps_of(F32), atol=8 * eps_of(F32))


class _Total(nn.Module):
    def __init__(self, model, penalty):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, x):
        return self.model(x).square().mean() + self.penalty()


def test_autocast_leaves_it_as_it_is():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA).eval()
    expected = penalty()
    w = random_weight(6, 8)
    others = (orthogonality_penalty(w), frobenius_penalty(w), power_iteration(w))
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty() == expected
        assert (orthogonality_penalty(w), frobenius_penalty(w), power_iteration(w)) == others


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"coefficient": -0.1}, ValueError, "expected coefficient to be finite and >= 0, got -0.1"),
        ({"coefficient": math.nan}, ValueError, "expected coefficient to be finite"),
        ({"coefficient": "1"}, TypeError, "expected coefficient to be a number, got str"),
        ({"coefficient": True}, TypeError, "expected coefficient to be a number, got bool"),
        ({"bound": -1}, ValueError, "expected bound to be finite and >= 0"),
        ({"n_power_iterations": 0}, ValueError, "expected n_power_iterations >= 1, got 0"),
        ({"n_power_iterations": 1.5}, TypeError, "expected n_power_iterations to be an int, got float"),
        ({"n_vectors": 9}, ValueError, "expected n_vectors between 1 and 8, got 9"),
        ({"eps": -1}, ValueError, "expected eps to be finite and >= 0"),
        ({"select": ["dense"]}, ValueError, "expected select to hold kinds out of linear, conv, .*got 'dense'"),
        ({"select": "linear"}, TypeError, "expected select to be a function or a list of kinds, got 'linear'"),
        ({"select": 3}, TypeError, "expected select to be a function or a list of kinds"),
        ({"model": nn.ReLU()}, ValueError, "expected a model with weights to act on, got ReLU"),
        ({"model": torch.ones(2, 2)}, TypeError, "expected model to be a torch.nn.Module, got Tensor"),
        ({"model": nn.LazyLinear(3)}, ValueError, "expected parameters with a shape, weight is uninitialized"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match="^SpectralNormPenalty: " + message):
        SpectralNormPenalty(**{"model": nn.Linear(3, 3), "coefficient": 1.0, **kwargs})


# ---- penalties without a state ------------------------------------------------------------------------------------


def sum_error(x: Tensor, terms: int) -> float:
    """Of a sum of `terms` numbers of size x.sum(), each rounded: the row "dot" with all of them in one sum."""
    return tolerance("dot", x.dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frobenius(dtype):
    weights = [random_weight(5, 7, dtype, seed=1), random_weight(3, 2, dtype, seed=2)[0]]
    weights = [w.requires_grad_() for w in weights]
    value = frobenius_penalty(weights, LAMBDA)
    assert value.dtype == state_dtype(dtype)
    exact = LAMBDA / 2 * sum(w.detach().double().square().sum().item() for w in weights)
    assert abs(value.double().item() - exact) <= tolerance("dot", dtype, 37) * exact
    value.backward()
    for w in weights:  # a product, and its rounding to the weight's dtype
        exact = LAMBDA * w.detach().double()
        assert ((w.grad.double() - exact).abs() <= tolerance("quotient", dtype) * exact.abs()).all()
    assert frobenius_penalty(weights[0]) > 0


def test_frobenius_hinge():
    w = torch.full((2, 2), 3.0, requires_grad=True)  # |W| = 6
    small = torch.full((2, 2), 0.5, requires_grad=True)  # |W| = 1
    zero = torch.zeros(2, requires_grad=True)
    value = frobenius_penalty([w, small, zero], 2.0, bound=5.0)
    value.backward()
    assert value.item() == pytest.approx(1.0, rel=4 * eps_of(F32))
    # lambda (|W| - c) W / |W|
    assert torch.allclose(w.grad, torch.full((2, 2), 1.0), rtol=8 * eps_of(F32), atol=0)
    assert not small.grad.any()
    assert not zero.grad.any()
    zero.grad = None
    frobenius_penalty(zero, bound=0.0).backward()
    assert not zero.grad.any()  # and no NaN at the point where the norm has no derivative


def test_sixteen_bits_do_not_overflow():
    w = torch.full((40, 40), 200.0, dtype=F16, requires_grad=True)
    frobenius_penalty(w).backward()
    assert torch.equal(w.grad, w)
    assert frobenius_penalty(w).item() == 0.5 * 200.0**2 * 1600
    assert orthogonality_penalty(w).isfinite()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("off_diagonal", [False, True])
def test_orthogonality_is_a_function_of_the_singular_values(shape, off_diagonal):
    w = torch.randn(shape, dtype=F64, requires_grad=True)
    value = orthogonality_penalty(w, LAMBDA, off_diagonal=off_diagonal)
    flat = w.detach().flatten(1)
    s = torch.linalg.svdvals(flat)
    exact = (s.square() - 1).square().sum()
    if off_diagonal:
        small = flat if flat.shape[0] <= flat.shape[1] else flat.mT
        exact = exact - (small.square().sum(1) - 1).square().sum()
    assert value.item() == pytest.approx(LAMBDA * exact.item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: orthogonality_penalty(x, LAMBDA, off_diagonal=off_diagonal), w
    )
    assert torch.autograd.gradgradcheck(
        lambda x: orthogonality_penalty(x, LAMBDA, off_diagonal=off_diagonal), w
    )


def test_orthogonal_weights_cost_nothing():
    w = torch.linalg.qr(torch.randn(6, 4, dtype=F64)).Q
    # |Q^T Q - I| of a Householder QR is a few eps for each entry
    assert orthogonality_penalty([w, w.mT]).item() <= 2 * 16 * (20 * eps_of(F64)) ** 2
    assert orthogonality_penalty(3 * w, off_diagonal=True).item() <= 16 * (180 * eps_of(F64)) ** 2
    assert orthogonality_penalty(3 * w).item() == pytest.approx(4 * 64)


def test_nothing_and_empty():
    for penalty in (frobenius_penalty, orthogonality_penalty):
        assert penalty([]) == 0
        for shape in ((0, 4), (4, 0)):
            assert penalty(torch.zeros(shape)) == 0
    assert power_iteration(torch.zeros(0, 4)) == 0
    assert power_iteration(torch.zeros(4, 0)) == 0
    assert frobenius_penalty(torch.tensor(3.0)) == 4.5


def test_nan_comes_through():
    w = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    assert frobenius_penalty(w).isnan()
    assert orthogonality_penalty(w).isnan()
    assert power_iteration(w).isnan()
    assert power_iteration(w, through_iteration=False).isnan()


def test_of_a_model():
    model = network(F64)
    frobenius_penalty(model.parameters()).backward()
    assert torch.allclose(model[4].bias.grad, model[4].bias)
    expected = sum(
        (torch.linalg.svdvals(w.detach()).square() - 1).square().sum() for w in matrices(model)
    )
    # every one of them has no more rows than columns
    assert orthogonality_penalty(weights_of(model)).item() == pytest.approx(expected.item())


def test_compiled_functions():
    def total(w):
        return frobenius_penalty(w, 0.5, 1.0) + orthogonality_penalty([w]) + power_iteration(w, 3)

    w = random_weight(4, 6)
    run = torch.compile(total, backend="aot_eager", fullgraph=True)
    got = run(w)
    torch._dynamo.reset()
    assert torch.allclose(got, total(w), rtol=8 * eps_of(F32))


@pytest.mark.parametrize("penalty", [frobenius_penalty, orthogonality_penalty])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, 2), -1), ValueError, "expected coefficient to be finite and >= 0, got -1"),
        ((torch.ones(2, 2), None), TypeError, "expected coefficient to be a number, got NoneType"),
        (([torch.ones(2, 2), 1.0],), TypeError, r"expected weights\[1\] to be a tensor, got float"),
        ((torch.ones(2, 2, dtype=torch.int64),), TypeError, r"expected weights\[0\] to be torch.float32, .*got torch.int64"),
        ((3,), TypeError, "expected a tensor or a list of tensors, got int"),
        (("weight",), TypeError, "expected a tensor or a list of tensors, got str"),
        ((nn.Linear(2, 2),), TypeError, r"expected a tensor or a list of tensors, got a module; pass weights_of\(model\)"),
    ],
)  # fmt: skip
def test_bad_arguments_of_functions(penalty, args, error, message):
    with pytest.raises(error, match=f"^{penalty.__name__}: {message}"):
        penalty(*args)


def test_rank_and_bound():
    with pytest.raises(ValueError, match=r"^orthogonality_penalty: expected weights\[1\] to be a matrix or of higher rank, got shape \[3\]"):  # fmt: skip
        orthogonality_penalty([torch.ones(2, 2), torch.ones(3)])
    with pytest.raises(ValueError, match="^frobenius_penalty: expected bound to be finite and >= 0, got -2"):  # fmt: skip
        frobenius_penalty(torch.ones(3), bound=-2)
    with pytest.raises(TypeError, match="^weights_of: expected model to be a torch.nn.Module"):
        weights_of([torch.ones(2, 2)])


# ---- the power iteration of the text ------------------------------------------------------------------------------


def listing(w: Tensor, r: int) -> Tensor:
    """The algorithm as its text gives it, in torch's words: u of ones, r rounds, the weight as (in, out)."""

    def l2_normalize(x):
        return x * torch.rsqrt(torch.clamp(torch.sum(x**2), min=1e-12))

    w = w.reshape(-1, w.shape[-1])
    u = torch.ones((1, w.shape[0]), dtype=w.dtype)
    for _ in range(r):
        v = l2_normalize(u @ w)
        u = l2_normalize(v @ w.mT)
    return torch.sum((u @ w) @ v.mT)


@pytest.mark.parametrize("r", [1, 2, 5, 20])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 3, 4, 6), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_gives_the_numbers_of_the_listing(shape, r, through):
    w = torch.randn(shape, dtype=F64)
    got, want = power_iteration(w, r, through_iteration=through), listing(w, r)
    flat = w.reshape(-1, shape[-1])
    # Each round adds an error of `product` S / |u W| to u and v, and shrinks what was there; sigma is off by that,
    # once more for the last form. The op adds its jitter to the start.
    norm = true_norm(flat)
    s = torch.linalg.vector_norm(torch.ones(flat.shape[0], dtype=F64) @ flat) / flat.shape[0] ** 0.5
    condition = max(1.0, norm / s.item())
    per_round = (tolerance("product", F64, max(flat.shape)) + tolerance("jitter", F64)) * condition
    assert abs(got.item() - want.item()) <= 2 * (r + 1) * per_round * norm


def test_gradient_through_the_rounds_is_that_of_the_listing():
    w = torch.randn(6, 4, dtype=F64, requires_grad=True)
    for r in (1, 3):
        (got,) = torch.autograd.grad(power_iteration(w, r), w)
        (want,) = torch.autograd.grad(listing(w, r), w)
        (constant,) = torch.autograd.grad(power_iteration(w, r, through_iteration=False), w)
        # float64 against float64 through 4 r products: far below the 1e-2 by which the other convention differs
        assert torch.allclose(got, want, rtol=0, atol=1e-13)
        assert not torch.allclose(constant, want, rtol=0, atol=1e-3)
    assert torch.autograd.gradcheck(lambda x: power_iteration(x, 3), w)
    assert torch.autograd.gradgradcheck(lambda x: power_iteration(x, 2), w)


def test_both_gradients_are_u_v_once_converged():
    w = matrix_with_spectrum(6, 4, [1.0, 0.5, 0.25, 0.1]).requires_grad_()
    left, _, right = torch.linalg.svd(w.detach(), full_matrices=False)
    exact = torch.outer(left[:, 0], right[0])
    for through in (True, False):
        (got,) = torch.autograd.grad(power_iteration(w, 60, through_iteration=through), w)
        # 2^-120 of the start is left; rounding of 60 rounds does not pile up, for each shrinks what came before
        assert torch.linalg.matrix_norm(got - exact) <= 20 * tolerance("product", F64, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_in_every_dtype(dtype, through):
    w = random_weight(8, 6, dtype).requires_grad_()
    got = power_iteration(w, through_iteration=through)
    assert got.dtype == state_dtype(dtype)
    want = listing(w.detach().double(), 5).item()
    norm = true_norm(w)
    # |u_0 W| is above 0.3 |W| here, so errors grow by at most 1 / 0.3 in the first round, and shrink later
    bound = 12 * (tolerance("product", dtype, 8) + tolerance("jitter", dtype)) / 0.3 * norm
    assert abs(got.double().item() - want) <= bound
    got.backward()
    assert w.grad.dtype == dtype
    # the norm has Lipschitz constant 1 once converged, and a little more before
    assert 0.9 < torch.linalg.matrix_norm(w.grad.double(), 2) < 3


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(("dtype", "scales"), [(F32, (1e-38, 1e-20, 1e20, 1e37)), (F64, (1e-300, 1e300)), (BF16, (1e-38, 1e37))], ids=str)  # fmt: skip
def test_power_iteration_over_the_whole_range(dtype, scales, through):
    base = random_weight(6, 5, dtype)
    for scale in scales:
        w = (base * scale).requires_grad_()
        got = power_iteration(w, through_iteration=through)
        got.backward()
        assert w.grad.isfinite().all()
        want = (listing(w.detach().double() / scale, 5) * scale).item()
        assert got.double().item() == pytest.approx(want, rel=1e-4 if dtype != F64 else 1e-12)


@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_of_zero(through):
    w = torch.zeros(3, 4, requires_grad=True)
    sigma = power_iteration(w, through_iteration=through)
    sigma.backward()
    assert sigma == 0
    assert w.grad.isfinite().all()


def test_power_iteration_as_a_normalization():
    w = torch.randn(6, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: x / power_iteration(x), w)
    assert true_norm(w / power_iteration(w, 200)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(3),), ValueError, r"expected weights\[0\] to be a matrix or of higher rank, got shape \[3\]"),
        ((torch.ones(3, 3), 0), ValueError, "expected r >= 1, got 0"),
        ((torch.ones(3, 3), 2.5), TypeError, "expected r to be an int, got float"),
        (([torch.ones(3, 3)],), TypeError, "expected weight to be a tensor, got list"),
    ],
)  # fmt: skip
def test_bad_arguments_of_power_iteration(args, error, message):
    with pytest.raises(error, match="^power_iteration: " + message):
        power_iteration(*args)


def test_public_names():
    assert set(penalties.__all__) <= set(dir(penalties))
