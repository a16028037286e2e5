"""What torch does around the ops: opcheck, torch.func, compile, export, meta, autocast, inference mode, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import BF16, F32, F64, eps_of, here, lead, random_weight, same_bits, start
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from specnorm_ext import functional as F
from specnorm_ext import reference

ops = torch.ops.specnorm_ext
SHAPES = ((3, 4), (5, 2), (4, 4), (1, 6), (7, 1), (0, 3))


def ragged(dtype=F64, requires_grad=False, b=None, shapes=SHAPES):
    ws = [
        random_weight(*s, dtype, seed=i).requires_grad_(requires_grad) for i, s in enumerate(shapes)
    ]
    ws[0] = (
        ws[0].detach().mT.contiguous().mT.requires_grad_(requires_grad)
    )  # one of them transposed
    pairs = [start(w, b if b and b <= min(w.shape) else None) for w in ws]
    return ws, [u for u, _ in pairs], [v for _, v in pairs]


def problem(m=4, n=5, dtype=F64, b=None):
    w = random_weight(m, n, dtype)
    u, v = start(w, b)
    ops.power_iteration_([w], [u], [v], 2)
    return w, u, v


def sigma_of(w, u, v):
    return ops.sigma([w], [u], [v])[0]


def normalized(w, u, v, s):
    return ops.normalize([w], [u], [v], s)[0]


def plain_sigma(w, u, v):
    return torch.dot(lead(u), torch.mv(w, lead(v)))


def close(got, expected, factor=100):
    """Two orders of the same float64 operations: `factor` roundings of the largest element."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    scale = expected.abs().max().clamp_min(1e-3)
    assert (got - expected).abs().max() <= factor * eps_of(expected.dtype) * scale


# ---- torch.library.opcheck --------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck(dtype, requires_grad, b):
    ws, us, vs = ragged(dtype, requires_grad, b)
    sigma = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=dtype)
    gs = [torch.randn_like(w).requires_grad_(requires_grad) for w in ws]
    torch.library.opcheck(ops.power_iteration_.default, (ws, us, vs), {"n_iterations": 2})
    torch.library.opcheck(ops.power_iteration_.default, (ws, us, vs, 3, 1e-9))
    torch.library.opcheck(ops.sigma.default, (ws, us, vs))
    torch.library.opcheck(ops.normalize.default, (ws, us, vs, sigma))
    torch.library.opcheck(ops.normalize_backward.default, (gs, ws, us, vs, sigma))


@pytest.mark.parametrize("op", ["sigma", "normalize", "normalize_backward", "power_iteration_"])
def test_opcheck_16_bit_and_empty_list(op):
    ws, us, vs = ragged(BF16, requires_grad=True)
    sigma = torch.ones(len(ws))
    args = {
        "sigma": ((ws, us, vs), ([], [], [])),
        "normalize": ((ws, us, vs, sigma), ([], [], [], torch.empty(0))),
        "normalize_backward": ((ws, ws, us, vs, sigma), ([], [], [], [], torch.empty(0))),
        "power_iteration_": ((ws, us, vs), ([], [], [])),
    }
    for a in args[op]:
        torch.library.opcheck(getattr(ops, op).default, a)


# ---- torch.func -------------------------------------------------------------------------------------------------
# The twin everything is compared with is plain autograd: W / (u^T W v) and u^T W v in torch's own operations.


def weighted(w, u, v, s):
    x = torch.linspace(-1, 2, w.numel(), dtype=w.dtype).view(w.shape)
    # in the state dtype: on a GPU autocast has 16-bit sums in float32
    return (normalized(w, u, v, s) * x).to(u.dtype).sum().sin() + sigma_of(w, u, v) ** 2


def weighted_plain(w, u, v, s):
    x = torch.linspace(-1, 2, w.numel(), dtype=w.dtype).view(w.shape)
    return (w / plain_sigma(w, u, v) * x).sum().sin() + plain_sigma(w, u, v) ** 2


