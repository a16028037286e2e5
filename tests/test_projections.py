"""Constraints on weights after the step, beside their closed forms in float64; and the hook that imposes them."""

from __future__ import annotations

import copy
import functools
import itertools
import math

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
    same_bits,
    smallest,
    start,
    state_dtype,
    tolerance,
    true_norm,
)
from torch import nn
from torch.nn.utils import parametrizations

from specnorm_ext import functional, projections
from specnorm_ext.penalties import weights_of
from specnorm_ext.projections import (
    ProjectionHook,
    clip_frobenius_,
    clip_weights_,
    project_spectral_norm_,
)

FUNCTIONS = (clip_weights_, clip_frobenius_, project_spectral_norm_)
by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def once(dtype: torch.dtype) -> float:
    """Of an entry times a factor, relatively: the factor's roundings and the product's in the state dtype, and the one
    when it is stored in 16 bits."""
    return eps_of(dtype) / 2 + 2 * eps_of(state_dtype(dtype))


def rounded(dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """How far rounding the entries of a matrix moves its norm, relatively: eps_w / 2 of each entry, and
    |E|_2 <= |E|_F <= eps_w / 2 |W|_F <= eps_w / 2 sqrt(rank) |W|_2; the factor's own rounding and its product add
    eps / 2 each."""
    return eps_of(dtype) / 2 * math.sqrt(min(shape)) + 2 * eps_of(dtype)


# ---- clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_weights(dtype):
    weights = [
        random_weight(5, 7, dtype),
        random_weight(1, 6, dtype)[0],
        torch.tensor(3.0).to(dtype),
    ]
    before = [w.clone() for w in weights]
    assert clip_weights_(weights, 0.5) is None
    for w, x in zip(weights, before, strict=True):
        assert torch.equal(w, x.clamp(-0.5, 0.5))
        assert not torch.equal(w, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_that_the_dtype_does_not_hold(dtype):
    w = torch.tensor([1.0, -2.0, torch.inf], dtype=dtype)
    clip_weights_(w, 1e305)
    assert w[:2].tolist() == [1.0, -2.0]
    assert w[2] == min(torch.finfo(dtype).max, 1e305)
    clip_weights_(w, 1e-323)
    assert w.double().abs().max() <= 1e-323


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_frobenius(dtype):
    weights = [random_weight(5, 7, dtype, seed=1), 0.01 * random_weight(3, 4, dtype, seed=2)]
    before = [w.double().clone() for w in weights]
    norms = clip_frobenius_(weights, 2.0)
    assert norms.dtype == F64
    for w, x, norm in zip(weights, before, norms, strict=True):
        exact = torch.linalg.vector_norm(x)
        assert norm.item() == pytest.approx(exact.item(), rel=tolerance("dot", F64, 35))
        target = x / max(1.0, exact.item() / 2.0)
        assert ((w.double() - target).abs() <= once(dtype) * target.abs() + smallest(dtype)).all()  # fmt: skip
    assert torch.equal(weights[1].double(), before[1])  # was within
    assert clip_frobenius_(weights[0], 1.0).shape == ()
    assert torch.linalg.vector_norm(weights[0].double()) <= 1 + 2 * eps_of(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e37), (F32, 1e-37), (F64, 1e300), (F64, 1e-300), (F16, 6e4)],
    ids=str,
)
def test_clip_frobenius_over_the_whole_range(dtype, scale):
    w = torch.full((4, 4), 1.0, dtype=dtype) * scale
    bound = scale / 2
    assert clip_frobenius_(w, bound).item() == pytest.approx(4 * scale, rel=4 * eps_of(dtype))
    assert torch.linalg.vector_norm(w.double() / scale).item() == pytest.approx(
        0.5, rel=4 * eps_of(dtype)
    )


