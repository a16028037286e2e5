"""SpectralNormPenalty beside its closed form in float64: which weights, and what it keeps from call to call."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import (
    DTYPES,
    F32,
    F64,
    eps_of,
    here,
    matrix_with_spectrum,
    smallest,
    state_dtype,
    tolerance,
    true_norm,
)
from torch import Tensor, nn

from specnorm_ext import functional
from specnorm_ext.penalties import (
    SpectralNormPenalty,
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


def test_under_torch_func():
    """What functional_call puts in the place of parameters counts, whether or not it requires grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    penalty = SpectralNormPenalty(model, LAMBDA).eval()
    both = _Call(nn.ModuleDict({"model": model, "penalty": penalty}))
    weights = {f"both.model.{k}": p.detach() for k, p in model.named_parameters()}

    def value(weights):
        return torch.func.functional_call(both, weights, ())

    expected = penalty()
    expected.backward()
    assert value(weights) == expected
    gradient = torch.func.grad(value)(weights)
    assert torch.allclose(gradient["both.model.0.weight"], model[0].weight.grad)
    scaled = {k: torch.stack([w, 2 * w]) for k, w in weights.items()}
    assert torch.allclose(torch.vmap(value)(scaled), torch.stack([expected, 4 * expected]))
    _, slope = torch.func.jvp(value, (weights,), (weights,))
    assert torch.allclose(slope, 2 * expected)
    penalty.train()
    assert torch.func.grad(value)(weights)["both.model.0.weight"].any()
    with pytest.raises(ValueError, match=r"expected u\[0\] to be batched under vmap"):
        torch.vmap(value)(scaled)


class _Call(nn.Module):
    def __init__(self, both: nn.ModuleDict) -> None:
        super().__init__()
        self.both = both

    def forward(self) -> Tensor:
        return self.both["penalty"]()


# ---- which weights ------------------------------------------------------------------------------------------------


def test_weights_of_transposed_convolutions_write_through():
    model = network()
    views = weights_of(model)
    assert views[0] is model[0].weight
    assert views[1].shape == (4, 6, 3, 3)
    with torch.no_grad():
        views[1].zero_()
    assert not model[2].weight.any()


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


# ---- SpectralNormPenalty: what it keeps ---------------------------------------------------------------------------


def test_the_model_is_not_a_part_of_it():
    model = network()
    penalty = SpectralNormPenalty(model, LAMBDA)
    assert list(penalty.parameters()) == []
    assert list(penalty.state_dict()) == [f"states.{n}.{x}" for n in NAMES for x in ("_u", "_v")]
    assert repr(penalty) == "SpectralNormPenalty(4 weights, coefficient=0.25)"
    hinge = SpectralNormPenalty(model[6], 1.0, bound=0.5)
    assert repr(hinge) == "SpectralNormPenalty(1 weights, coefficient=1, bound=0.5)"
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


def test_refresh_after_weights_were_loaded():
    model, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape))
    penalty = SpectralNormPenalty(model, LAMBDA)
    model.load_state_dict(other.state_dict())
    penalty.refresh()
    expected = LAMBDA / 2 * sum(true_norm(w) ** 2 for w in matrices(model))
    with pytest.warns(UserWarning, match="do not belong to it"):
        assert penalty().item() > 0.8 * expected


def test_a_weight_of_the_other_sign_has_the_same_norm():
    model = network(F64)
    penalty = SpectralNormPenalty(model, LAMBDA, bound=0.1).eval()
    before = penalty().item()
    with torch.no_grad():
        for w in weights_of(model):
            w.neg_()
    check(penalty, model, 0.1)
    assert penalty().item() == pytest.approx(before, rel=1e-12)


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
    model.to_empty(device=here())
    model.reset_parameters()
    assert penalty().item() == pytest.approx(LAMBDA / 2 * true_norm(model.weight) ** 2, rel=1e-2)
    assert all(x.device == here() for x in penalty.buffers())


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
        with pytest.raises(RuntimeError, match=r"as they were found, got others; call refresh\(\)"):
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
    layer = model[0]
    model[0] = nn.ReLU()
    with pytest.raises(ValueError, match="with weights to act on, got Sequential without any"):
        penalty.refresh()
    model[0] = layer
    assert penalty() > 0  # as it was
    model[0].weight = None
    with pytest.raises(
        RuntimeError, match=r"expected 0.weight to be a tensor, as it was found, got none"
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
    with torch.autocast(here().type, torch.bfloat16):
        assert penalty() == expected


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