def weighted_reference(w, u, v, s):
    x = torch.linspace(-1, 2, w.numel(), dtype=w.dtype).view(w.shape)
    y = reference.normalize([w], [u], [v], s)[0]
    return (y * x).sum().sin() + reference.sigma([w], [u], [v])[0] ** 2


@pytest.mark.parametrize("twin", [weighted_plain, weighted_reference])
@pytest.mark.parametrize("b", [None, 2])
def test_grad_vjp_jacrev_jacfwd_jvp_hessian(b, twin):
    w, u, v = problem(b=b)
    s = ops.sigma([w], [u], [v])
    x = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(x, u, v, s), x)
    close(grad(weighted)(w, u, v, s), expected)
    close(jacrev(weighted)(w, u, v, s), expected)
    close(jacfwd(weighted)(w, u, v, s), expected)
    out, pull = vjp(lambda w: weighted(w, u, v, s), w)
    close(out, twin(w, u, v, s))
    close(pull(torch.ones((), dtype=F64))[0], expected)
    t = random_weight(4, 5, F64, seed=9)
    out, tangent = jvp(lambda w: weighted(w, u, v, s), (w,), (t,))
    close(out, twin(w, u, v, s))
    close(tangent, (expected * t).sum())
    assert tangent.abs() > 1e-3, "jvp lost the derivative"
    h = torch.autograd.functional.hessian(lambda w: twin(w, u, v, s), w)
    close(hessian(weighted)(w, u, v, s), h, 1000)
    close(jacfwd(jacrev(weighted))(w, u, v, s), h, 1000)
    close(jacrev(jacrev(weighted))(w, u, v, s), h, 1000)
    close(jacrev(jacfwd(weighted))(w, u, v, s), h, 1000)
    close(jacfwd(jacfwd(weighted))(w, u, v, s), h, 1000)
    assert h.abs().max() > 1e-2


def test_jvp_is_never_silently_zero():
    w, u, v = problem()
    s = ops.sigma([w], [u], [v])
    t = torch.ones_like(w)
    for f, twin in (
        (lambda w: ops.sigma([w], [u], [v])[0], lambda w: plain_sigma(w, u, v)),
        (lambda w: ops.normalize([w], [u], [v], s)[0], lambda w: w / plain_sigma(w, u, v)),
        (
            lambda w: ops.normalize_backward([t], [w], [u], [v], s)[0],
            lambda w: (
                (t - (t * w).sum() / plain_sigma(w, u, v) * torch.outer(u, v))
                / plain_sigma(w, u, v)
            ),
        ),
        (lambda w: F.sigma(w, u, v), lambda w: plain_sigma(w, u, v)),
        (lambda w: F.normalize(w, u, v, s), lambda w: w / plain_sigma(w, u, v)),
    ):
        tangent = jvp(f, (w,), (t,))[1]
        close(tangent, jvp(twin, (w,), (t,))[1])
        assert tangent.abs().max() > 1e-3
        # forward mode by hand, under an outer grad that has nothing to do with it
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(w, t)
            got = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        close(got, tangent)


def test_jvp_and_grad_with_respect_to_u_and_v():
    w, u, v = problem()
    for argument in (1, 2):
        got = grad(lambda *x: ops.sigma([x[0]], [x[1]], [x[2]])[0], argnums=argument)(w, u, v)
        expected = grad(plain_sigma, argnums=argument)(w, u, v)
        close(got, expected)
        t = torch.ones_like((w, u, v)[argument])
        args = [w, u, v]

        def along(x, argument=argument, args=args):
            return sigma_of(*args[:argument], x, *args[argument + 1 :])

        close(jvp(along, (args[argument],), (t,))[1], (expected * t).sum())


def batched(size=3, m=4, n=5):
    ws = torch.stack([random_weight(m, n, F64, seed=i) for i in range(size)])
    pairs = [start(w, seed=i) for i, w in enumerate(ws)]
    us, vs = torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])
    ops.power_iteration_(list(ws), list(us), list(vs), 2)
    return ws, us, vs


