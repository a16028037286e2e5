"""The layers under torch's machinery: compile, export, AOTInductor, autocast, torch.func, optimizers, tracing.

docs/COMPATIBILITY.md is the table of what is tried here, and how.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import here
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from specnorm_ext import SpectralConv2d, SpectralEmbedding, SpectralLinear, SpectralNormGroup

F64 = torch.float64


def critic(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        SpectralConv2d(2, 4, 3, dtype=dtype),
        nn.Tanh(),
        nn.Flatten(),
        SpectralLinear(64, 16, n_vectors=3, dtype=dtype),
        nn.Tanh(),
        SpectralLinear(16, 8, blocks=2, bound=0.9, dtype=dtype),
        SpectralLinear(8, 2, learnable_scale=True, dtype=dtype),
    )


def data(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(n), dtype=dtype)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = SpectralEmbedding(7, 5, padding_idx=0)
        self.head = SpectralLinear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_in_one_graph_for_any_batch(backend, training):
    eager = critic().train(training)
    model = copy.deepcopy(eager)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for n in (3, 5, 7):
        expected, y = eager(data(n)), compiled(data(n))
        torch.testing.assert_close(y, expected)
        for m, out in ((eager, expected), (model, y)):
            m.zero_grad()
            out.square().sum().backward()
        for k, g in gradients(model).items():
            torch.testing.assert_close(g, gradients(eager)[k], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (k, a), (_, b) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=k)


def test_compiled_embedding():
    eager, tokens = Words(), torch.tensor([[0, 1, 2], [3, 3, 6]])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for f, m in ((eager, eager), (compiled, model)):
        f(tokens).square().sum().backward()
        assert len(gradients(m)) == 3
    for k, g in gradients(model).items():
        torch.testing.assert_close(g, gradients(eager)[k])


def test_exported_with_a_dynamic_batch():
    model = critic().eval()
    program = torch.export.export(
        model, (data(3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for n in (3, 5):
        torch.testing.assert_close(program.module()(data(n)), model(data(n)))


def test_exported_in_training():
    model = critic()
    program = torch.export.export(copy.deepcopy(model), (data(3),))
    torch.testing.assert_close(program.module()(data(3)), model(data(3)))


@pytest.mark.cpu_only(
    "torch.compile's inductor, which builds kernels; for CUDA in test_cuda_runtime.py"
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own making
def test_ahead_of_time_by_inductor(tmp_path):
    model = critic().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (data(3),), dynamic_shapes=({0: batch},))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "critic.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(data(4)), model(data(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_autocast(dtype, training, recording):
    """Output dtype as torch's own layers', u, v and sigma untouched, values float32's to the dtype's rounding."""
    model = critic().train(training)
    exact = copy.deepcopy(model)(data(3))
    before = {k: x.dtype for k, x in model.state_dict().items()}
    with torch.set_grad_enabled(recording), torch.autocast(here().type, dtype):
        y = model(data(3))
        assert y.dtype == nn.Linear(4, 4)(torch.randn(2, 4)).dtype == dtype
    assert {k: x.dtype for k, x in model.state_dict().items()} == before
    assert model[3].sigma.dtype == torch.float32
    # four layers of norm 1, each rounding its inputs and its output
    assert (y - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max().clamp_min(1)
    if recording:
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transforms_over_the_input(training):
    x = data(3, F64)
    model = critic(F64).train(training)

    def twin() -> nn.Module:
        return copy.deepcopy(model)  # a training forward moves u and v

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin()(leaf).sum(), leaf)
    torch.testing.assert_close(grad(lambda a: twin()(a).sum())(x), expected)
    y = twin()(x)
    torch.testing.assert_close(vmap(lambda a: twin()(a[None])[0])(x), y)
    jacobian = jacrev(twin())(x)
    torch.testing.assert_close(torch.einsum("ncmdhw->mdhw", jacobian), expected)
    _, forward = jvp(twin(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(forward, jacobian.sum((2, 3, 4, 5)))
    head = SpectralLinear(6, 1, dtype=F64).train(training)
    curvature = hessian(lambda a: copy.deepcopy(head)(a).pow(3).sum())(x[:1, 0, 0])
    assert curvature.abs().max() > 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transforms_over_the_weights(training):
    model = critic(F64).train(training)
    twin = copy.deepcopy(model)
    twin(data(3, F64)).square().sum().backward()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p):
        return functional_call(copy.deepcopy(model), p, (data(3, F64),)).square().sum()

    found = grad(loss)(parameters)
    for k, g in gradients(twin).items():
        torch.testing.assert_close(found[k], g)
    for k, g in jacrev(loss)(parameters).items():
        torch.testing.assert_close(g, found[k])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ensembles(training):
    models = [critic(F64).train(training) for _ in range(3)]
    for i, m in enumerate(models):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1 + i)
    expected = torch.stack([copy.deepcopy(m)(data(4, F64)) for m in models])
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0])
    x = data(4, F64)
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(y, expected)
    if training:  # the stacked u and v have moved as each model's own do
        for m in models:
            m(data(4, F64))
        for k, stacked in buffers.items():
            torch.testing.assert_close(stacked, torch.stack([m.get_buffer(k) for m in models]))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    f"{kind.__name__} {how}": lambda p, kind=kind, how=how: kind(p, lr=1e-2, **{how: True})
    for kind in (torch.optim.SGD, torch.optim.AdamW)
    for how in ("foreach", "fused")
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_change_many_weights_at_once(make):
    """Eval sees the new weights. A step between forward and backward raises, where torch counts it as a version."""
    model = critic().eval()
    optimizer = make(model.parameters())
    with torch.no_grad():
        before = model(data(3))
    model(data(3)).square().sum().backward()
    pending = model(data(3)).sum()
    version = model[3].weight._version
    optimizer.step()
    with torch.no_grad():
        after = model(data(3))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, copy.deepcopy(model)(data(3)))
    if (
        model[3].weight._version > version
    ):  # torch's fused kernels leave it, so that plain layers do not notice either
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pending.backward()
    else:
        assert optimizer.defaults["fused"]


def test_gradient_scaler():
    """A step that the scaler leaves out, for its overflow, is no update of the group either."""
    model = critic()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    SpectralNormGroup(model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for i in range(4):
        optimizer.zero_grad()
        with torch.autocast(here().type, torch.float16):
            loss = model(data(3)).square().sum()
        scaler.scale(loss * (torch.inf if i == 2 else 1)).backward()
        u = model[3].spectral._u.clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(u, model[3].spectral._u) == (i == 2)
    assert all(torch.isfinite(x).all() for x in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_jit_trace():
    model = critic().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (data(3),))
        model[3].weight.mul_(2)
    for n in (3, 4):
        torch.testing.assert_close(traced(data(n)), model(data(n)))
