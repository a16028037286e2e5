"""Bad arguments: the class and the text of the error, the same from C++ and from Python, before anything is written."""

from __future__ import annotations

import pytest
import torch
from bad_arguments import CASES, good, x
from helpers import BF16, F32, bits, here
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

import specnorm_ext
from specnorm_ext import _checks
from specnorm_ext import functional as F

ops = torch.ops.specnorm_ext


SAME_TENSOR_TWICE = (
    "power_iteration_: expected every tensor in u and v to have memory of its own, "
    "got two that share elements"
)


def tensors_of(args):
    values = (t for value in args.values() for t in (value if isinstance(value, list) else [value]))
    return [t for t in values if isinstance(t, torch.Tensor)]


def mapped(args, f):
    return {
        k: [f(t) for t in value]
        if isinstance(value, list)
        else f(value)
        if isinstance(value, torch.Tensor)
        else value
        for k, value in args.items()
    }


def call_op(op, args):
    return getattr(ops, op)(*args.values())


def call_functional(op, args):
    return getattr(F, op.rstrip("_"))(*args.values())


def call_checks(op, args):
    return getattr(_checks, "check_" + op.rstrip("_"))(*args.values())


def on_meta(op, args):
    like = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")  # noqa: E731
    return call_op(op, mapped(args, like))


def on_fake(op, args):
    mode = FakeTensorMode()
    args = mapped(args, mode.from_tensor)
    with mode:
        return call_op(op, args)


def in_inference_mode(op, args):
    with torch.inference_mode():
        return call_op(op, args)


def requires_grad(op, args):
    for w in args["weights"]:
        if w.is_floating_point():
            w.requires_grad_()
    return call_op(op, args)


def without_grad(op, args):
    with torch.no_grad():
        return call_op(op, args)


def forward_mode(op, args):
    with torch.autograd.forward_ad.dual_level():
        return call_op(op, args)


def in_inference_mode_functional(op, args):
    with torch.inference_mode():
        return call_functional(op, args)


PATHS = {
    "torch.ops": call_op,
    "functional": call_functional,
    "functional in inference mode": in_inference_mode_functional,
    "_checks": call_checks,
    "meta": on_meta,
    "fake": on_fake,
    "inference mode": in_inference_mode,
    "requires grad": requires_grad,
    "no_grad": without_grad,
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.op}-{c.message.split('expected ')[1][:60]}"
)
def test_class_and_text(case, path):
    if "functional" in path and case.op == "normalize_backward":
        return  # not public there
    args = case.args()
    before = [bits(t).clone() if t.is_floating_point() else t.clone() for t in tensors_of(args)]
    error, message = case.error, case.message
    kernels = here().type in ("cpu", "cuda")
    if path == "inference mode" and case.op != "power_iteration_" and kernels:
        # Under inference_mode torch skips the Autograd key, where these ops turn the RuntimeError that torch makes
        # of a C++ exception back; the class is then the message's first word. The functional face turns it back.
        error, message = RuntimeError, f"{error.__name__}: {message}"
    with pytest.raises(error) as caught:
        PATHS[path](case.op, args)
    assert type(caught.value) is error
    assert str(caught.value).split("\n")[0] == message
    assert case.op in case.message
    after = [bits(t) if t.is_floating_point() else t for t in tensors_of(args)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), (
        "written before the error"
    )


def test_right_arguments_are_right():
    """The table's basis is accepted on every path: what is refused is refused for what was changed."""
    for op in ("power_iteration_", "sigma", "normalize", "normalize_backward"):
        for path, call in PATHS.items():
            if "functional" not in path or op != "normalize_backward":
                call(op, good(op))


# ---- errors that need an identity of memory or a second device --------------------------------------------------


def same_twice():
    t = x(4)
    yield "u and v", [x(4, 4)], [t], [t]
    yield "u and u", [x(4, 4), x(4, 3)], [t, t], [x(4), x(3)]
    yield "v and v", [x(3, 4), x(2, 4)], [x(3), x(2)], [t, t]
    yield "far apart", [x(4, 4)] * 3, [t, x(4), x(4)], [x(4), x(4), t]
    t = x(4, 2)
    yield "blocks", [x(4, 4)], [t], [t]


