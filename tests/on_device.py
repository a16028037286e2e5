"""What the tests of the CUDA kernels on a real device share: skipping where there is none, strategies, large matrices.

With SPECNORM_EXT_TEST_CUDA_ON_CPU=1 the tests that make no CUDA call run on CPU tensors instead, which tests the tests.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from helpers import DTYPES, F64, LAYOUTS, state_dtype, tolerance

import specnorm_ext

ops = torch.ops.specnorm_ext
ON_CPU = bool(os.environ.get("SPECNORM_EXT_TEST_CUDA_ON_CPU"))
DEVICE = "cpu" if ON_CPU else "cuda"
VARIABLE = "SPECNORM_EXT_CUDA_STRATEGY"
STRATEGIES = ("auto",) if ON_CPU else ("auto", "block", "cluster", "resident", "stream")


def skip_without_kernels() -> None:
    """Called while a module is imported: skips all of it where there is nothing to test."""
    if ON_CPU:
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False", allow_module_level=True)
    if not specnorm_ext.build_info()["cuda_kernels"]:
        pytest.skip(
            "this build has no CUDA kernels: install again with nvcc on the PATH",
            allow_module_level=True,
        )


# Warnings of torch on a device that nobody here has seen are not failures; ours are: one of them says that an op has
# left its kernels for the path of reference.py.
marks = [pytest.mark.filterwarnings("default", "error:specnorm_ext")]
gpu = pytest.mark.skipif(ON_CPU, reason="needs a GPU")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def context_is_alive(request):
    """A kernel that faults takes the context with it: stop at the test that did it, not at the hundred after it."""
    yield
    if not ON_CPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{request.node.nodeid} lost the CUDA context: {error}", returncode=1)


@pytest.fixture
def strategy(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def on_device(x):
    """x with its strides and its offset, the whole of its storage with it: NaN around a view stay around it."""
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return flat.to(DEVICE, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def power(w, u, v, n_iterations=1):
    return ops.power_iteration_([w], [u], [v], n_iterations)[0]


def needs_memory(count):
    """Skips a test of `count` bytes where the device has not as many free."""
    if ON_CPU:
        pytest.skip("needs a GPU")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")


def gaussian(m, n, dtype):
    """On the device, and a bound of its norm: sqrt(m) + sqrt(n) but for a probability of e^-8 (Davidson, Szarek)."""
    generator = torch.Generator(DEVICE).manual_seed(m + n)
    w = torch.empty(m, n, dtype=dtype, device=DEVICE).normal_(generator=generator)
    return w, math.sqrt(m) + math.sqrt(n) + 4


def check_large_step(w, norm, n_iterations=1):
    """What check_step checks of one column, on the device and without an SVD, a thousand rows at a time."""
    m, n = w.shape
    generator = torch.Generator(DEVICE).manual_seed(1)
    state = state_dtype(w.dtype)
    v = torch.randn(n, dtype=state, device=DEVICE, generator=generator)
    v /= torch.linalg.vector_norm(v)
    u = torch.full((m,), torch.nan, dtype=state, device=DEVICE)
    x = v.to(F64, copy=True)
    sigma = power(w, u, v, n_iterations).double()
    product = tolerance("product", w.dtype, max(m, n))
    of_v = tolerance("jitter", w.dtype)
    chunks = range(0, m, max(1, (1 << 27) // n))
    for _ in range(n_iterations):
        t = torch.cat([w[i : i + chunks.step].double() @ x for i in chunks])
        length = torch.linalg.vector_norm(t)
        of_u = (product + of_v) * norm / length.item()
        exact_u = t / length
        z = sum(w[i : i + chunks.step].double().mT @ exact_u[i : i + chunks.step] for i in chunks)
        exact_sigma = torch.linalg.vector_norm(z)
        of_v = (of_u + product) * norm / exact_sigma.item()
        x = z / exact_sigma
    assert torch.linalg.vector_norm(u.double() - exact_u) <= of_u
    assert torch.linalg.vector_norm(v.double() - x) <= of_v
    assert abs(sigma - exact_sigma) <= (of_u + product) * norm