# ---- the spectral norm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cold_start_meets_the_bound_to_rtol(dtype):
    weights = [
        matrix_with_spectrum(20, 30, [3.0, 2.9, 2.0, *[1.0] * 17], dtype, seed=1),
        random_weight(40, 12, dtype, seed=2),
        random_weight(6, 24, dtype, seed=3).view(6, 2, 3, 4),
        0.01 * random_weight(8, 8, dtype, seed=4),
    ]
    before = [w.flatten(1).double().clone() for w in weights]
    sigma = project_spectral_norm_(weights, 1.5)
    assert sigma.dtype == F64
    for w, x, s in zip(weights, before, sigma, strict=True):
        norm = true_norm(x)
        rounding = rounded(dtype, x.shape)
        assert norm * (1 - 1e-3) <= s.item() <= norm * (1 + tolerance("sigma", dtype, max(x.shape)))
        assert true_norm(w.flatten(1)) <= 1.5 * (1 + 1e-3 + rounding)
        target = x / max(1.0, s.item() / 1.5)
        error = (w.flatten(1).double() - target).abs()
        assert (error <= once(dtype) * target.abs() + smallest(dtype)).all()
    assert torch.equal(weights[3].double(), before[3])


def test_tighter_rtol():
    w = random_weight(30, 30, F32)
    project_spectral_norm_(w, 1.0, rtol=1e-6)
    assert true_norm(w) <= 1 + 1e-6 + rounded(F32, (30, 30))


def test_what_has_not_converged_is_said(monkeypatch):
    few = functools.partial(projections.estimate_matrices, max_reads=2)
    monkeypatch.setattr(projections, "estimate_matrices", few)
    weights = [torch.ones(1, 3), random_weight(90, 90), torch.full((2, 2), torch.nan)]
    message = (
        r"^project_spectral_norm_: sigma of weights\[(0, )?1\] has not reached rtol=0.001 in \d"
    )
    norm = true_norm(weights[1])
    with pytest.warns(UserWarning, match=message) as caught:
        sigma = project_spectral_norm_(weights, 0.5)
    assert caught[0].filename == __file__
    assert sigma[1] < norm
    assert true_norm(weights[1]) == pytest.approx(0.5 * norm / sigma[1].item(), rel=1e-5)


def test_warm_u_and_v_do_one_iteration():
    weights = [random_weight(9, 6, seed=i) for i in range(3)]
    us, vs = zip(*(start(w, 2, seed=i) for i, w in enumerate(weights)), strict=True)
    us, vs = list(us), list(vs)
    twin_us, twin_vs = [x.clone() for x in us], [x.clone() for x in vs]
    expected = functional.power_iteration(weights, twin_us, twin_vs, 3)
    before = [w.clone() for w in weights]
    sigma = project_spectral_norm_(weights, 1.0, us, vs, n_power_iterations=3)
    assert torch.equal(sigma, expected.double())
    assert all(torch.equal(a, b) for a, b in zip(us + vs, twin_us + twin_vs, strict=True))
    for w, x, s in zip(weights, before, expected, strict=True):
        assert torch.allclose(w, x / s, rtol=2 * eps_of(F32), atol=0)
    # one weight, and what is low of the norm is above the bound: not hidden
    w = random_weight(30, 30)
    norm = true_norm(w)
    u, v = start(w)
    s = project_spectral_norm_(w, 1.0, u, v)
    assert s.shape == ()
    assert true_norm(w) == pytest.approx(norm / s.item(), rel=1e-5)
    assert true_norm(w) > 1.05
    for _ in range(60):
        project_spectral_norm_(w, 1.0, u, v)
    assert true_norm(w) < 1.001


def test_all_in_one_call_an_iteration(monkeypatch):
    calls = []
    run = functional.power_iteration
    monkeypatch.setattr(functional, "power_iteration", lambda w, *a: calls.append(len(w)) or run(w, *a))  # fmt: skip
    weights = [random_weight(9, 6, seed=i) for i in range(5)]
    us, vs = zip(*(start(w) for w in weights), strict=True)
    project_spectral_norm_(weights, 1.0, us, vs)
    assert calls == [5]
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    hook = ProjectionHook(model)
    hook.project()
    assert calls == [5, 6]


def test_mixed_dtypes_from_a_cold_start():
    weights = [random_weight(6, 6, d) for d in (F32, F64, BF16)]
    project_spectral_norm_(weights)
    for w in weights:
        assert true_norm(w) <= 1 + 1e-3 + rounded(w.dtype, (6, 6))


