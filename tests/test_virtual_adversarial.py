"""Virtual adversarial training: against the explicit Hessian of the divergence, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BF16, F16, F32, F64, eps_of, here
from torch import Tensor, nn

from specnorm_ext.adversarial import frozen_statistics, virtual_adversarial_loss


def smooth_net(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def fail_if(it_is_so: bool | Tensor) -> None:
    assert it_is_so
    raise KeyError("mine")


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("xi", [None, 1e-4])
def test_the_direction_is_the_leading_eigenvector_of_the_explicit_hessian(
    kind: str, xi: float | None
) -> None:
    net = smooth_net(4, 3)
    x = torch.randn(5, 4, dtype=F64)
    epsilon = 1e-3
    got = virtual_adversarial_loss(
        net, x, xi=xi, epsilon=epsilon, n_power_iterations=100, kind=kind
    )
    best = []
    for row in x:
        z = net(row).detach()

        def d(r: Tensor, row: Tensor = row, z: Tensor = z) -> Tensor:
            moved = net(row + r)
            return kl(z, moved) if kind == "classification" else 0.5 * (moved - z).square().sum()

        h = torch.autograd.functional.hessian(d, torch.zeros(4, dtype=F64))
        values = torch.linalg.eigvalsh(h)
        best.append(0.5 * epsilon**2 * values[-1])
    # D = epsilon^2 / 2 times the leading eigenvalue, to the order epsilon relatively (and xi of the direction)
    expected = torch.stack(best).mean()
    assert abs(got.item() / expected.item() - 1) < 10 * epsilon


def test_more_iterations_find_worse_directions() -> None:
    net = smooth_net(6, 4)
    x = torch.randn(64, 6, dtype=F64)
    losses = []
    for n in (0, 1, 4, 50):
        generator = torch.Generator().manual_seed(0)
        losses.append(
            virtual_adversarial_loss(
                net, x, epsilon=1e-2, n_power_iterations=n, generator=generator
            ).item()
        )
    assert losses[0] < losses[1] < losses[2] <= losses[3] * (1 + 1e-9)


def test_vat_trains_the_parameters_through_the_moved_output_only() -> None:
    net = smooth_net(3, 2)
    x = torch.randn(4, 3, dtype=F64)
    loss = virtual_adversarial_loss(net, x, epsilon=0.5, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    assert all(g.abs().sum() > 0 for g in grads)
    step = torch.optim.SGD(net.parameters(), lr=1e-2)
    loss.backward()
    step.step()
    after = virtual_adversarial_loss(
        net, x, epsilon=0.5, generator=torch.Generator().manual_seed(0)
    )
    assert after < loss


def test_vat_in_the_maximum_norm_and_of_sequences() -> None:
    w = torch.tensor([[3.0, -4.0]], dtype=F64)
    x = torch.randn(4, 2, dtype=F64)
    got = virtual_adversarial_loss(
        lambda z: z @ w.mT, x, epsilon=0.1, norm=math.inf, kind="regression"
    )
    torch.testing.assert_close(got, torch.tensor(0.5 * (0.1 * 7) ** 2, dtype=F64))
    net = nn.Linear(3, 5).double()
    seq = torch.randn(2, 7, 3, dtype=F64)
    a = virtual_adversarial_loss(net, seq, dim=-1, generator=torch.Generator().manual_seed(1))
    b = virtual_adversarial_loss(
        lambda z: net(z).mT, seq, dim=1, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_normalization_statistics_are_left_alone(momentum: float | None) -> None:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.BatchNorm1d(4, momentum=momentum),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    frozen = nn.BatchNorm1d(3).eval()
    net.append(frozen)
    x = torch.randn(8, 2, 3)
    net(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    holders = [net[1].running_mean, net[2].running_var, net[1].num_batches_tracked]
    for xi in (None, 1e-2):
        assert virtual_adversarial_loss(net, x, xi=xi) > 0
    with frozen_statistics(net):  # a function is not looked into
        assert virtual_adversarial_loss(lambda z: net(z), x) > 0
    with pytest.raises(KeyError, match="mine"), frozen_statistics(net):
        fail_if(net(x).isfinite().all())
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert holders[0] is net[1].running_mean
    assert holders[1] is net[2].running_var
    assert holders[2] is net[1].num_batches_tracked
    with frozen_statistics(net):
        inside = net(x)
    torch.testing.assert_close(inside, net(x))  # it normalizes as it does outside
    net(x + 1)
    assert not torch.equal(before["1.running_mean"], net.state_dict()["1.running_mean"])


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_vat_in_all_dtypes_and_modes(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 4).to(dtype)
    x = torch.randn(5, 3).to(dtype)
    loss = virtual_adversarial_loss(net, x)
    assert loss.dtype == (F64 if dtype == F64 else F32)
    assert 0 < loss.item() < 10
    empty = virtual_adversarial_loss(net, x[:0])
    assert empty.item() == 0
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert virtual_adversarial_loss(net, x.clone()) > 0
    with torch.autocast(here().type, dtype=BF16):
        assert virtual_adversarial_loss(nn.Linear(3, 4), x.float()).isfinite()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_the_direction_in_half_precision(scale: float) -> None:
    """J is of rank 1, so that one iteration finds its row; J^T J = 25 scale^2 is beyond float16 at both ends."""
    w = (torch.tensor([[3.0, -4.0]]) * scale).to(F16)
    loss = virtual_adversarial_loss(
        lambda z: z @ w.mT, torch.zeros(4, 2, dtype=F16), kind="regression"
    )
    # rounded are w, r, their product, and what J d is: an error of the direction counts squared
    assert loss.item() == pytest.approx(0.5 * (5 * scale) ** 2, rel=8 * eps_of(F16))


def test_vat_with_saturated_masked_and_bad_values() -> None:
    x = torch.randn(4, 3)
    w = torch.randn(3, 2)
    flat = virtual_adversarial_loss(
        lambda z: 1e4 * (z @ w), x, epsilon=1e-8
    )  # p is 0 or 1: H d = 0
    assert flat.isfinite()

    # flat at x, so that H d = 0, but not at epsilon from it: the random direction is kept
    cliff = virtual_adversarial_loss(
        lambda z: (z - 1).relu(), torch.zeros(64, 1), epsilon=5.0, kind="regression"
    )
    assert 0 < cliff <= 8

    def masked(z: Tensor) -> Tensor:
        return torch.cat([z @ w, torch.full((len(z), 1), -math.inf)], 1)

    leaf = x.clone().requires_grad_()
    loss = virtual_adversarial_loss(masked, leaf)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    bad = x.clone()
    bad[0, 0] = math.nan
    assert virtual_adversarial_loss(lambda z: z @ w, bad).isnan()


def test_vat_of_a_model_with_dropout() -> None:
    net = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    x = torch.randn(16, 3)
    net.eval()
    seeds = [virtual_adversarial_loss(net, x, epsilon=0.0) for _ in range(2)]
    assert seeds[0] == seeds[1] == 0
    net.train()  # as documented: another mask is another output
    assert virtual_adversarial_loss(net, x, epsilon=0.0) > 0


def test_vat_of_a_compiled_model_by_differences() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        virtual_adversarial_loss(compiled, x)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    a, b = (
        virtual_adversarial_loss(m, x, xi=0.1, generator=g)
        for m, g in zip((compiled, net), seeds, strict=True)
    )
    torch.testing.assert_close(a, b)
    assert net[1].num_batches_tracked == 0


def test_vat_refuses() -> None:
    x = torch.randn(4, 3)
    net = nn.Linear(3, 2)
    op = "virtual_adversarial_loss"
    with pytest.raises(ValueError, match=f"{op}: expected the model's output to depend on x"):
        virtual_adversarial_loss(lambda z: torch.ones(4, 2, requires_grad=True) * 1, x)
    for how in ({"xi": 0.1}, {"n_power_iterations": 0}, {"xi": 0.1, "n_power_iterations": 0}):
        with pytest.raises(ValueError, match=f"{op}: expected the model's output to depend on x"):
            virtual_adversarial_loss(lambda z: torch.ones(4, 2, requires_grad=True) * 1, x, **how)
    with pytest.raises(ValueError, match=f"{op}: expected the model's output to depend on x"):
        virtual_adversarial_loss(lambda z: torch.ones(4, 2), x)
    with pytest.raises(
        ValueError, match=rf"{op}: expected an output for each of 4 samples, got shape \[2\]"
    ):
        virtual_adversarial_loss(lambda z: net(z).sum(0), x)
    with pytest.raises(
        ValueError, match=r"at least 2 classes in dimension 1, got shape \[4, 1\]; for one"
    ):
        virtual_adversarial_loss(lambda z: net(z)[:, :1], x)
    for dim in (0, -2):
        with pytest.raises(
            ValueError,
            match=rf"{op}: expected dim of the classes, got {dim}, which is that of the s",
        ):
            virtual_adversarial_loss(net, x, dim=dim)
    with pytest.raises(TypeError, match=f"{op}: expected dim to be an int, got NoneType"):
        virtual_adversarial_loss(net, x, dim=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected initialized layers, got a LazyBatchNorm1d; run"):
        virtual_adversarial_loss(nn.Sequential(net, nn.LazyBatchNorm1d()), x)
    with pytest.raises(ValueError, match=r"with dimension 1, got shape \[4\]"):
        virtual_adversarial_loss(lambda z: net(z)[:, 0], x)
    with pytest.raises(
        TypeError, match=f"{op}: expected x to be floating point, got torch.int64; pass emb"
    ):
        virtual_adversarial_loss(net, torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="expected the model's output to be a tensor, got tuple"):
        virtual_adversarial_loss(lambda z: (z,), x)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=f"{op}: expected xi to be finite and > 0, got 0"):
        virtual_adversarial_loss(net, x, xi=0)
    with pytest.raises(
        ValueError, match="expected kind to be 'classification' or 'regression', got 'x'"
    ):
        virtual_adversarial_loss(net, x, kind="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected x to have shape \[N, ...\], got \[\]"):
        virtual_adversarial_loss(net, torch.zeros(()))
    with (
        pytest.raises(TypeError, match="frozen_statistics: expected model to be a module"),
        frozen_statistics(lambda z: z),
    ):  # type: ignore[arg-type]
        pass
