"""lipschitz_bound along a graph: what is easily counted once where it counts twice, or not seen at all."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, on_one_thread
from test_lipschitz import _rules_as_they_were  # noqa: F401  (a fixture)
from torch import Tensor, nn

from specnorm_ext.lipschitz import lipschitz_bound, register_rule


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


class Does(nn.Module):
    """forward is a function of the module and its input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@on_one_thread
def steepest(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest norm of the Jacobian of one sample at a few places."""
    wide = copy.deepcopy(model).double().eval()
    n = math.prod(shape)
    best = 0.0
    for scale in (0.0, 1e-2, 1.0, 30.0):
        x = scale * torch.randn(1, *shape, dtype=F64)
        jacobian = torch.autograd.functional.jacobian(lambda y: wide(y).flatten(), x)
        best = max(best, float(torch.linalg.matrix_norm(jacobian.reshape(-1, n), 2)))
    return best


# a model, a shape, and the exact constant
SOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "x + x by keyword": (lambda: Does(lambda m, x: torch.add(x, other=x)), (3,), 2.0),
    "method by keyword": (lambda: Does(lambda m, x: x.add(other=x, alpha=2)), (3,), 3.0),
    "alpha": (lambda: Does(lambda m, x: torch.sub(x, -x, alpha=4)), (3,), 5.0),
    "first by keyword": (lambda: Does(lambda m, x: torch.div(input=x, other=4)), (3,), 0.25),
    "the larger of the same": (lambda: Does(lambda m, x: torch.maximum(x, x)), (3,), 1.0),
    "parts by keyword": (
        lambda: Does(lambda m, x: torch.cat(tensors=[x, x], dim=1)),
        (3,),
        math.sqrt(2),
    ),
    "chunks as they come": (lambda: Does(lambda m, x: torch.cat(x.chunk(2, 1), 1)), (4,), 1.0),
    "clamp repeats": (
        lambda: Does(
            lambda m, x: torch.clamp(x, min=m.low), low=nn.Parameter(torch.full((5,), -1e3))
        ),
        (1,),
        math.sqrt(5),
    ),
    "a kernel of the input's size": (
        lambda: Does(lambda m, x: F.avg_pool2d(x, (x.size(2), x.shape[3]))),
        (2, 4, 4),
        0.25,
    ),
    "one row": (
        lambda: Does(lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.tensor([3.0, 4.0]))),
        (5, 2),
        5.0,
    ),
    "a number of float64": (lambda: Does(lambda m, x: 0.1 * torch.relu(x)), (3,), 0.1),
    "huge constants, summed": (
        lambda: Does(lambda m, x: (x + 1e20) - 1e20 + x * 1e-3),
        (3,),
        1.001,
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_exact_constants(name: str) -> None:
    make, shape, truth = SOUND[name]
    # 1e-9 is what certificates and chains exceed by
    assert truth * (1 - 1e-15) <= lipschitz_bound(make(), shape).bound <= truth * (1 + 1e-8)


def test_constants_hide_nothing_of_an_affine_chain() -> None:
    # x + 1e20 - 1e20 is 0 in float64, the network's constant 1 all the same
    shift, back = nn.Linear(2, 2).double(), nn.Linear(2, 1, bias=False).double()
    shift.weight.data, shift.bias.data = torch.eye(2, dtype=F64), torch.full((2,), 1e20, dtype=F64)
    back.weight.data = torch.tensor([[1.0, -1.0]], dtype=F64)
    bound = lipschitz_bound(nn.Sequential(shift, back), (2,)).bound
    assert math.sqrt(2) * (1 - 1e-15) <= bound <= math.sqrt(2) * (1 + 1e-8)
    norm = nn.BatchNorm1d(2, eps=0).double()
    norm.running_mean.fill_(1e20)
    norm.bias.data.fill_(1e20)
    assert lipschitz_bound(nn.Sequential(norm, nn.BatchNorm1d(2, eps=0).double()), (2,)).bound >= 1


def test_an_affine_module_whose_gradient_is_another_is_not_written_out() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.detach()

    register_rule(Detached, lambda module, shape: 3.0, affine=True)
    bound = lipschitz_bound(nn.Sequential(Detached(), nn.Linear(2, 2), Detached()), (2,)).bound
    assert bound > 0


def test_products_below_the_range_are_not_zero() -> None:
    small = nn.Linear(2, 2).double()
    small.weight.data = 1e-200 * torch.eye(2, dtype=F64)
    assert lipschitz_bound(nn.Sequential(small, nn.ReLU(), small), (2,)).bound > 0


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * super().forward(x)


def test_a_rule_of_ones_own_is_asked_behind_a_convolution_too() -> None:
    register_rule(Louder, lambda module, shape: 100.0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), Louder(2))
    assert lipschitz_bound(model, (2, 5, 5)).bound >= steepest(model, (2, 5, 5))


def replaced() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, 100 * self.weight), layer)
    return nn.Sequential(layer)


def written_over(module: nn.Module) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(x)
        z = m.part(y).mul_(5)  # in eval a dropout gives y itself
        return y + z

    return Does(forward, part=module)


def by_position(m: nn.Module, x: Tensor) -> Tensor:
    y = 1.0 * x
    F.leaky_relu(y, 9.0, True)
    return y


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Does(lambda m, x: F.linear(x, x)), (3,), "multiplies activations"),
        (Does(lambda m, x: torch.matmul(x, other=x)), (7,), "multiplies activations"),
        (Does(lambda m, x: torch.einsum("bi->bi", x)), (3,), "write x @ w"),
        (Does(lambda m, x: F.linear(x, m.w, x), w=nn.Parameter(torch.eye(3))), (3,), "linear"),
        (Does(lambda m, x: x / x.size(0)), (3,), "depends on the number of samples"),
        (Does(lambda m, x: x * (8 - x.shape[0])), (3,), "depends on the number of samples"),
        (Does(lambda m, x: x.to(torch.relu(x))), (3,), "which is not known"),
        (Does(lambda m, x: torch.div(input=torch.ones(3), other=x)), (3,), "divides activations"),
        *[
            (written_over(d()), (3, 4), r"mul_\(\) .* writes over a value that is read again")
            for d in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)
        ],
        (Does(by_position), (3,), r"leaky_relu\(\) .* writes over a value that is read again"),
        (replaced(), (3,), "got Linear at '0', which has a forward put in place"),
        (
            Does(
                lambda m, x: m.c(x, output_size=(10, 10)), c=nn.ConvTranspose2d(2, 2, 3, 2, 1)
            ),
            (2, 5, 5),
            "is called with an output_size",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2)), (3, 8, 8), "attention has"),
    ],
)  # fmt: skip
def test_what_has_no_constant_is_named(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TypeError, match="^lipschitz_bound: .*" + message):
        lipschitz_bound(model, shape)


# ---- the search -------------------------------------------------------------------------------------------------


def test_the_search_in_inference_mode_and_where_the_input_is_written_over() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    data = torch.randn(4, 3)
    kept = data.clone()
    result = lipschitz_bound(model, (3,), data=data)
    assert 0 < result.lower <= result.bound
    with torch.inference_mode():
        assert lipschitz_bound(model, (3,), data=data) == result
    assert torch.equal(data, kept)


def test_the_search_says_what_it_cannot_do() -> None:
    model = Does(lambda m, x: 2 * x.detach())
    assert lipschitz_bound(model, (3,)).bound == pytest.approx(2)
    with pytest.raises(TypeError, match=r"lipschitz_bound: expected a model with gradients"):
        lipschitz_bound(model, (3,), data=torch.randn(2, 3))


def test_the_search_is_of_the_same_function_in_float64() -> None:
    # RMSNorm without eps takes that of its input's dtype; at 0 it decides everything
    result = lipschitz_bound(nn.RMSNorm(4), 4, data=torch.zeros(2, 4))
    assert 0 < result.lower <= result.bound


def test_nothing_else_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    seed = torch.get_rng_state()
    lipschitz_bound(model, 3, data=torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