def test_zero_empty_nan():
    bad = torch.tensor([[1.0, torch.nan], [0.0, 3.0]])
    kept = bad.clone()
    weights = [torch.zeros(3, 3), torch.zeros(0, 3), torch.zeros(3, 0), bad, 5 * torch.eye(2)]
    sigma = project_spectral_norm_(weights, 1.0)
    assert sigma[:3].tolist() == [0, 0, 0]
    assert sigma[3].isnan()
    assert same_bits(bad, kept)
    assert torch.equal(weights[4], torch.eye(2)) or true_norm(weights[4]) <= 1.001
    norms = clip_frobenius_(weights, 0.5)
    assert norms[3].isnan()
    assert same_bits(bad, kept)
    clip_weights_(weights, 0.5)
    assert bad[0, 1].isnan()
    assert bad[1, 1] == 0.5
    for bad, dtype in itertools.product((torch.inf, -torch.inf), DTYPES):
        weight = torch.ones(3, 3, dtype=dtype)
        weight[0, 1] = bad
        kept = weight.clone()
        for function in (clip_frobenius_, project_spectral_norm_):
            assert not function(weight, 0.5).isfinite()
            assert same_bits(weight, kept)
    for function in FUNCTIONS:
        function([])
    assert project_spectral_norm_([]).shape == (0,)
    assert clip_frobenius_([]).shape == (0,)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
def test_scales(scale):
    w = random_weight(6, 6) * scale
    bound = float(scale) / 4
    project_spectral_norm_(w, bound)
    assert true_norm(w) / bound == pytest.approx(1, rel=1.1e-3)


@pytest.mark.parametrize(
    ("entry", "bound"),
    [(1.7e308, 1.0), (1.7e308, 1e300), (1e-310, 1e-311), (1e-310, 1.0), (5e-324, 5e-324)],
)
def test_clip_frobenius_at_both_ends_of_float64(entry, bound):
    """Whose norm overflows, or whose reciprocal does."""
    w = torch.full((2, 2), entry, dtype=F64)
    clip_frobenius_(w, bound)
    # a factor and an entry, each to eps or to half the smallest denormal
    want = min(entry, bound / 2)
    assert abs(w[0, 0].item() - want) <= 4 * eps_of(F64) * want + 5e-324


def test_hook_of_denormal_norms_writes_no_inf():
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3) * 1e-39)
    ProjectionHook(model, bound=5e-40).project()
    # all singular values are alike, so that sigma is off by roundings alone; below the normal numbers 1e-45 each
    assert (model.weight - torch.eye(3) * 5e-40).abs().max() <= 4 * smallest(F32)


# ---- what is written ----------------------------------------------------------------------------------------------


@by_function
def test_parameters_are_written_in_place_and_count_a_version(function):
    w = nn.Parameter(random_weight(4, 4))
    loss = (w.square() * w).sum()  # its backward wants w as it was
    before, pointer = w._version, w.data_ptr()
    function(w, 0.1)
    assert w._version > before
    assert w.data_ptr() == pointer
    assert w.requires_grad
    assert w.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_function
def test_what_is_within_keeps_its_bits(function):
    w = 0.01 * random_weight(4, 4)
    before = w.clone()
    function([w], 1.0)
    assert same_bits(w, before)


@by_function
def test_views_and_strides(function):
    whole = random_weight(8, 9)
    rest = whole.clone()
    part = whole[1:5, ::2]
    twin = part.clone()
    function(part, 0.3)
    function(twin, 0.3)
    assert torch.allclose(part, twin, rtol=1e-5)
    rest[1:5, ::2] = part
    assert torch.equal(whole, rest)
    model = nn.ConvTranspose2d(3, 4, 2)
    function(weights_of(model), 0.05)
    flat = model.weight.detach().movedim(1, 0).flatten(1)
    assert true_norm(flat) <= {clip_weights_: 0.05 * math.sqrt(48)}.get(function, 0.05) * 1.0011


@pytest.mark.parametrize("function", [clip_frobenius_, project_spectral_norm_])
def test_a_weight_given_twice_is_changed_once(function):
    w = 3 * torch.eye(3)
    v = w.view(3, 3)
    function([w, v, w.mT], 1.0)
    norm = true_norm(w) if function is project_spectral_norm_ else torch.linalg.vector_norm(w)
    assert float(norm) == pytest.approx(1, rel=1.1e-3)


