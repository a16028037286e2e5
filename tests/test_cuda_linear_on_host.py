"""csrc/spectral_linear_cuda.cu and cublas_lt.cpp on the host, under AddressSanitizer and UBSan, with a library in
cuBLASLt's place (cuda_on_host/fake_cublas_lt.cpp) that checks what it is asked for and multiplies in plain loops.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from cuda_on_host import host_runner
from cuda_on_host.host_runner import ALL_ORDERS, CSRC, LINEAR, SMALL_LINEAR, LaunchError, Runner
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    check_linear,
    check_linear_backward,
    random_weight,
    same_bits,
    smallest,
    start,
    state_dtype,
)

SHAPES = ((1, 1, 1), (5, 7, 3), (33, 20, 65), (64, 48, 32), (2, 1, 300), (1, 130, 9), (70, 3, 1))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    reason = host_runner.why_not()
    out = tmp_path_factory.mktemp("linear_on_host")
    reason = reason or host_runner.no_sanitizers(out)
    if reason:
        pytest.skip(reason)
    return host_runner.Build(out, LINEAR)


@pytest.fixture(scope="module")
def program(build):
    return build.runner()


@pytest.fixture(scope="module")
def log(build):
    return build.out / "log"


def runner_of(program, **environment):
    runner = Runner(program, program.parent, environment)
    yield runner
    runner.close()  # with AddressSanitizer's report of leaks, if any


@pytest.fixture(scope="module")
def runner(program, log):
    yield from runner_of(program, FAKE_CUBLASLT_LOG=str(log))


REFUSALS = {
    "off": ({"SPECNORM_EXT_CUBLASLT": "0"}, "SPECNORM_EXT_CUBLASLT is 0"),
    "no algorithm": ({"FAKE_CUBLASLT_REFUSE": "heuristic"}, "cuBLASLt: not supported (status 15)"),
    "at the last": ({"FAKE_CUBLASLT_REFUSE": "matmul"}, "cuBLASLt: not supported (status 15)"),
}


@pytest.fixture(scope="module", params=REFUSALS)
def refused(request, program):
    """A runner whose cuBLASLt refuses, and its words."""
    environment, words = REFUSALS[request.param]
    for runner in runner_of(program, **environment):
        yield runner, words


def case(batch, out, inputs, dtype, i=0, layouts=("contiguous",)):
    """g, x, W, b, u, v, sigma; operands in layouts that cuBLAS can walk, a different mix for each i."""
    w, x, g = (
        LAYOUTS[layouts[(i // len(layouts) ** k) % len(layouts)]](random_weight(*s, dtype, seed=k))
        for k, s in enumerate(((out, inputs), (batch, inputs), (batch, out)))
    )
    b = random_weight(1, out, dtype, seed=9)[0]
    u, v = start(w, None, i)
    u, v = u / u.norm(), v / v.norm()
    sigma = torch.tensor(0.7 + i % 5, dtype=state_dtype(dtype)).reshape(() if i % 2 else 1)
    return g, x, w, b, u, v, sigma


WALKABLE = ("contiguous", "transposed", "row_strided", "transposed_strided")


@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward(runner, dtype, bias):
    """Every shape in every mix of layouts of x and W, alone and in all orders."""
    for i in range(16):
        shape = SHAPES[i % len(SHAPES)]
        _, x, w, b, _, _, sigma = case(*shape, dtype, i, WALKABLE)
        y = runner.spectral_linear(x, w, b if bias else None, sigma, orders=ALL_ORDERS)
        assert runner.refusal == ""
        check_linear(y, x, w, b if bias else None, sigma)


@each_dtype
@pytest.mark.parametrize("wants", ["x w", "x", "w", "w from y"])
def test_backward(runner, dtype, wants):
    for i in range(16):
        shape = SHAPES[(i // 2) % len(SHAPES)]
        g, x, w, b, u, v, sigma = case(*shape, dtype, i * 4 + i // 4, WALKABLE)
        y = None
        if wants == "w from y":
            b = b if i % 2 else None
            y = x.double() @ w.double().mT / sigma.double() + (0 if b is None else b.double())
            y = y.to(dtype)
        want_x, want_w = "x" in wants, "w" in wants
        dx, dw = runner.spectral_linear_backward(
            g, x, w, b, u, v, sigma, y, want_x, want_w, orders=ALL_ORDERS
        )
        assert runner.refusal == ""
        assert dw.stride() == torch.empty_like(w).stride()
        check_linear_backward(
            dx if want_x else None, dw if want_w else None, g, x, w, u, v, sigma, y
        )


def test_rows_of_several_pieces_on_few_and_many_multiprocessors(runner):
    for i, device in enumerate((host_runner.H200, SMALL_LINEAR)):
        for dtype in (F32, BF16):
            g, x, w, b, u, v, sigma = case(9, 5, 9001, dtype, i)
            y = runner.spectral_linear(x, w, b, sigma, device=device)
            check_linear(y, x, w, b, sigma)
            dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, sigma, device=device)
            check_linear_backward(dx, dw, g, x, w, u, v, sigma)


@each_dtype
def test_where_cublaslt_refuses(refused, dtype):
    runner, words = refused
    for i, wants in enumerate(("x w", "x", "w", "w from y")):
        g, x, w, b, u, v, sigma = case(*SHAPES[1 + i], dtype, i, WALKABLE)
        y = runner.spectral_linear(x, w, b, sigma)
        assert runner.refusal == words
        check_linear(y, x, w, b, sigma, roundings=2)  # the product is stored before it is scaled
        y = y if wants == "w from y" else None
        want_x, want_w = "x" in wants, "w" in wants
        dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, sigma, y, want_x, want_w)
        assert runner.refusal == words
        if dtype in (F32, F64):
            dx, dw = dx if want_x else None, dw if want_w else None
            check_linear_backward(dx, dw, g, x, w, u, v, sigma, y)


def test_operands_that_cublas_cannot_walk(runner):
    """The op makes them dense before; a launcher that is given them all the same does not read them wrongly."""
    g, x, w, b, u, v, sigma = case(8, 6, 10, F32)
    for change in ("every_2nd_column", "2nd_row_3rd_column"):
        y = runner.spectral_linear(LAYOUTS[change](x), w, b, sigma)
        assert runner.refusal == "neither stride of an operand is 1"
        check_linear(y, x, w, b, sigma)
    wide = g[:1].expand(8, 6)
    dx, dw = runner.spectral_linear_backward(
        wide, x, LAYOUTS["every_2nd_column"](w), b, u, v, sigma
    )
    check_linear_backward(dx, dw, wide, x, w, u, v, sigma)


def test_views_that_begin_anywhere(runner):
    """The heuristic is told how far each matrix is aligned, and asked anew for less."""
    for dtype in (F16, F32):
        for offset in (1, 2, 4):
            w, x, g = (
                random_weight(1, offset + r * c, dtype)[0, offset:].view(r, c)
                for r, c in ((16, 24), (8, 24), (8, 16))
            )
            _, _, _, b, u, v, sigma = case(8, 16, 24, dtype)
            # of a fused layer's bias: after one from the start, which the same plan would be for
            check_linear(runner.spectral_linear(x, w, b, sigma), x, w, b, sigma)
            b = random_weight(1, offset + 16, dtype)[0, offset:]
            check_linear(runner.spectral_linear(x, w, b, sigma), x, w, b, sigma)
            dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, sigma)
            assert runner.refusal == ""
            check_linear_backward(dx, dw, g, x, w, u, v, sigma)


@each_dtype
def test_zero_nan_and_tiny_sigma(runner, dtype):
    g, x, w, b, u, v, sigma = case(5, 7, 3, dtype)
    y = runner.spectral_linear(x, 0 * w, b, 0 * sigma)
    assert torch.equal(y, b.expand(5, 7))
    for want_x in (True, False):
        dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, 0 * sigma, want_x=want_x)
        assert (dw == 0).all()
        assert not want_x or (dx == 0).all()
    dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, math.nan * sigma)
    assert dx.isnan().all()
    assert dw.isnan().all()
    tiny = torch.full_like(sigma, smallest(state_dtype(dtype)))
    y = runner.spectral_linear(x, 0 * w, b, tiny)
    assert torch.equal(y, b.expand(5, 7))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0), (1, 0, 0)])
def test_empty(runner, shape):
    g, x, w, b, u, v, sigma = case(*shape, F32)
    y = runner.spectral_linear(x, w, b, sigma)
    assert torch.equal(y, b.expand(y.shape))  # no term in the sum where in is 0
    for want_x in (True, False):
        dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, sigma, want_x=want_x)
        assert not want_x or (dx == 0).all()
        assert (dw == 0).all()


def test_no_workspace(runner):
    g, x, w, b, u, v, sigma = case(5, 7, 3, F32)
    library, scalars, sums = 512, 256, 256  # fake_cublas_lt.cpp; 1 / sigma; c, one sum a block
    words = "expected to allocate a workspace of {} bytes .* got no memory: out of memory"
    with pytest.raises(LaunchError, match=words.format(library + scalars)):
        runner.spectral_linear(x, w, b, sigma, workspace_fails=True)
    with pytest.raises(LaunchError, match=words.format(library + scalars + sums)):
        runner.spectral_linear_backward(g, x, w, b, u, v, sigma, workspace_fails=True)


def test_an_algorithm_is_looked_for_once(program, tmp_path):
    log = tmp_path / "log"
    for runner in runner_of(program, FAKE_CUBLASLT_LOG=str(log)):
        for _ in range(3):
            _, x, w, b, _, _, sigma = case(5, 7, 3, F32)
            runner.spectral_linear(x, w, b, sigma, orders=("FF", "FF"))
        runner.spectral_linear(x, w, None, sigma, orders=("FF", "FF"))
        runner.spectral_linear(x[:4], w, None, sigma, orders=("FF", "FF"))
    lines = log.read_text().splitlines()
    asked = [line for line in lines if line.startswith("heuristic")]
    # for each of the two processes: with a bias, without, and for another batch
    assert sorted(asked) == ["heuristic 7 4 3"] * 2 + ["heuristic 7 5 3"] * 4
    assert len(lines) - len(asked) == 2 * 5


def test_launches(runner):
    """Besides the products: the scalars; and for the gradients c and the rank-one term."""
    g, x, w, b, u, v, sigma = case(33, 20, 65, F32)
    runner.spectral_linear(x, w, b, sigma, orders=("FF",))
    assert runner.stats.launches == 1
    runner.spectral_linear_backward(g, x, w, b, u, v, sigma, orders=("FF",))
    assert runner.stats.launches == 3


# What the fake library, or the values, must catch in a wrong wrapper: (in cublas_lt.cpp, instead).
PLANTED = {
    "m and n swapped": (
        "return {p.dtype, p.tf32, p.b.transposed(), p.a.transposed(), p.d.transposed(), p.bias};",
        "return {p.dtype, p.tf32, p.a, p.b, p.d.transposed(), p.bias};",
    ),
    "a wrong leading dimension": (
        "out->ld = x.m == 1 ? x.n : x.row_stride;",
        "out->ld = x.n;",
    ),
    "an operand that is not transposed": (
        "set(kDescTransA, p.a.by_columns ? kOpN : kOpT);",
        "set(kDescTransA, kOpT);",
    ),
    "alpha read by the host": ("set(kDescPointerMode, kPointersOnDevice);", ""),
    "an alignment that is not there": ("return uint32_t(address & (~address + 1));", "return 256;"),
    "a plan for other strides": ("p.b.ld,", "0,"),
}  # fmt: skip


def all_ways(runner):
    for i in range(8):
        g, x, w, b, u, v, sigma = case(5, 7, 3, F32, i, WALKABLE)
        check_linear(runner.spectral_linear(x, w, b, sigma), x, w, b, sigma)
        dx, dw = runner.spectral_linear_backward(g, x, w, b, u, v, sigma)
        check_linear_backward(dx, dw, g, x, w, u, v, sigma)
    shifted = torch.zeros(1 + 5 * 3)[1:].view(5, 3)
    runner.spectral_linear(shifted, w, b, sigma)


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught(build, runner, tmp_path, fault):
    all_ways(runner)  # with the right wrapper nothing is
    source, (right, wrong) = (CSRC / "cublas_lt.cpp").read_text(), PLANTED[fault]
    assert source.count(right) == 1
    (tmp_path / "cublas_lt.cpp").write_text(source.replace(right, wrong))
    faulty = Runner(build.with_file(tmp_path / "cublas_lt.cpp"), tmp_path)
    try:
        with pytest.raises(AssertionError):
            all_ways(faulty)
    finally:
        for worker in faulty.workers:
            worker.kill()


def test_the_bits_do_not_depend_on_the_device_s_order(runner):
    g, x, w, b, u, v, sigma = case(33, 20, 65, F32)
    first = runner.spectral_linear_backward(g, x, w, b, u, v, sigma, orders=ALL_ORDERS)
    again = runner.spectral_linear_backward(g, x, w, b, u, v, sigma)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def headers():
    """Folders with NVIDIA's cublasLt.h, of a CUDA toolkit or of a wheel that is installed."""
    roots = [Path(sysconfig.get_path("purelib")) / "nvidia"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots.append(Path(nvcc).resolve().parents[1])
    return sorted({p.parent for root in roots if root.is_dir() for p in root.rglob("cublasLt.h")})


def test_the_numbers_are_nvidia_s():
    folders = headers()
    if not folders:
        pytest.skip("cublasLt.h is not installed: cublas_lt_abi.h not compared with it")
    source = host_runner.HERE / "cublas_lt_numbers.cpp"
    nvcc = shutil.which("nvcc")
    toolkit = [f"-I{Path(nvcc).resolve().parents[1] / 'include'}"] if nvcc else []
    for folder in folders:
        command = [host_runner.CXX, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", f"-I{folder}"]
        command += [*toolkit, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
