"""krylov_ and certified_matvec: the basis, the projected matrix, and their twins; the driver's restarts and choices."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, F32, F64, eps_of, matrix_with_spectrum, random_weight, state_dtype

import specnorm_ext
from specnorm_ext import krylov, reference

ops = torch.ops.specnorm_ext
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 3), (6, 200), (200, 6), (40, 60), (130, 70), (700, 300)]


def room(w: torch.Tensor, columns: int, steps: int, seed: int = 0):
    capacity = columns * (steps + 1)
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(capacity, w.shape[1], generator=g).to(state_dtype(w.dtype))
    projected = torch.zeros(capacity, capacity, dtype=F64)
    return basis, projected, torch.zeros(1, dtype=F64)


def grow(op, w, columns, steps, seed=0):
    basis, projected, unit = room(w, columns, steps, seed)
    op([w], [basis], [projected], unit, [0], columns, steps)
    return basis, projected, unit.item()


def symmetric(h: torch.Tensor) -> torch.Tensor:
    return torch.triu(h) + torch.triu(h, 1).mT


@pytest.mark.parametrize("op", [ops.krylov_, reference.krylov_], ids=["kernel", "twin"])
@pytest.mark.parametrize("columns", [1, 2, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_basis_and_the_projected_matrix(op, columns, dtype) -> None:
    eps = eps_of(state_dtype(dtype))
    for shape in SHAPES:
        if columns > min(shape):
            continue
        steps = 3
        w = random_weight(*shape, dtype, seed=columns)
        basis, projected, unit = grow(op, w, columns, steps)
        q, p = basis.double(), columns * steps
        used = torch.linalg.vector_norm(q, dim=1) > 0.5
        assert used.sum() == min(len(q), shape[1])  # the rest is zero: no direction is left
        # Gram-Schmidt twice: each entry of Q Q^T is off by a few roundings of inner products of unit vectors
        off = q @ q.mT - torch.diag(used.double())
        assert off.abs().max() <= 8 * eps * math.sqrt(shape[1])
        a = (w.double() * unit).mT @ (w.double() * unit)
        exact = q @ a @ q[:p].mT
        # two products of sums of m and n terms ("product" in helpers.TABLE), relative to |A|
        bound = 8 * eps * math.sqrt(sum(shape)) * torch.linalg.matrix_norm(a, 2)
        assert (symmetric(projected[:p, :p]) - exact[:p]).abs().max() <= bound
        assert (projected[p:, p - columns : p] - exact[p:, -columns:]).abs().max() <= bound
        assert projected[p:, : p - columns].abs().max() == 0 if p > columns else True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 4])
def test_kernel_and_twin_find_the_same_values(dtype, columns) -> None:
    for shape in SHAPES:
        if columns > min(shape):
            continue
        w = random_weight(*shape, dtype, seed=1)
        found = []
        for op in (ops.krylov_, reference.krylov_):
            _, h, unit = grow(op, w, columns, 4)
            p = 4 * columns
            found.append(torch.linalg.eigvalsh(h[:p, :p], UPLO="U")[-1].sqrt().item() / unit)
        assert found[0] == pytest.approx(found[1], rel=100 * eps_of(state_dtype(dtype)))
        assert found[0] <= torch.linalg.matrix_norm(w.double(), 2) * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e30, 1e38])
@pytest.mark.parametrize("op", [ops.krylov_, reference.krylov_], ids=["kernel", "twin"])
def test_the_whole_range_of_float32(op, scale) -> None:
    w = matrix_with_spectrum(30, 20, torch.linspace(1, 0.1, 20).double(), F64) * scale
    w = w.float()
    _, h, unit = grow(op, w, 4, 5)
    sigma = torch.linalg.eigvalsh(h[:20, :20], UPLO="U")[-1].sqrt().item() / unit
    exact = torch.linalg.matrix_norm(w.double() / scale, 2).item() * scale
    assert sigma == pytest.approx(exact, rel=1e-5)
    assert math.frexp(unit)[0] == 0.5  # a power of two


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("op", [ops.krylov_, reference.krylov_], ids=["kernel", "twin"])
def test_a_matrix_that_is_not_finite_gives_a_unit_of_nan(op, bad) -> None:
    good, w = torch.randn(50, 60), torch.randn(50, 60)
    w[49, 59] = bad
    rooms = [room(x, 2, 2) for x in (good, w)]
    units = torch.zeros(2, dtype=F64)
    op([good, w], [r[0] for r in rooms], [r[1] for r in rooms], units, [0, 0], 2, 2)
    assert units[0] > 0
    assert units[1].isnan()


def test_two_calls_are_one() -> None:
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    once = grow(ops.krylov_, w, 4, 6)
    basis, h, unit = room(w, 4, 6)
    ops.krylov_([w], [basis], [h], unit, [0], 4, 2)
    ops.krylov_([w], [basis], [h], unit, [12], 4, 4)
    assert torch.equal(basis, once[0])
    assert torch.equal(h, once[1])
    assert unit.item() == once[2]


def test_a_list_gives_the_same_bits_as_each_alone_and_any_number_of_threads() -> None:
    weights = [
        random_weight(m, n, F32, seed=m) for m, n in [(40, 60), (700, 300), (9, 8), (2000, 90)]
    ]
    alone = [grow(ops.krylov_, w, 4, 2) for w in weights]
    threads = torch.get_num_threads()
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            rooms = [room(w, 4, 2) for w in weights]
            units = torch.zeros(len(weights), dtype=F64)
            ops.krylov_(weights, [r[0] for r in rooms], [r[1] for r in rooms], units, [0] * 4, 4, 2)
        finally:
            torch.set_num_threads(threads)
        for (basis, h, _), (basis1, h1, _) in zip(rooms, alone, strict=True):
            assert torch.equal(basis, basis1)
            assert torch.equal(h, h1)


def test_strided_rows_and_a_single_column() -> None:
    big = torch.randn(60, 90)
    for view in (big[::2, 5:70], big[:, :1], big[3:4], big[:1].expand(20, 90)):
        if view.shape[1] > 1:
            assert view.stride(1) == 1
        copy = grow(ops.krylov_, view.contiguous(), 1, 2)
        seen = grow(ops.krylov_, view, 1, 2)
        assert torch.equal(copy[1], seen[1])


def test_starts_of_every_kind() -> None:
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    for start in (
        torch.zeros(4, 20),
        torch.full((4, 20), math.nan),
        torch.ones(4, 20) * 1e-30,
        torch.ones(4, 20),
    ):
        for op in (ops.krylov_, reference.krylov_):
            basis, h, unit = room(w, 4, 4)
            basis[:4] = start
            op([w], [basis], [h], unit, [0], 4, 4)
            q = basis.double()
            assert (q @ q.mT - torch.eye(20)).abs().max() < 1e-5
            sigma = torch.linalg.eigvalsh(h[:16, :16], UPLO="U")[-1].sqrt() / unit
            assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=0.05)


def test_an_invariant_subspace_is_left_for_the_rest() -> None:
    # start in the span of the three smallest directions of a diagonal: nothing of the others is ever in P
    w = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25]))
    for op in (ops.krylov_, reference.krylov_):
        basis, h, unit = room(w, 1, 7)
        basis[0] = torch.eye(7)[5]
        op([w], [basis], [h], unit, [0], 1, 7)
        sigma = torch.linalg.eigvalsh(h[:7, :7], UPLO="U")[-1].sqrt() / unit
        assert sigma.item() == pytest.approx(5, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_matvec(dtype) -> None:
    weights = [
        random_weight(m, n, dtype, seed=m)
        for m, n in [(1, 1), (3, 70), (70, 3), (300, 500), (0, 4), (4, 0)]
    ]
    weights += [weights[3].mT, weights[3][::2, ::3]]
    g = torch.Generator().manual_seed(0)
    vs = [torch.randn(w.shape[1], generator=g, dtype=F64) for w in weights]
    found = ops.certified_matvec(weights, vs)
    for w, _, x, y in zip(weights, vs, found, reference.certified_matvec(weights, vs), strict=True):
        assert x.shape == (2, w.shape[0])
        assert x.dtype == F64
        # sums of n terms in float64, in two orders
        assert ((x - y).abs() <= 2 * (w.shape[1] + 2) * 2.0**-53 * y[1]).all()


def test_schemas_and_fakes() -> None:
    w = torch.randn(30, 20)
    basis, h, unit = room(w, 4, 2)
    torch.library.opcheck(ops.krylov_.default, ([w], [basis], [h], unit, [0], 4, 2))
    torch.library.opcheck(ops.certified_matvec.default, ([w], [torch.randn(20, dtype=F64)]))
    versions = [x._version for x in (basis, h, unit)]
    ops.krylov_([w.requires_grad_()], [basis], [h], unit, [0], 4, 1)
    assert all(x._version > v for x, v in zip((basis, h, unit), versions, strict=True))
    assert not ops.certified_matvec([w], [torch.randn(20, dtype=F64)])[0].requires_grad


def arguments(**change):
    w = torch.randn(6, 5)
    args = {
        "weights": [w],
        "basis": [torch.randn(8, 5)],
        "projected": [torch.zeros(8, 8, dtype=F64)],
        "units": torch.zeros(1, dtype=F64),
        "filled": [0],
        "columns": 2,
        "steps": 2,
    }
    return list((args | change).values())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"basis": []}, ValueError, "1 tensors in basis, as in weights, got 0"),
        ({"projected": []}, ValueError, "1 tensors in projected, as in weights, got 0"),
        ({"filled": [0, 1]}, ValueError, "1 numbers in filled, as in weights, got 2"),
        ({"weights": [torch.ones(6, 5).int()]}, TypeError, "weights[0] to be torch.float32, torch.float64"),
        ({"weights": [torch.ones(5)]}, ValueError, "weights[0] to be a matrix [m, n], got shape [5]"),
        ({"weights": [torch.ones(5, 6).mT]}, ValueError, "weights[0] to have rows of unit stride; pass weight.mT"),
        ({"basis": [torch.randn(8, 5, dtype=F64)]}, TypeError, "basis[0] to be torch.float32 beside a torch.float32"),
        ({"basis": [torch.randn(8, 4)]}, ValueError, "basis[0] to have shape [capacity, 5], got [8, 4]"),
        ({"basis": [torch.randn(5, 8).mT]}, ValueError, "basis[0] to be contiguous, which it is written as"),
        ({"projected": [torch.zeros(8, 8)]}, TypeError, "projected[0] to be torch.float64 beside a"),
        ({"projected": [torch.zeros(8, 7, dtype=F64)]}, ValueError, "projected[0] to have shape [8, 8], got [8, 7]"),
        ({"units": torch.zeros(1)}, TypeError, "units to be torch.float64, got torch.float32"),
        ({"units": torch.zeros(2, dtype=F64)}, ValueError, "units to be a contiguous vector [1], got [2]"),
        ({"filled": [1]}, ValueError, "filled[0] to be 0 or at least columns = 2, got 1"),
        ({"filled": [4], "steps": 3}, ValueError, "room for 3 blocks of 2 rows more in basis[0], whose 4 of 8"),
        ({"columns": 0}, ValueError, "columns from 1 to 16, got 0"),
        ({"columns": 17}, ValueError, "columns from 1 to 16, got 17"),
        ({"steps": -1}, ValueError, "steps >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, text) -> None:
    for op in (ops.krylov_, reference.krylov_):
        args = arguments(**change)
        before = [x.clone() for x in (*args[1], *args[2], args[3])]
        with pytest.raises(error) as caught:
            op(*args)
        assert str(caught.value).startswith("krylov_: expected " + text)
        after = [*args[1], *args[2], args[3]]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
def test_shared_memory() -> None:
    shared = torch.randn(8, 5)
    with pytest.raises(ValueError, match="memory of their own"):
        ops.krylov_(*arguments(weights=[shared[:6]], basis=[shared]))


@pytest.mark.parametrize(
    ("v", "error", "text"),
    [
        ([], ValueError, "1 tensors in v, as in weights, got 0"),
        ([torch.ones(5)], TypeError, "v[0] to be torch.float64, got torch.float32"),
        ([torch.ones(4, dtype=F64)], ValueError, "v[0] to have shape [5], got [4]"),
        ([torch.ones(5, 1, dtype=F64)], ValueError, "v[0] to have shape [5], got [5, 1]"),
    ],
)
def test_bad_arguments_of_certified_matvec(v, error, text) -> None:
    for op in (ops.certified_matvec, reference.certified_matvec):
        with pytest.raises(error) as caught:
            op([torch.randn(6, 5)], v)
        assert str(caught.value) == "certified_matvec: expected " + text


def test_nothing_to_do() -> None:
    ops.krylov_([], [], [], torch.zeros(0, dtype=F64), [], 4, 2)
    assert ops.certified_matvec([], []) == []
    args = arguments(steps=0)
    before = args[1][0].clone()
    ops.krylov_(*args)
    assert torch.equal(args[1][0], before)


# ---- the driver -------------------------------------------------------------------------------------------------


def test_restarts_change_the_way_and_not_the_goal(monkeypatch) -> None:
    values = torch.cat([torch.linspace(1, 0.97, 20), torch.linspace(0.9, 0.01, 180)]).double()
    w = matrix_with_spectrum(300, 200, values, F64)
    reads = []
    for capacity in (12, 24, 200):
        monkeypatch.setattr(krylov.new_run, "__defaults__", (1, capacity))
        e = specnorm_ext.estimate(w, rtol=1e-8, max_reads=2000)
        assert e.converged
        assert e.value == pytest.approx(1, rel=1e-8)
        reads.append(e.n_reads)
    assert reads == sorted(reads, reverse=True)
    assert reads[0] > 1.5 * reads[2]


def test_twin_as_the_engine_gives_the_same_estimate(monkeypatch) -> None:
    w = random_weight(200, 120, F64, seed=2)
    kernel = specnorm_ext.estimate(w, rtol=1e-6, k=3)
    monkeypatch.setattr(krylov, "expand_matrices", krylov.expander(reference.krylov_))
    twin = specnorm_ext.estimate(w, rtol=1e-6, k=3)
    assert kernel.values == pytest.approx(twin.values, rel=1e-9)
    assert kernel.n_reads == twin.n_reads


def test_an_operator_given_as_a_function() -> None:
    w = random_weight(80, 60, F64, seed=3)
    run = krylov.new_run(
        0, torch.randn(60, 4, dtype=F64, generator=torch.Generator().manual_seed(0)), 2
    )
    done: list[bool] = []
    krylov.leading(
        [run],
        krylov.expand_operator(lambda x: (x @ w.mT) @ w),
        1e-9,
        100,
        lambda _, converged: done.append(converged),
    )
    assert done == [True]
    assert run.values == pytest.approx(torch.linalg.svdvals(w)[:2].tolist(), rel=1e-9)


def test_most_reads_of_gaussian_matrices() -> None:
    """Cold to 1e-3: the median of a few starts (bench/bench_estimate.py counts those of large ones)."""
    counts = []
    for seed in range(5):
        w = torch.randn(512, 1152, generator=torch.Generator().manual_seed(seed))
        e = specnorm_ext.estimate(w, rtol=1e-3)
        assert e.converged
        assert abs(e.value / torch.linalg.matrix_norm(w.double(), 2).item() - 1) <= 1e-3
        counts.append(e.n_reads)
    assert sorted(counts)[2] <= 20