@by_function
def test_under_inference_mode(function):
    w = nn.Parameter(2 * torch.eye(3))
    with torch.inference_mode():
        function(w, 0.5)
        made = 2 * torch.eye(3)
        function(made, 0.5)
    assert w.abs().max() < 0.51
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*got an inference tensor"):
        function(made, 0.1)


@by_function
def test_nothing_is_written_where_one_is_refused(function):
    good = random_weight(3, 3)
    before = good.clone()
    name = function.__name__
    w = torch.ones(3, 3, requires_grad=True)
    for bad, error, message in (
        (torch.ones(3, 1).expand(3, 3), ValueError, "to be writable, got an expanded tensor"),
        (w * 2, ValueError, "to be a parameter or a view of one, got a result of autograd"),
        (torch.ones(3, 3, dtype=torch.int32), TypeError, "got torch.int32"),
        (None, TypeError, "to be a tensor, got NoneType"),
        (torch.eye(3, device="cpu").to_sparse(), TypeError, "to be dense, got torch.sparse_coo"),
    ):
        with pytest.raises(error, match=rf"^{name}: expected weights\[1\] {message}|{message}"):
            function([good, bad], 0.1)
    for value, error in ((0, ValueError), (-1, ValueError), (10**400, ValueError), ("1", TypeError)):  # fmt: skip
        with pytest.raises(error, match=rf"^{name}: expected (bound|limit) to be "):
            function([good], value)
    with pytest.raises(TypeError, match=rf"^{name}: .*got a module"):
        function(nn.Linear(2, 2), 0.1)
    assert same_bits(good, before)


def test_bad_u_and_v():
    w = random_weight(4, 3)
    before = w.clone()
    u, v = start(w)
    for args, error, message in (
        ((u, None), ValueError, "expected u and v both or neither, got u alone"),
        ((None, v), ValueError, "expected u and v both or neither, got v alone"),
        (([u], [v]), TypeError, "expected weights, u and v to be all tensors or all lists"),
        ((v, u), ValueError, r"expected u\[0\] to have shape \[4\]"),
        ((u.double(), v), TypeError, r"expected u\[0\] to be torch.float32"),
    ):
        with pytest.raises(error, match=message):
            project_spectral_norm_(w, 0.1, *args)
    for steps, error, message in (
        (0, ValueError, "n_power_iterations >= 1, got 0"),
        (1.5, TypeError, "n_power_iterations to be an int, got float"),
    ):
        with pytest.raises(error, match=f"^project_spectral_norm_: expected {message}"):
            project_spectral_norm_(w, 0.1, u, v, n_power_iterations=steps)
    with pytest.raises(TypeError, match=r"^project_spectral_norm_: expected u to be a tensor or"):
        project_spectral_norm_([w], 0.1, 3, 3)
    for rtol in (-1, 0, math.nan, 1.0):
        with pytest.raises(ValueError, match=r"^project_spectral_norm_: expected rtol "):
            project_spectral_norm_(w, 0.1, rtol=rtol)
    with pytest.raises(ValueError, match="matrix or of higher rank"):
        project_spectral_norm_(torch.ones(3))
    assert same_bits(w, before)


# ---- the hook -----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3), nn.Linear(7, 6)
    )


def matrices(model):
    return [w.detach().flatten(1) for w in weights_of(model)]


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (-model(torch.randn(5, 3, 7)).square().mean()).backward()  # pushes every norm up
        optimizer.step()


@pytest.mark.parametrize("n_vectors", [1, 4])
def test_hook_holds_the_norm_while_the_model_trains(n_vectors):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hook = ProjectionHook(model, optimizer, bound=1.2, n_vectors=n_vectors)
    excess = 0.0
    for _ in range(40):
        train(model, optimizer, 1)
        excess = max(excess, *(true_norm(w) / 1.2 - 1 for w in matrices(model)))
    # sigma of one iteration a step is low by up to 0.6% with four columns, and 11% with one, in models of many sizes
    assert excess < (0.006 if n_vectors == 4 else 0.1)
    assert all(true_norm(w) > 1.1 for w in matrices(model))
    hook.remove()
    train(model, optimizer, 3)
    assert max(true_norm(w) for w in matrices(model)) > 1.3
    hook.remove()