@pytest.mark.parametrize("path", ["torch.ops", "functional", "inference mode", "fake"])
@pytest.mark.parametrize("name", [case[0] for case in same_twice()])
def test_the_same_tensor_twice(name, path):
    _, ws, us, vs = next(case for case in same_twice() if case[0] == name)
    args = good("power_iteration_", weights=ws, u=us, v=vs)
    with pytest.raises(ValueError, match="share elements") as caught:
        PATHS[path]("power_iteration_", args)
    assert str(caught.value) == SAME_TENSOR_TWICE
    assert all((t == 1).all() for t in tensors_of(args))


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_overlapping_slices(shift):
    """Two contiguous slices of one buffer that share elements."""
    buffer = x(8)
    with pytest.raises(ValueError, match="to have memory of its own"):
        ops.power_iteration_([x(4, 4)], [buffer[:4]], [buffer[shift : shift + 4]])
    assert (buffer == 1).all()


def in_a_weight():
    """(what, weights, u, v, where in u or v, which weight): a written tensor that is part of a weight."""
    w = x(4, 4)
    yield "a row", [w], [x(4)], [w[2]], "v[0]", 0
    w = x(4, 4)
    yield "a column", [x(4, 4), w], [x(4), w[:, 1]], [x(4), x(4)], "u[1]", 1
    buffer = x(5, 5)
    yield "one element", [buffer[:4, :4]], [buffer[3, 1:]], [x(5)[1:]], "u[0]", 0
    buffer = x(8)
    yield "a Hankel matrix", [buffer.as_strided((4, 4), (1, 1))], [x(4)], [buffer[4:]], "v[0]", 0
    half = torch.ones(24, dtype=BF16)
    yield "half of 16 bits", [half[1:17].view(4, 4)], [half[16:24].view(F32)], [x(4)], "u[0]", 0
    one = x(5)
    yield "expanded", [one[:1].expand(4, 4)], [one[:4]], [x(4)], "u[0]", 0
    w = x(4, 4)
    yield "another's", [w, x(4, 4)], [x(4), x(4)], [x(4), w.T[0]], "v[1]", 0


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
@pytest.mark.parametrize("path", ["torch.ops", "functional", "inference mode"])
@pytest.mark.parametrize("name", [case[0] for case in in_a_weight()])
def test_part_of_a_weight(name, path):
    _, ws, us, vs, where, which = next(case for case in in_a_weight() if case[0] == name)
    args = good("power_iteration_", weights=ws, u=us, v=vs)
    before = [bits(t.clone()) for t in tensors_of(args)]
    with pytest.raises(ValueError, match="to have memory of its own") as caught:
        PATHS[path]("power_iteration_", args)
    assert str(caught.value) == (
        f"power_iteration_: expected every tensor in u and v to have memory of its own, got {where} "
        f"that shares elements with weights[{which}]; pass a clone()"
    )
    after = [bits(t.clone()) for t in tensors_of(args)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("path", ["torch.ops", "functional", "inference mode", "fake"])
def test_a_weight_as_u(path):
    w = x(3, 1)
    args = good("power_iteration_", weights=[w], u=[w], v=[x(1, 1)])
    with pytest.raises(ValueError, match=r"got u\[0\] that shares elements with weights\[0\]"):
        PATHS[path]("power_iteration_", args)


def test_what_only_looks_like_overlap_is_accepted():
    buffer = x(5, 5)  # the last column holds u, the last row v
    ops.power_iteration_([buffer[:4, :4]], [buffer[:4, 4]], [buffer[4, :4]])
    ops.power_iteration_([buffer[:4, :4].T], [buffer[:4, 4]], [buffer[4, :4]])
    flat = x(24)
    ops.power_iteration_([flat[4:20].view(4, 4)], [flat[:4]], [flat[20:]])
    every_other = x(40)
    ops.power_iteration_(
        [every_other.as_strided((4, 4), (8, 2))], [every_other[1:9:2]], [every_other[33::2]]
    )
    buffer = x(4, 4)
    ops.power_iteration_([x(4, 4)], [buffer[:, 0]], [buffer[:, 1]])  # interleaved columns
    buffer = x(8)
    ops.power_iteration_([x(4, 4)], [buffer[::2]], [buffer[1::2]])
    ops.power_iteration_([x(4, 4)], [buffer[:4]], [buffer[4:]])
    empty = x(0)
    ops.power_iteration_([x(0, 0), x(0, 0)], [empty, empty], [empty, empty])
    w = x(4, 4)
    u, v = [x(4), x(4)], [x(4), x(4)]
    ops.power_iteration_([w, w], u, v)  # a weight may come twice: it is read
    one = x(1).expand(1)
    ops.power_iteration_([x(1, 4)], [one], [x(4)])  # expanded, but a single element
    t = x(4)
    assert ops.sigma([w], [t], [t]).item() == 16  # reading the same twice is fine


@pytest.mark.parametrize("requires", [False, True])
@pytest.mark.parametrize("op", ["sigma", "normalize", "normalize_backward", "power_iteration_"])
def test_list_lengths_that_add_up(op, requires):
    """1 u and 3 v for 2 weights, all of one shape: an autograd that splits one flat list would not notice."""
    args = good(
        op, weights=[x(3, 3).requires_grad_(requires), x(3, 3)], u=[x(3)], v=[x(3), x(3), x(3)]
    )
    if op == "normalize_backward":
        args["grads"] = [x(3, 3), x(3, 3)]
    with pytest.raises(ValueError, match="tensors in") as caught:
        call_op(op, args)
    assert str(caught.value) == f"{op}: expected 2 tensors in u, as in weights, got 1"


DEVICE_CASES = (
    ("power_iteration_", "u", "u[0] on the device of weights[0]"),
    ("power_iteration_", "v", "v[0] on the device of weights[0]"),
    ("sigma", "u", "u[0] on the device of weights[0]"),
    ("normalize", "v", "v[0] on the device of weights[0]"),
    ("normalize", "sigma", "sigma on the device of the weights"),
    ("normalize_backward", "sigma", "sigma on the device of the weights"),
)


@pytest.mark.parametrize(
    "call", [call_op, call_functional, call_checks], ids=["torch.ops", "functional", "_checks"]
)
@pytest.mark.parametrize(("op", "name", "text"), DEVICE_CASES)
def test_two_devices(op, name, text, call):
    if call is call_functional and op == "normalize_backward":
        return
    args = good(op)
    args[name] = args[name].to("meta") if name == "sigma" else [t.to("meta") for t in args[name]]
    with pytest.raises(TypeError) as caught:
        call(op, args)
    assert str(caught.value) == f"{op}: expected {text}"


@pytest.mark.parametrize("call", [call_op, call_checks], ids=["torch.ops", "_checks"])
@pytest.mark.parametrize("op", ["power_iteration_", "sigma", "normalize", "normalize_backward"])
def test_weights_on_two_devices(op, call):
    args = good(op)
    args["weights"] = [args["weights"][0], args["weights"][1].to("meta")]
    with pytest.raises(TypeError) as caught:
        call(op, args)
    assert (
        str(caught.value)
        == f"{op}: expected one device a call, weights[1] is on another device than weights[0]"
    )


# ---- under transforms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian]
)
def test_under_torch_func(transform):
    w, u, v = x(3, 4), x(4), x(4)
    for op, f in (
        ("sigma", lambda w: ops.sigma([w], [u], [v])[0]),
        ("normalize", lambda w: ops.normalize([w], [u], [v], x(1))[0].sum()),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            transform(f)(w)
        assert str(caught.value) == f"{op}: expected u[0] to have shape [3] or [3, b], got [4]"


def test_under_vmap():
    w, u, v = x(2, 3, 4), x(2, 5), x(2, 4)
    for op, f in (
        ("sigma", lambda w, u, v: ops.sigma([w], [u], [v])),
        ("normalize", lambda w, u, v: ops.normalize([w], [u], [v], x(1))[0]),
        ("power_iteration_", lambda w, u, v: ops.power_iteration_([w], [u], [v])),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            vmap(f)(w, u, v)
        # as of a stack of the batch's size, which is what the op gets
        assert (
            str(caught.value)
            == f"{op}: expected u[0] to have shape [2, 3] or [2, 3, b], got [2, 5]"
        )


def test_under_compile():
    """torch wraps the error; its text comes through."""
    torch._dynamo.reset()
    f = torch.compile(lambda w, u, v: ops.sigma([w], [u], [v]), backend="eager", fullgraph=True)
    with pytest.raises(
        Exception, match=r"sigma: expected u\[0\] to have shape \[3\] or \[3, b\], got \[4\]"
    ):
        f(x(3, 4), x(4), x(4))


# ---- the typed functions ----------------------------------------------------------------------------------------


def test_one_tensor_beside_a_list():
    for call in (
        lambda: F.power_iteration(x(3, 4), [x(3)], [x(4)]),
        lambda: F.power_iteration([x(3, 4)], x(3), [x(4)]),
        lambda: F.sigma(x(3, 4), x(3), (x(4),)),
        lambda: F.normalize([x(3, 4)], [x(3)], x(4), x(1)),
    ):
        with pytest.raises(
            TypeError,
            match="to be all tensors or all lists of tensors, got ",
        ):
            call()


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2)])
def test_sigma_of_a_single_weight(shape):
    """For one weight a scalar or [1]; the text says what came."""
    with pytest.raises(ValueError, match=r"normalize: expected sigma to have shape \[1\], got "):
        F.normalize(x(3, 4), x(3), x(4), x(*shape))