def test_vmap_of_values():
    ws, us, vs = batched()
    s = ops.sigma(list(ws), list(us), list(vs))
    close(vmap(sigma_of)(ws, us, vs), s)
    y = torch.stack(ops.normalize(list(ws), list(us), list(vs), s))
    close(vmap(lambda w, u, v, s: normalized(w, u, v, s.reshape(1)))(ws, us, vs, s), y)
    # batched along another dimension, and with operands that are not batched
    close(vmap(sigma_of, in_dims=(2, 1, 0))(ws.permute(1, 2, 0), us.mT, vs), s)
    one = vmap(sigma_of, in_dims=(None, 0, 0))(ws[0], us, vs)
    close(one, torch.stack([plain_sigma(ws[0], u, v) for u, v in zip(us, vs, strict=True)]))
    one = vmap(lambda w: normalized(w, us[0], vs[0], s[:1]))(ws)
    close(one, ws / s[0])
    out = vmap(lambda w, u, v: ops.sigma([w, ws[0]], [u, us[0]], [v, vs[0]]))(ws, us, vs)
    close(out, torch.stack([s, s[0].expand(3)], 1))
    g = torch.randn(3, 4, 5, dtype=F64)
    got = vmap(lambda g, w, u, v, s: ops.normalize_backward([g], [w], [u], [v], s.reshape(1))[0])(
        g, ws, us, vs, s
    )
    close(got, torch.stack(ops.normalize_backward(list(g), list(ws), list(us), list(vs), s)))


def test_vmap_of_grad_and_grad_of_vmap():
    ws, us, vs = batched()
    s = ops.sigma(list(ws), list(us), list(vs)).unsqueeze(1)
    x = ws.clone().requires_grad_()
    total = sum(weighted_plain(x[i], us[i], vs[i], None) for i in range(3))
    (expected,) = torch.autograd.grad(total, x)
    close(vmap(grad(weighted))(ws, us, vs, s), expected)
    close(grad(lambda w: vmap(weighted)(w, us, vs, s).sum())(ws), expected)
    # and vmap inside plain reverse mode
    y = ws.clone().requires_grad_()
    (got,) = torch.autograd.grad(vmap(weighted)(y, us, vs, s).sum(), y)
    close(got, expected)
    h = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda w, i=i: weighted_plain(w, us[i], vs[i], None), w
            )
            for i, w in enumerate(ws)
        ]
    )
    close(vmap(hessian(weighted))(ws, us, vs, s), h, 1000)
    t = torch.randn(3, 4, 5, dtype=F64)
    got = vmap(lambda w, u, v, s, t: jvp(lambda w: weighted(w, u, v, s), (w,), (t,))[1])(
        ws, us, vs, s, t
    )
    close(got, (expected * t).sum((1, 2)))


def test_per_sample_gradients_of_a_normalized_layer():
    w, u, v = problem()
    s = ops.sigma([w], [u], [v])
    x = random_weight(6, 5, F64, seed=4)
    loss = lambda w, x: torch.tanh(normalized(w, u, v, s) @ x).sum()  # noqa: E731
    twin = lambda w, x: torch.tanh((w / plain_sigma(w, u, v)) @ x).sum()  # noqa: E731
    close(vmap(grad(loss), in_dims=(None, 0))(w, x), vmap(grad(twin), in_dims=(None, 0))(w, x))