def test_hook_of_the_other_kinds():
    for kind, bound, norm in (
        ("frobenius", 0.7, lambda w: torch.linalg.vector_norm(w).item()),
        ("clip", 0.05, lambda w: w.abs().max().item()),
    ):
        model = network()
        model[3].weight.requires_grad_(False)
        frozen = model[3].weight.clone()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        hook = ProjectionHook(model, optimizer, bound, kind)
        train(model, optimizer, 3)
        for w in matrices(model)[:2]:
            assert norm(w) == pytest.approx(bound, rel=4 * eps_of(F32))
        assert torch.equal(model[3].weight, frozen)
        assert list(hook.state_dict()) == []
        if kind == "clip":
            assert model[0].bias.abs().max() <= 0.05
        assert repr(hook) == f"ProjectionHook(3 weights, kind='{kind}', bound={bound})"


def test_hook_of_a_model_on_two_devices():
    """The norms of several devices are no one tensor; meta stands for the other one, whose norms nobody knows."""
    model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.fill_(2.0)
    ProjectionHook(model, bound=1.0, kind="frobenius").project()
    assert torch.linalg.vector_norm(model[1].weight).item() == pytest.approx(1, rel=1e-6)
    assert clip_frobenius_([x.weight for x in model]).device.type == "meta"


def test_hook_lives_with_its_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ProjectionHook(model, optimizer, bound=0.5)
    train(model, optimizer, 2)
    assert max(true_norm(w) for w in matrices(model)) < 0.51


def test_hook_of_a_copied_model_follows_nobody():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ProjectionHook(model, optimizer, bound=0.5)
    other_model, other = copy.deepcopy((model, hook))
    train(model, optimizer, 1)
    assert max(true_norm(w) for w in matrices(other_model)) > 0.51
    other.project()
    assert max(true_norm(w) for w in matrices(other_model)) < 0.51
    assert other._handle is None
    other.remove()  # of nothing
    train(model, optimizer, 1)
    assert max(true_norm(w) for w in matrices(model)) < 0.51
    other.load_state_dict(hook.state_dict())


def test_hook_in_eval_and_after_changes():
    model = network()
    hook = ProjectionHook(model, bound=0.5).eval()
    hook.project()
    assert max(true_norm(w) for w in matrices(model)) < 0.51
    model[3] = nn.Linear(7, 9)
    with pytest.raises(RuntimeError, match=r"^ProjectionHook: .*call refresh\(\)"):
        hook.project()
    hook.refresh()
    hook.project()
    assert max(true_norm(w) for w in matrices(model)) < 0.51


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"bound": 0.0}, ValueError, "expected bound to be finite and > 0, got 0"),
        ({"kind": "l2"}, ValueError, "expected kind to be 'spectral', 'frobenius' or 'clip', got 'l2'"),
        ({"optimizer": 3}, TypeError, "expected a torch.optim.Optimizer, got int"),
        ({"model": 3}, TypeError, "expected model to be a torch.nn.Module, got int"),
        ({"model": nn.ReLU()}, ValueError, "expected a model with weights to act on, got ReLU"),
        ({"n_vectors": 0}, ValueError, "expected n_vectors >= 1, got 0"),
        ({"model": parametrizations.weight_norm(nn.Linear(3, 3))}, ValueError,
         "expected plain parameters, got weight, which a parametrization computes"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_hook(kwargs, error, message):
    with pytest.raises(error, match="^ProjectionHook: " + message):
        ProjectionHook(**{"model": nn.Linear(3, 3), **kwargs})


def test_compiled():
    def run(w, u, v):
        return project_spectral_norm_(w, 0.5, u, v)

    w, x = random_weight(5, 4), random_weight(5, 4)
    (u, v), (a, b) = start(w), start(x)
    torch.compile(run, backend="aot_eager")(w, u, v)
    torch._dynamo.reset()
    run(x, a, b)
    assert torch.allclose(w, x, rtol=8 * eps_of(F32))
    assert torch.allclose(u, a, atol=8 * eps_of(F32))
    small = 0.01 * random_weight(5, 4)
    kept = small.clone()
    torch.compile(run, backend="aot_eager")(small, *start(small))
    torch._dynamo.reset()
    assert torch.equal(small, kept)  # within the bound, whether or not it is written
