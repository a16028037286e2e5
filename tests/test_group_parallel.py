"""SpectralNormGroup where a model runs in several places: DataParallel's replicas, DDP's processes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from specnorm_ext import SpectralConv2d, SpectralLinear, SpectralNormGroup, spectral_norm


def critic(n_vectors: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        SpectralConv2d(2, 4, 3, n_vectors=n_vectors, learnable_scale=True),
        nn.Tanh(),
        nn.Flatten(),
        spectral_norm(nn.Linear(64, 8)),
        SpectralLinear(8, 1, bound=0.9),
    )


def data(seed: int) -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def replica(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them, which asks for a GPU: parameters are attributes, buffers copies."""
    modules: list[Any] = list(model.modules())
    index = {m: i for i, m in enumerate(modules)}
    copies: list[Any] = []
    for m in modules:
        c = m._replicate_for_data_parallel()
        c._former_parameters = {}
        copies.append(c)
    new = {p: p * 1.0 for p in model.parameters()}
    for m, c in zip(modules, copies, strict=True):
        for key, child in m._modules.items():
            c._modules[key] = None if child is None else copies[index[child]]
        for key, p in m._parameters.items():
            if p is None:
                c._parameters[key] = None
            else:
                setattr(c, key, new[p])
                c._former_parameters[key] = new[p]
        for key, b in m._buffers.items():
            if b is None:
                c._buffers[key] = None
            else:
                setattr(c, key, b.clone())
    return copies[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_replicas(grouped):
    """Each iterates on its own u and v, and gradients reach the model's parameters through all of them."""
    model = critic(n_vectors=2)
    alone = copy.deepcopy(model)
    if grouped:
        SpectralNormGroup(model)
    replicas = [replica(model) for _ in range(2)]
    out: list[Any] = [None, None]

    def run(i: int) -> None:
        out[i] = replicas[i](data(i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cat(out).square().sum().backward()
    twins = [copy.deepcopy(alone) for _ in range(2)]
    for i, twin in enumerate(twins):
        y = twin(data(i))
        assert torch.equal(y, out[i])
        y.square().sum().backward()
    for name, p in model.named_parameters():
        expected = sum(t.get_parameter(name).grad for t in twins)
        torch.testing.assert_close(p.grad, expected)
    for (
        name,
        b,
    ) in model.named_buffers():  # those of the model are nobody's to write but the first device's
        assert torch.equal(b, alone.get_buffer(name))


def _rank(rank: int, file: str, when: str, out: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = critic()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    SpectralNormGroup(model, when, optimizer=optimizer if when == "step" else None)  # type: ignore[arg-type]
    for i in range(3):
        optimizer.zero_grad()
        for half in range(2):  # gradients accumulated over two forwards
            x = data(2 * i + half)[2 * rank : 2 * rank + 2]
            (wrapped(x).square().sum() / 2).backward()
        optimizer.step()
    out[rank] = {k: x.numpy() for k, x in model.state_dict().items()}
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["forward", "step"])
def test_distributed_data_parallel(when, tmp_path):
    """Two processes end where one does that has all the data, with the same u and v in both."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        out = manager.dict()
        multiprocessing.spawn(_rank, (str(tmp_path / "store"), when, out), nprocs=2)
        ranks = [{k: torch.from_numpy(x) for k, x in out[r].items()} for r in range(2)]
    model = critic()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    SpectralNormGroup(model, when, optimizer=optimizer if when == "step" else None)
    for i in range(3):
        optimizer.zero_grad()
        for half in range(2):
            (model(data(2 * i + half)).square().sum() / 4).backward()
        optimizer.step()
    for key, x in model.state_dict().items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        torch.testing.assert_close(ranks[0][key], x, rtol=1e-4, atol=1e-5)