@pytest.mark.parametrize("n_iterations", [1, 3])
def test_vmap_of_power_iteration(n_iterations):
    ws = torch.stack([random_weight(4, 5, F64, seed=i) for i in range(3)])
    pairs = [start(w, seed=i) for i, w in enumerate(ws)]
    expected = [(u.clone(), v.clone()) for u, v in pairs]
    step = lambda w, u, v: ops.power_iteration_([w], [u], [v], n_iterations)[0]  # noqa: E731
    s = torch.stack([step(w, u, v) for w, (u, v) in zip(ws, expected, strict=True)])

    us, vs = torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])
    assert same_bits(vmap(step)(ws, us, vs), s)
    assert same_bits(us, torch.stack([u for u, _ in expected]))
    assert same_bits(vs, torch.stack([v for _, v in expected]))

    us, vs = torch.stack([u for u, _ in pairs], 1), torch.stack([v for _, v in pairs], 1)
    assert same_bits(vmap(step, in_dims=(2, 1, 1))(ws.permute(1, 2, 0), us, vs), s)
    assert same_bits(us.mT, torch.stack([u for u, _ in expected]))

    # one weight, many starts
    us, vs = torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])
    vmap(step, in_dims=(None, 0, 0))(ws[0], us, vs)
    assert same_bits(us[0], expected[0][0])

    # the order of a list of several: [list, batch] each
    us, vs = torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])
    us2, vs2 = us.clone(), vs.clone()
    out = vmap(
        lambda w, u, v, u2, v2: ops.power_iteration_([w, 2 * w], [u, u2], [v, v2], n_iterations)
    )(ws, us, vs, us2, vs2)
    assert same_bits(out, torch.stack([s, 2 * s], 1))


@pytest.mark.parametrize("name", ["u", "v"])
def test_vmap_of_power_iteration_with_one_u_for_many_weights_is_an_error(name):
    ws, us, vs = batched()
    u, v = us[0].clone(), vs[0].clone()
    before = (u.clone(), v.clone(), us.clone(), vs.clone())
    with_one_u = lambda w, v: ops.power_iteration_([w], [u], [v])  # noqa: E731
    with_one_v = lambda w, u: ops.power_iteration_([w], [u], [v])  # noqa: E731
    with pytest.raises(ValueError, match=rf"power_iteration_: expected {name}\[0\] to be batched"):
        vmap(with_one_u if name == "u" else with_one_v)(ws, vs if name == "u" else us)
    assert all(same_bits(x, y) for x, y in zip((u, v, us, vs), before, strict=True))


def test_power_iteration_inside_grad():
    """The iteration runs on the values, the gradient flows through sigma: torch.func sees constants u and v."""
    w, u, v = problem()

    def loss(w, u, v):
        u, v = u.clone(), v.clone()
        s = ops.power_iteration_([w.detach()], [u], [v])
        return (normalized(w, u, v, s) ** 3).sum() + sigma_of(w, u, v)

    a, b = u.clone(), v.clone()
    ops.power_iteration_([w], [a], [b])
    x = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        ((x / plain_sigma(x, a, b)) ** 3).sum() + plain_sigma(x, a, b), x
    )
    close(grad(loss)(w, u, v), expected)


class Layer(torch.nn.Module):
    """Spectrally normalized linear layer in the ops alone."""

    def __init__(self, n_in=5, n_out=4, dtype=F32):
        super().__init__()
        self.weight = torch.nn.Parameter(random_weight(n_out, n_in, dtype))
        u, v = start(self.weight)
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, x):
        if self.training:
            self.iterate()
        u, v = self.u.clone(), self.v.clone()
        sigma = F.sigma(self.weight.detach(), u, v)
        return torch.nn.functional.linear(x, F.normalize(self.weight, u, v, sigma))

    def iterate(self):
        F.power_iteration(self.weight, self.u, self.v)


