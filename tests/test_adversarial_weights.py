"""Embedding matrices and other weights that are moved for a block: what it sees, and what is left behind it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, eps_of, here, same_bits
from torch import Tensor, nn

import specnorm_ext
from specnorm_ext.adversarial import fgm_embedding, perturbed, pgd_embedding


def fail_if(it_is_so: bool | Tensor) -> None:
    assert it_is_so
    raise KeyError("mine")


def embedding(dtype: torch.dtype = F32, **kwargs) -> tuple[nn.Embedding, Tensor]:
    torch.manual_seed(5)
    return nn.Embedding(10, 4, **kwargs).to(dtype), torch.tensor([[1, 2, 3], [4, 1, 1]])


@pytest.mark.parametrize(
    "sparse", [False, pytest.param(True, marks=pytest.mark.cpu_only("sparse tensors"))]
)
@pytest.mark.parametrize("norm", [2, math.inf])
def test_fgm_of_an_embedding_moves_it_and_restores_its_bits(norm: float, sparse: bool) -> None:
    e, ids = embedding(sparse=sparse)
    with torch.no_grad():
        e.weight[7, 0] = -0.0
        e.weight[8, 1] = math.nan
    before = e.weight.detach().clone()
    e(ids).square().sum().backward()
    g = e.weight.grad.to_dense() if sparse else e.weight.grad
    with fgm_embedding(e.weight, 0.5, norm=norm):
        step = 0.5 * (g / g.norm() if norm == 2 else g.sign())
        torch.testing.assert_close(e.weight.detach(), before + step, equal_nan=True)
        unused = torch.tensor([0, 5, 6, 7, 9])
        assert same_bits(e.weight[unused] + 0.0, before[unused] + 0.0)
        e(ids).square().sum().backward()
    assert same_bits(e.weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_also_when_the_body_raises(dtype: torch.dtype) -> None:
    e, ids = embedding(dtype)
    before = e.weight.detach().clone()

    def loss() -> Tensor:
        return e(ids).float().square().sum()

    loss().backward()
    for block in (
        lambda: fgm_embedding(e.weight, 0.5),
        lambda: pgd_embedding(e.weight, loss, 0.5),
    ):
        with pytest.raises(KeyError, match="mine"), block():
            fail_if(not same_bits(e.weight, before))
        assert same_bits(e.weight, before)
    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return loss()

    with pytest.raises(KeyError, match="mine"), pgd_embedding(e.weight, failing, 0.5):
        raise AssertionError("not reached")
    assert same_bits(e.weight, before)


def test_pgd_of_an_embedding_stays_in_the_ball_and_leaves_gradients_alone() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()
    target = torch.randn(4)

    def loss() -> Tensor:
        return (e(ids) - target).square().sum()

    clean = loss().item()
    for norm in (2, math.inf):
        with pgd_embedding(e.weight, loss, 0.5, n_steps=5, norm=norm):
            moved = e.weight.detach() - before
            length = moved.norm() if norm == 2 else moved.abs().max()
            assert length <= 0.5 + 8 * eps_of(F32) * before.norm()
            assert loss().item() > clean
        assert e.weight.grad is None
        assert same_bits(e.weight, before)
    loss().backward()
    with fgm_embedding(e.weight, 0.5):
        one = e.weight.detach().clone()
    with pgd_embedding(e.weight, loss, 0.5, n_steps=1, step_size=0.5):
        torch.testing.assert_close(e.weight.detach(), one)


def test_the_gradients_of_the_block_are_those_at_the_moved_weight() -> None:
    # tied to an output layer, whose matrix product keeps the weight for its backward
    e, ids = embedding()
    reference = copy.deepcopy(e)

    def loss(m: nn.Embedding) -> Tensor:
        return nn.functional.linear(m(ids), m.weight).logsumexp(-1).sum()

    loss(e).backward()
    g = e.weight.grad.clone()
    with torch.no_grad():
        reference.weight.copy_(e.weight + 0.5 * g / g.norm())
    loss(reference).backward()
    with fgm_embedding(e.weight, 0.5):
        loss(e).backward()
    torch.testing.assert_close(e.weight.grad, g + reference.weight.grad)
    # behind the block it is too late, and torch says so
    with fgm_embedding(e.weight, 0.5):
        late = loss(e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_blocks_under_autocast() -> None:
    """Which keeps the casts of weights that it has made: the block is to see others."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3, bias=False), torch.randn(5, 4)

    def outputs() -> Tensor:
        return net(x).float()

    g = torch.ones_like(net.weight)
    with torch.autocast(here().type, dtype=BF16):
        clean = outputs()
        for block in (
            lambda: perturbed([net.weight], lambda: net.weight.add_(1)),
            lambda: fgm_embedding(net.weight, 5.0, grad=g),
            lambda: pgd_embedding(net.weight, lambda: outputs().square().sum(), 5.0),
        ):
            with block():
                moved = outputs()
                with torch.autocast(here().type, enabled=False):
                    exact = outputs()
            # products of 4 numbers of 8 bits each
            bound = 4 * eps_of(BF16) * x.abs().sum(1).max() * 5
            assert (moved - exact).abs().max() < bound
            assert (moved - clean).abs().max() > bound
            assert torch.equal(outputs(), clean)

        # each step climbs from where the last one has led, and not from the start
        seen: list[Tensor] = []

        def loss() -> Tensor:
            seen.append(outputs().detach())
            return outputs().square().sum()

        with pgd_embedding(net.weight, loss, 5.0, n_steps=3):
            assert not torch.equal(seen[0], seen[1])
            assert not torch.equal(seen[1], seen[2])