def test_sigma_that_is_not_a_tensor():
    with pytest.raises(TypeError, match="sigma"):
        F.normalize(x(3, 4), x(3), x(4), 2.0)


def test_init_uv():
    with pytest.raises(
        ValueError,
        match=r"init_uv: expected weight to be a matrix \[m, n\] or a stack \[E, m, n\], got shape \[5\]",
    ):
        F.init_uv(x(5))
    for n in (0, 4, 9, -1):
        with pytest.raises(
            ValueError,
            match=rf"init_uv: expected n_vectors between 1 and min\(m, n, 8\) = 3, got {n}",
        ):
            F.init_uv(x(3, 4), n)
    with pytest.raises(ValueError, match="got 9"):
        F.init_uv(x(30, 40), 9)


def test_a_failed_call_leaves_the_next_one_right():
    w, u, v = torch.eye(3), x(3), x(3)
    for _ in range(3):
        with pytest.raises(ValueError, match="n_iterations"):
            ops.power_iteration_([w], [u], [v], 0)
    assert ops.power_iteration_([w], [u], [v]).isfinite().all()


FREED = ["torch.ops", "functional", "no_grad", "requires grad"]


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("path", FREED)
@pytest.mark.parametrize("op", ["power_iteration_", "sigma", "normalize", "normalize_backward"])
def test_freed_memory(op, path, view):
    """A tensor whose storage was freed, as sharded training does between uses, has a shape and no elements."""
    if path in ("functional", "requires grad") and op == "normalize_backward":
        return  # not public there; torch's own operations, which look at no pointer
    for name in good(op):
        if name in ("n_iterations", "eps"):
            continue
        args = good(op)
        one = args[name][1] if isinstance(args[name], list) else args[name]
        if view:  # as FullyShardedDataParallel keeps its parameters
            one.set_(torch.ones(one.numel() + 10).untyped_storage(), 10, one.shape, one.stride())
        one.untyped_storage().resize_(0)
        which = name if name == "sigma" else rf"{name}\[1\]"
        with pytest.raises(RuntimeError, match=rf"^{op}: expected {which} to hold its elements"):
            PATHS[path](op, args)


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
def test_freed_memory_of_a_layer():
    for layer in (
        specnorm_ext.SpectralLinear(4, 4),
        specnorm_ext.spectral_norm(torch.nn.Linear(4, 4)),
    ):
        weight = next(p for n, p in layer.named_parameters() if "bias" not in n)
        layer.eval()
        layer(x(2, 4))
        weight.untyped_storage().resize_(0)
        for training in (False, True):
            layer.train(training)
            for grad in (False, True):
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(RuntimeError, match="whose memory was freed"),
                ):
                    layer(x(2, 4))
    weight, u, v, one = x(3, 4), x(3), x(4), torch.ones(())
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="spectral_linear: expected weight to hold its elements"):
        ops.spectral_linear(x(2, 4), weight, None, u, v, one)