def test_functional_call_and_ensembles():
    layers = [Layer(dtype=F64).eval() for _ in range(3)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(random_weight(4, 5, F64, seed=i))
            layer.iterate()
    params, buffers = torch.func.stack_module_state(layers)
    x = random_weight(2, 5, F64, seed=8)
    out = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(params, buffers)
    close(out, torch.stack([layer(x) for layer in layers]))


# ---- torch.compile and export -----------------------------------------------------------------------------------
# warnings of torch's compiler about itself are not this package's
quiet = pytest.mark.filterwarnings("ignore")


def training_step(layer, x):
    return torch.tanh(layer(x)).square().sum()


def run_steps(function, steps=3, dtype=F32, batch=6):
    layer = Layer(dtype=dtype)
    x = random_weight(batch, 5, dtype, seed=3).requires_grad_()
    losses = []
    for _ in range(steps):
        loss = function(layer, x)
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
        layer.weight.grad = None
    return torch.stack(losses), layer.weight.detach(), layer.u, layer.v, x.grad


@quiet
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_training(backend, dynamic):
    """Forward, backward, u and v written through, as in eager, three steps of gradient descent."""
    torch._dynamo.reset()
    compiled = torch.compile(training_step, backend=backend, fullgraph=True, dynamic=dynamic)
    for got, expected in zip(run_steps(compiled), run_steps(training_step), strict=True):
        # inductor may reorder the layer's own float32 sums, over 6 x 4 elements and three steps
        close(got, expected, 200)


@quiet
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_dynamic_shapes_without_recompiling(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def f(w, u, v):
        s = ops.power_iteration_([w], [u], [v], 2)
        y = ops.normalize([w], [u], [v], s)[0]
        return (y**2).sum() + ops.sigma([w], [u], [v]).sum()

    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    for i, shape in enumerate(((6, 7), (9, 5), (33, 12), (12, 33))):
        w = random_weight(*shape, F64, seed=i)
        results = []
        for function in (compiled, f):
            u, v = start(w)
            x = w.clone().requires_grad_()
            ops.power_iteration_([w], [u], [v])
            a, b = u.clone(), v.clone()
            loss = function(x.detach(), a, b)
            results.append((loss, a, b))
        for got, expected in zip(*results, strict=True):
            close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@quiet
def test_compile_ragged_list_and_double_backward_free_parts():
    """A list in one graph; only some outputs used."""
    torch._dynamo.reset()

    def f(ws, us, vs):
        s = ops.power_iteration_(ws, us, vs)
        us, vs = [u.clone() for u in us], [v.clone() for v in vs]
        ys = ops.normalize(ws, us, vs, s)
        return (ys[0] ** 2).sum() + (ys[2] ** 3).sum() + ops.sigma(ws, us, vs)[1]

    results = []
    for function in (torch.compile(f, backend="aot_eager", fullgraph=True), f):
        ws, us, vs = ragged(requires_grad=True, shapes=SHAPES[:4])
        loss = function(ws, us, vs)
        loss.backward()
        results.append([loss.detach(), *[w.grad for w in ws[:3]], *us, *vs])
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@quiet
@pytest.mark.parametrize("strict", [False, True])
def test_export_eval_and_training(strict):
    x = random_weight(6, 5, F32, seed=3)
    layer = Layer().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes={"x": {0: batch}})
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"specnorm_ext.sigma.default", "specnorm_ext.normalize.default"} <= names
    module = program.module()
    close(module(x), layer(x), 4)
    close(module(x[:3]), layer(x[:3]), 4)
    layer = Layer().train()
    program = torch.export.export(layer, (x,), strict=strict)
    twin = Layer().train()
    module = program.module()
    for _ in range(3):
        close(module(x), twin(x), 4)
    close(module.u if hasattr(module, "u") else dict(module.named_buffers())["u"], twin.u, 4)


