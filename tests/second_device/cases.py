"""The second device itself, and who gets it: run with `--device second` by tests/test_other_device.py."""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest
import torch
from helpers import F64, here
from other_device import PACKAGE
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from specnorm_ext import SpectralEmbedding, SpectralLinear


def numbers(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Distinct, on the CPU."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype, device="cpu").view(shape)


def second(*shape: int) -> Tensor:
    return numbers(*shape).to(here())


# ---- the device -------------------------------------------------------------------------------------------------


def test_there_and_back() -> None:
    x = second(3, 4)
    assert str(x.device) == "second:0"
    assert not x.is_cpu
    assert torch.equal(x.cpu(), numbers(3, 4))
    with pytest.raises(TypeError, match=r"second:0 device type tensor to numpy"):
        x.numpy()
    assert x.tolist() == numbers(3, 4).tolist()
    assert x[1, 2].item() == 7
    z = torch.complex(x, -x)
    assert torch.equal(z.conj().cpu(), torch.complex(numbers(3, 4), numbers(3, 4)))
    assert torch.equal(z.conj().imag.cpu(), numbers(3, 4))


def test_views_are_of_the_same_memory() -> None:
    x = second(3, 4)
    version = x._version
    view = x.mT[1:, ::2]
    assert view._base is x
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    view.zero_()
    assert x._version > version
    assert x.cpu().tolist() == [[1, 0, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]]
    parts = x.unbind(0)
    del x, view
    gc.collect()
    assert parts[1].sum() == 26
    with torch.inference_mode():
        inner = parts[1][:2]
    assert not inner.is_inference()


def test_what_an_op_does_to_its_arguments_comes_back() -> None:
    x = second(2, 2)
    assert x.add_(1) is x
    assert x.cpu().tolist() == [[2, 3], [4, 5]]
    x.unsqueeze_(0)
    assert x.shape == (1, 2, 2)
    x.resize_(3, 2, 2)
    assert x.untyped_storage().nbytes() == 12 * 8
    assert x[0].cpu().tolist() == [[2, 3], [4, 5]]
    out = x.new_empty(0)
    assert torch.add(x, 1, out=out) is out
    assert out.shape == (3, 2, 2)
    flat = x.new_empty(0).set_(x.untyped_storage())
    flat[0] = 7
    assert x[0, 0, 0] == 7
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0
    values, places = torch.empty(2, dtype=F64), torch.empty(2, dtype=torch.long)
    torch.sort(torch.tensor([3.0, 1.0], dtype=F64), out=(values, places))
    assert values.tolist() == [1, 3]
    assert places.tolist() == [1, 0]


REFUSED = {
    "a sum": lambda x, y: x + y,
    "a product": lambda x, y: x @ y.mT,
    "linear": lambda x, y: nnf.linear(x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "a stack of numbers": lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    "equal": torch.equal,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "in place": lambda x, y: y.add_(x),
    "into a number of the CPU": lambda x, y: y[0, 0].add_(x[0, 0]),
    "out": lambda x, y: torch.exp(x, out=y.clone()),
    "an index of the device": lambda x, y: y[torch.zeros(1, dtype=torch.long)],
    "lists": lambda x, y: torch._foreach_add([x], [y]),
    "a storage": lambda x, y: x.set_(y.untyped_storage()),
}


@pytest.mark.parametrize("op", REFUSED.values(), ids=REFUSED)
def test_devices_do_not_mix(op) -> None:
    with pytest.raises(RuntimeError, match=r"devices?|storage"):
        op(second(2, 2), numbers(2, 2))


def test_what_may_come_from_the_cpu() -> None:
    x, y = second(2, 2), numbers(2, 2)
    assert torch.equal((x * y[1, 1]).cpu(), 4 * y)
    assert torch.equal(x[torch.tensor([1], device="cpu")].cpu(), y[1:])
    x[torch.tensor([True, False], device="cpu")] = y[0, 0]
    x[1].copy_(y[0])
    assert x.cpu().tolist() == [[1, 1], [1, 2]]


def test_copies_and_files() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    assert twin[1].weight is twin[0].weight
    assert twin[0].weight.device == here()
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()
    parameter = model[0].weight
    values = parameter.detach().cpu()
    assert model.cpu()[0].weight is parameter
    assert model.to(here())[0].weight is parameter
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for where, device in ((None, here()), ("cpu", torch.device("cpu"))):
        file.seek(0)
        state = torch.load(file, map_location=where)
        assert state["0.weight"].device == device
        assert torch.equal(state["0.weight"].cpu(), values)
    twin.load_state_dict(state)
    assert torch.equal(twin[1].weight.cpu(), values)


# ---- what torch does with it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_is_that_of_the_cpu(optimizer) -> None:
    there = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2), nn.GRUCell(2, 2)
    ).double()  # fmt: skip
    cpu = copy.deepcopy(there).cpu()
    threads = set()
    there[0].weight.register_hook(lambda g: threads.add(threading.get_ident()))
    for model, x in ((there, second(5, 2, 4, 4)), (cpu, numbers(5, 2, 4, 4))):
        steps = optimizer(model.parameters(), lr=0.01)
        for _ in range(3):
            steps.zero_grad()
            loss = model(x / 100).square().sum()
            (g,) = torch.autograd.grad(loss, model[4].weight, create_graph=True)
            (loss + g.square().sum()).backward()
            steps.step()
    assert threading.get_ident() not in threads  # backward has a thread of its own, as on a GPU
    for x, y in zip(there.parameters(), cpu.parameters(), strict=True):
        # Adam divides by roots of small numbers, and the recurrent cell adds in another order
        torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=1e-9, atol=1e-9)