def test_a_write_within_the_block_is_not_lost_in_silence() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()
    optimizer = torch.optim.SGD(e.parameters(), lr=0.1)
    e(ids).square().sum().backward()
    with (
        pytest.raises(
            RuntimeError, match="fgm_embedding: expected the block to leave tensor 0 alone"
        ),
        fgm_embedding(e.weight, 0.5),
    ):
        optimizer.step()
    assert same_bits(e.weight, before)


def test_blocks_within_blocks() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()

    def loss() -> Tensor:
        return e(ids).square().sum()

    loss().backward()
    with perturbed([e.weight], lambda: e.weight.add_(1)):
        outer = e.weight.detach().clone()
        for _ in range(2):
            with fgm_embedding(e.weight, 0.5), pgd_embedding(e.weight, loss, 0.1):
                assert not same_bits(e.weight, outer)
            assert same_bits(e.weight, outer)
        with pytest.raises(KeyError), fgm_embedding(e.weight, 0.5):
            fail_if(True)
        assert same_bits(e.weight, outer)
    assert same_bits(e.weight, before)

    def write_after_a_block() -> None:
        with torch.no_grad(), fgm_embedding(e.weight, 0.5):
            pass
        with torch.no_grad():
            e.weight.add_(1)

    with (  # a write that is nobody's is still seen
        pytest.raises(RuntimeError, match="perturbed: expected the block to leave tensor 0 alone"),
        perturbed([e.weight], lambda: e.weight.add_(1)),
    ):
        write_after_a_block()
    assert same_bits(e.weight, before)


def test_a_gradient_of_another_dtype() -> None:
    w = torch.randn(3, dtype=F64, requires_grad=True)
    with fgm_embedding(w, 1.0, grad=torch.tensor([1.0, 0.0, 0.0])):
        moved = w.detach().clone()
    assert torch.equal(moved[1:], w.detach()[1:])  # not rounded to float32


def test_refused_weights() -> None:
    e, ids = embedding()
    with (
        pytest.raises(
            ValueError, match=r"fgm_embedding: expected weight\.grad, got None; call backward"
        ),
        fgm_embedding(e.weight, 1),
    ):
        pass
    with (
        pytest.raises(
            TypeError, match="fgm_embedding: expected weight to be a tensor, got Embedding; pass"
        ),
        fgm_embedding(e, 1),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected grad of shape \[10, 4\], got \[2\]"),
        fgm_embedding(e.weight, 1, grad=torch.ones(2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected weight to be a leaf"),
        fgm_embedding(e.weight * 2, 1, grad=torch.ones(10, 4)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="pgd_embedding: expected the loss to depend on weight"),
        pgd_embedding(e.weight, lambda: torch.ones(()), 1),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected loss to be one number"),
        pgd_embedding(e.weight, lambda: e(ids), 1),
    ):
        pass
    with torch.inference_mode():
        made = torch.ones(2)
    with (
        pytest.raises(ValueError, match="made under inference_mode"),
        fgm_embedding(made, 1, grad=torch.ones(2)),
    ):
        pass
    e.weight.requires_grad_(False)
    with (
        pytest.raises(ValueError, match="expected weight to require grad, got a frozen one"),
        pgd_embedding(e.weight, lambda: torch.ones(()), 1),
    ):
        pass
    with fgm_embedding(e.weight, 0.1, grad=torch.ones(10, 4)):  # no gradient is taken of it
        assert e.weight.sum() != 0


def test_perturbed_takes_one_tensor_and_iterators() -> None:
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())

    def add() -> None:
        for p in net.parameters():
            p.add_(1)

    for tensors in (net.parameters(), (p for p in net.parameters())):
        with perturbed(tensors, add):
            assert torch.equal(net.bias, before["bias"] + 1)
        assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())
    with (
        pytest.raises(RuntimeError, match="expected the block to leave tensor 1 alone"),
        perturbed(net.parameters(), add),
        torch.no_grad(),
    ):
        net.bias.zero_()
    with perturbed(net.bias, lambda: net.bias.add_(1)):
        assert torch.equal(net.bias, before["bias"] + 1)
    assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())
    for tensors, change, message in (
        (net, add, "expected tensors to be a tensor or several, got Linear; pass its parameters"),
        (3, add, "expected tensors to be a tensor or several, got int"),
        ([net.bias, 3], add, r"expected tensors\[1\] to be a tensor, got int"),
        (net.bias, 3, "expected change to be a function, got int"),
    ):
        with pytest.raises(TypeError, match=f"perturbed: {message}"), perturbed(tensors, change):
            pass
    assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())


def test_perturbed_under_inference_mode_and_no_grad() -> None:
    w = nn.Parameter(torch.ones(3))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), perturbed([w], lambda: w.mul_(2)):
            assert torch.equal(w, torch.full((3,), 2.0))
        assert torch.equal(w, torch.ones(3))
    (w.sum()).backward()


def test_an_embedding_of_this_package_sees_the_moved_weight() -> None:
    e = specnorm_ext.SpectralEmbedding(10, 4).eval()
    ids = torch.tensor([1, 2, 3])
    clean = e(ids).detach()
    weight = next(p for p in e.parameters() if p.dim() == 2)
    e(ids).square().sum().backward()
    with fgm_embedding(weight, 0.5):
        assert not torch.equal(e(ids), clean)
    assert torch.equal(e(ids), clean)