# ---- meta and fake ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_meta_and_fake_results_look_like_real_ones(dtype, where):
    ws, us, vs = ragged(dtype)
    real = [ops.power_iteration_(ws, us, vs), ops.sigma(ws, us, vs)]
    real += ops.normalize(ws, us, vs, real[0])
    real += ops.normalize_backward(ws, ws, us, vs, real[0])
    mode = FakeTensorMode()
    convert = (lambda x: x.to("meta")) if where == "meta" else mode.from_tensor
    with mode if where == "fake" else torch.no_grad():
        ws, us, vs = ([convert(x) for x in xs] for xs in (ws, us, vs))
        got = [ops.power_iteration_(ws, us, vs), ops.sigma(ws, us, vs)]
        got += ops.normalize(ws, us, vs, got[0])
        got += ops.normalize_backward(ws, ws, us, vs, got[0])
    for g, r in zip(got, real, strict=True):
        assert g.shape == r.shape
        assert g.dtype == r.dtype
        if where == "fake":
            assert g.stride() == r.stride()
            assert g.device == r.device
        else:
            assert g.device.type == "meta"


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_empty_list_on_meta(where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        assert ops.power_iteration_([], [], []).shape == (0,)
        assert ops.sigma([], [], []).shape == (0,)


# ---- autocast ---------------------------------------------------------------------------------------------------


def everything(dtype=F32):
    """All ops, first and second derivatives and a forward-mode one, as a list of tensors."""
    w, u, v = problem(20, 30, dtype)
    u, v = u.clone(), v.clone()
    s = ops.power_iteration_([w], [u], [v], 2)
    w.requires_grad_()
    y = normalized(w, u, v, s)
    sigma = sigma_of(w, u, v)
    uu = u.clone().requires_grad_()
    (gu,) = torch.autograd.grad(sigma_of(w, uu, v), uu)
    x = torch.linspace(-1, 2, w.numel(), dtype=dtype).view(w.shape)
    (g1,) = torch.autograd.grad((y * x).to(u.dtype).sum() + sigma**2, w, create_graph=True)
    (g2,) = torch.autograd.grad((g1 * x).to(u.dtype).sum(), w)
    t = jvp(lambda w: weighted(w, u, v, s), (w.detach(),), (x,))[1]
    return [s, u, v, y, sigma, gu, g1, g2, t]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_autocast_changes_nothing(dtype):
    expected = [x.detach() for x in everything(dtype)]
    with torch.autocast(here().type, dtype=torch.bfloat16):
        got = everything(dtype)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype, i
        assert same_bits(a.detach(), b), i


def test_autocast_around_a_layer():
    """F.linear runs in bfloat16, sigma and W / sigma do not."""
    layer = Layer()
    x = random_weight(6, 5, F32)
    with torch.autocast(here().type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == F32


# ---- inference mode and no_grad ---------------------------------------------------------------------------------


def test_inference_mode():
    w, u, v = problem(20, 30, F32)
    expected = (u.clone(), v.clone())
    s = ops.power_iteration_([w], [expected[0]], [expected[1]], 2)
    y = normalized(w, *expected, s)
    with torch.inference_mode():
        assert same_bits(
            ops.power_iteration_([w], [u], [v], 2), s
        )  # tensors from outside, written inside
        assert same_bits(u, expected[0])
        assert same_bits(normalized(w, u, v, s), y)
        assert same_bits(
            ops.sigma([w], [u], [v]), ops.sigma([w], list(expected[:1]), list(expected[1:]))
        )
        u2, v2 = start(w)
        ops.power_iteration_([w], [u2], [v2])
        w2 = w * 1
    assert u2.is_inference()
    # buffers that were made in inference mode, used in training afterwards
    w.requires_grad_()
    s2 = ops.power_iteration_([w], [u2], [v2], 2)
    assert s2.isfinite().all()
    assert same_bits(ops.sigma([w2], [u], [v]), ops.sigma([w.detach()], [u], [v]))


def test_no_grad():
    w, u, v = problem()
    w.requires_grad_()
    with torch.no_grad():
        s = ops.power_iteration_([w], [u], [v])
        assert not normalized(w, u, v, s).requires_grad
        version = u._version
        ops.power_iteration_([w], [u], [v])
        assert u._version > version


# ---- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only("the same bits by any number of threads: the CPU kernels")
def test_four_python_threads():
    """Forward and backward at once, the same bits. (Not forward mode: torch's own level counter is process-wide.)"""
    cases = []
    for i in range(4):
        w = random_weight(60, 70, F64, seed=i)
        u, v = start(w)
        ops.power_iteration_([w], [u], [v], 2)
        cases.append((w, u, v, ops.sigma([w], [u], [v])))

    def work(i):
        w, u, v, s = cases[i]
        x = w.clone().requires_grad_()
        loss = weighted(x, u, v, s)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        return loss.detach(), g.detach(), h

    expected = [work(i) for i in range(4)]
    failures = []

    def many(i):
        try:
            for _ in range(10):
                if not all(same_bits(a, b) for a, b in zip(work(i), expected[i], strict=True)):
                    failures.append(f"thread {i}: other bits")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=many, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