def test_random_numbers_are_those_of_the_cpu() -> None:
    device = here()
    torch.manual_seed(3)
    drawn = torch.empty(5, device=device).normal_(), torch.rand(5, device=device)
    torch.manual_seed(3)
    expected = torch.empty(5, device="cpu").normal_(), torch.rand(5, device="cpu")
    assert all(torch.equal(x.cpu(), y) for x, y in zip(drawn, expected, strict=True))
    own = torch.Generator(device).manual_seed(4)
    assert own.device == device
    got = torch.ops.aten.randn([3], generator=own, device=device)
    assert torch.equal(
        got.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(4), device="cpu")
    )
    x = second(50).requires_grad_()
    y = checkpoint(lambda x: nnf.dropout(x) * x, x, use_reentrant=False)
    y.sum().backward()  # the same entries fell out both times
    assert torch.equal(x.grad * x, 2 * y)


def test_autocast() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.autocast("second", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x).softmax(-1).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32


# ---- who gets it ------------------------------------------------------------------------------------------------


def in_the_package(text: str):
    """A function `f` as if the package had it."""
    scope = {"torch": torch, "nn": nn}
    exec(compile(text, str(PACKAGE / "made_up.py"), "exec"), scope)
    return scope["f"]


def test_factories_of_tests_get_it() -> None:
    made = [
        torch.zeros(2),
        torch.tensor([1.0]),
        torch.eye(2),
        torch.arange(3),
        torch.randn(2),
        nn.Linear(2, 2).weight,
    ]
    assert all(x.device == here() for x in made)
    assert torch.zeros(2, device="cpu").is_cpu
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
    a = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert a.is_leaf
    assert a.requires_grad
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0), device="cpu")
    assert torch.equal(a.detach().cpu(), expected)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(1).device))
    thread.start()
    thread.join()
    assert found == [here()]


def test_a_device_that_the_package_forgets_shows() -> None:
    forgotten = in_the_package("def f(x): return x + torch.zeros(2)")
    with pytest.raises(RuntimeError, match="same device"):
        forgotten(torch.ones(2))
    own = in_the_package(
        "def f(x): return torch.randn(2, device=x.device, generator=torch.Generator().manual_seed(0))"
    )
    with pytest.raises(RuntimeError, match="generator"):
        own(torch.ones(2))
    built = in_the_package("def f(x): return nn.Linear(2, 2)")
    assert built(torch.ones(2)).weight.is_cpu
    given = in_the_package("def f(x, g): return torch.randn(2, device=x.device, generator=g)")
    assert given(torch.ones(2), torch.Generator().manual_seed(0)).device == here()


def test_modules_of_the_package_are_made_where_the_test_asks() -> None:
    layer = SpectralLinear(3, 4)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert all(x.device == here() for x in tensors)
    assert all(x.is_cpu for x in SpectralLinear(3, 4, device="cpu").parameters())


# ---- ops without kernels, as the kernels have them -----------------------------------------------------------------


def test_the_gradient_has_the_strides_of_the_weight() -> None:
    """Which the fake kernels promise to a compiler, whatever the gradient's own."""
    u, v, sigma = torch.ones(6), torch.ones(4), torch.ones(1)
    for w, g in (
        (torch.ones(4, 6).t(), torch.ones(6, 4)),
        (torch.ones(6, 4), torch.ones(4, 6).t()),
    ):
        (dw,) = torch.ops.specnorm_ext.normalize_backward([g], [w], [u], [v], sigma)
        assert dw.stride() == w.stride()


@pytest.mark.parametrize(
    "make", [lambda: SpectralLinear(64, 32), lambda: SpectralEmbedding(64, 32)]
)
def test_autocast_rounds_no_backward(make) -> None:
    """The forward was outside of it."""
    layer = make()
    x = torch.randn(5, 64) if isinstance(layer, nn.Linear) else torch.randint(64, (5,))
    found = []
    for inside in (False, True):
        twin = copy.deepcopy(layer)
        y = twin(x)
        with torch.autocast(here().type, torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(y.square().sum(), twin.weight)[0])
    assert torch.equal(*found)
