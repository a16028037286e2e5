"""Weights of which each process holds a part (FSDP, tensor parallelism), and what else processes do with a model."""

from __future__ import annotations

import copy
import io
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils.checkpoint import checkpoint

import specnorm_ext
from specnorm_ext import (
    SpectralConv2d,
    SpectralEmbedding,
    SpectralLinear,
    SpectralNormGroup,
    spectral_norm,
)
from specnorm_ext.penalties import (
    ProjectionHook,
    SpectralNormPenalty,
    clip_frobenius_,
    project_spectral_norm_,
)

CHECKS: dict[str, Callable[[int, str], None]] = {}


def check(f: Callable[[int, str], None]) -> Callable[[int, str], None]:
    CHECKS[f.__name__] = f
    return f


class Net(nn.Module):
    """One of each kind; the drop-in's weight, of 2000 entries, is too large to be looked at whole."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = SpectralEmbedding(7, 16)
        self.conv = SpectralConv2d(1, 5, 3, n_vectors=2, learnable_scale=False)
        self.dropped_in = spectral_norm(nn.Linear(20, 100))
        self.linear = SpectralLinear(100, 6, bound=0.9)
        self.head = SpectralLinear(6, 1, bias=False)
        self.recomputes: bool | None = None

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(1)
        return torch.tanh(self.linear(torch.tanh(self.dropped_in(x))))

    def forward(self, i: Tensor) -> Tensor:
        x = self.embedding(i).view(-1, 1, 4, 4)
        if self.recomputes is None:
            return self.head(self.middle(x))
        return self.head(checkpoint(self.middle, x, use_reentrant=self.recomputes))


def data(seed: int) -> Tensor:
    return torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(seed))


def own(x: Tensor, rank: int) -> Tensor:
    return x[2 * rank : 2 * rank + 2]


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for child in list(model.children())[:-1]:
        fully_shard(child, **options)
    return fully_shard(model, **options)


def train(
    model: Any, when: str | None, part: Callable[[Tensor], Tensor], root: Any = None, accumulate=2
) -> Tensor:
    """Three steps of so many forwards, and a forward more, by which every u and v is of the last weight: the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    group: Any = None
    if when is not None:
        by = optimizer if when == "step" else None
        group = SpectralNormGroup(root or model, when, optimizer=by)  # type: ignore[arg-type]
    losses = []
    for i in range(4):
        optimizer.zero_grad()
        if when == "manual":
            group.update()
        for k in range(accumulate if i < 3 else 1):
            loss = (model(part(data(2 * i + k))) + 1).square().mean()
            losses.append(loss.detach())
            if i < 3:
                (loss / accumulate).backward()
        if i < 3:
            optimizer.step()
    return torch.stack(losses)


def mean_of_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / 2


def same_state(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, x in found.items():
        y = expected[key]
        x = whole(x)
        if key.endswith(("._u", "._v")) and y.dim() == 2:
            # the signs of several columns follow the rounding of an eigenvector
            x, y = x * (x * y).sum(0).sign(), y
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def same_on_ranks(tensors: dict[str, Tensor]) -> None:
    each: list[Any] = [None, None]
    dist.all_gather_object(each, {k: x.clone() for k, x in tensors.items()})
    for key, x in each[0].items():
        assert torch.equal(x, each[1][key]), key


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {k: x for k, x in model.named_buffers() if k.endswith(("._u", "._v"))}


def refused(kind: type[Exception], words: str, f: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=words):
        f()


# ---- fully_shard --------------------------------------------------------------------------------------------------


@check
def fully_sharded_training_is_that_of_one_process(rank: int, folder: str) -> None:
    for when in (None, "forward", "step", "manual"):
        one = Net()
        expected = train(one, when, lambda x: x)
        for reshard in (True, False):
            model = shard(Net(), reshard_after_forward=reshard)
            losses = mean_of_ranks(train(model, when, partial(own, rank=rank)))
            torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
            same_state(model.state_dict(), one.state_dict())
            same_on_ranks(buffers(model))


@check
def a_root_alone_in_a_group_is_one_call(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    one, model = Net(), fully_shard(Net())
    group: Any = SpectralNormGroup(model)
    model(own(data(0), rank))
    assert [len(call.members) for call in group._arrangement.calls] == [5]
    one(data(0))
    same_state(model.state_dict(), one.state_dict())


@check
def mixed_precision(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for when in (None, "step"):
        model, one = shard(Net(), mp_policy=policy), Net().bfloat16()
        x = own(data(0), rank)
        if when:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            SpectralNormGroup(model, optimizer=optimizer)
        y = model(x)
        assert torch.equal(y, one(x))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        for key, b in buffers(model).items():
            assert b.dtype == torch.float32
            assert torch.equal(b, one.get_buffer(key))
        assert model.linear.weight.grad.dtype == torch.float32
        assert model.linear.sigma.dtype == torch.float32


@check
def activation_checkpointing(rank: int, folder: str) -> None:
    for reentrant in (True, False):
        for when in (None, "step"):
            models: list[Any] = [shard(Net(), reshard_after_forward=True) for _ in range(2)]
            models[1].recomputes = reentrant
            losses = [train(m, when, partial(own, rank=rank)) for m in models]
            assert torch.equal(*losses)
            for (key, x), y in zip(
                models[0].state_dict().items(), models[1].state_dict().values(), strict=True
            ):
                assert torch.equal(whole(x), whole(y)), key


@check
def checkpoints(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = shard(Net())
    train(model, None, partial(own, rank=rank))
    model.eval()
    y = model(data(0))
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=False)
    )
    one = Net(1).eval()
    one.load_state_dict(full)
    torch.testing.assert_close(one(data(0)), y)
    parts = get_model_state_dict(model)
    dcp.save(parts, checkpoint_id=f"{folder}/checkpoint")
    for assign in (False, True):
        other = shard(Net(1)).eval()
        other(data(0))  # which keeps a sigma of the weights before
        loaded = get_model_state_dict(other)
        dcp.load(loaded, checkpoint_id=f"{folder}/checkpoint")
        if assign:
            other.load_state_dict(loaded, assign=True)
        else:
            set_model_state_dict(other, loaded)
        torch.testing.assert_close(other(data(0)), y)
        same_state(other.state_dict(), full)


@check
def eval_sees_every_step(rank: int, folder: str) -> None:
    """Without train() and eval() in between: fully_shard() leaves no version on what it gathers."""
    one, model = Net().eval(), shard(Net()).eval()
    for m in (one, model):
        optimizer = torch.optim.SGD(m.parameters(), 0.02)
        for i in range(2):
            with torch.no_grad():
                m(data(i))
            m(data(i)).sum().backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(data(3)), one(data(3)))


@check
def made_on_meta(rank: int, folder: str) -> None:
    with torch.device("meta"):
        model = shard(Net())
    model.to_empty(device="cpu")
    torch.manual_seed(rank)  # as for the data of each
    for m in model.modules():
        if hasattr(m, "reset_parameters") and not hasattr(m, "parametrizations"):
            m.reset_parameters()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model(data(0))
    found = buffers(model)
    assert len(found) == 10
    same_on_ranks(found)
    for layer in (model.embedding, model.linear):
        exact = torch.linalg.matrix_norm(whole(layer.weight), 2)
        assert 0.85 * exact < layer.sigma <= exact * (1 + 1e-5)


@check
def norms_between_steps_are_those_of_the_whole(rank: int, folder: str) -> None:
    one, model = Net(), shard(Net())
    for name in ("embedding", "conv", "linear", "head"):
        ours, exact = getattr(model, name), getattr(one, name)
        assert torch.equal(ours.sigma, exact.sigma)
        assert torch.equal(ours.normalized_weight, exact.normalized_weight)
    if rank == 0:  # waits for nobody
        assert "SpectralLinear(in_features=100, out_features=6" in repr(model)
    groups = [SpectralNormGroup(m, "manual") for m in (one, model)]
    expected = groups[0].sigmas()
    assert groups[1].sigmas() == expected
    assert len(expected) == 5
    for source in (lambda m: m, nn.Module.state_dict):
        norms = [specnorm_ext.spectral_norms(source(m)) for m in (one, model)]
        assert norms[0] == norms[1]
    weights = [m.linear.weight for m in (one, model)]
    found = [specnorm_ext.estimate(w, certified=True) for w in weights]
    assert found[0] == found[1]
    found[1].value.backward()
    found[0].value.backward()
    torch.testing.assert_close(whole(weights[1].grad), weights[0].grad)
    kernels = [m.conv.weight for m in (one, model)]
    assert specnorm_ext.conv_norm(kernels[1], 4) == specnorm_ext.conv_norm(kernels[0], 4)
    assert specnorm_ext.spectral_norms([weights[1]]) == specnorm_ext.spectral_norms([weights[0]])


@check
def what_a_part_cannot_give_is_refused(rank: int, folder: str) -> None:
    model = shard(Net())
    before = {k: x.clone() for k, x in buffers(model).items()}
    part = model.linear.weight
    u, v = torch.ones(6), torch.ones(100)
    one = torch.ones(())
    f = specnorm_ext.functional
    for call, op in (
        (lambda: f.power_iteration(part, u, v), "power_iteration_"),
        (lambda: f.sigma(part, u, v), "sigma"),
        (lambda: f.normalize(part, u, v, one), "normalize"),
        (lambda: f.spectral_linear(torch.ones(2, 100), part, None, u, v, one), "spectral_linear"),
    ):
        refused(TypeError, f"^{op}: expected plain tensors, got a DTensor.*full_tensor", call)
    words = "expected the whole weight, got a DTensor in parts"
    for training in (True, False):
        model.train(training)
        refused(TypeError, words, lambda: model.dropped_in.weight)
        refused(TypeError, words, lambda: model.head(torch.ones(1, 6)))  # past the root
    for op in (specnorm_ext.remove, specnorm_ext.convert):
        refused(ValueError, "expected a model that is not sharded", partial(op, model))
    plain = shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    refused(ValueError, "not sharded", lambda: specnorm_ext.convert(plain, plain=True))
    refused(TypeError, "expected a weight that is not sharded", lambda: spectral_norm(plain[0]))
    for key, x in buffers(model).items():
        assert torch.equal(x, before[key]), key


# ---- penalties and projections on DTensors ------------------------------------------------------------------------


def plain_net() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@check
def penalties(rank: int, folder: str) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    for first in (True, False):  # before the forward, and after it, while the root is gathered
        one, model = plain_net(), shard(plain_net())
        torch.manual_seed(rank)
        pairs = []
        for m, part in ((one, x), (model, own(x, rank))):
            penalty = SpectralNormPenalty(m, 0.1, n_power_iterations=30)
            term = penalty() if first else None
            loss = m(part).square().mean()
            (loss + (penalty() if term is None else term)).backward()
            pairs.append((m, penalty))
        same_on_ranks(dict(pairs[1][1].state_dict()))
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-3, atol=1e-4)


@check
def projections(rank: int, folder: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = [m[0].to(dtype).weight for m in (plain_net(), shard(plain_net().to(dtype)))]
        sigma = [project_spectral_norm_(w, 1.0) for w in weights]
        assert torch.equal(*sigma)
        assert torch.equal(weights[0], whole(weights[1]))
        torch.manual_seed(rank)  # and so from different u and v
        u, v = specnorm_ext.functional.init_uv(weights[0])
        before = whole(weights[1]).clone()
        project_spectral_norm_(weights[1], 0.01, u, v)
        factor = whole(weights[1]) / before
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(factor, factor[:1, :1].expand_as(factor), rtol=tolerance, atol=0)
        norm = [clip_frobenius_(w, 0.005) for w in weights]
        assert type(norm[1]) is Tensor
        torch.testing.assert_close(
            torch.linalg.vector_norm(whole(weights[1]).double()).item(), 0.005, rtol=1e-2, atol=0
        )
    for kind in ("spectral", "frobenius", "clip"):
        one, model = plain_net(), shard(plain_net())
        for m in (one, model):
            torch.manual_seed(0)  # of u and v
            optimizer = torch.optim.SGD(m.parameters(), 0.1)
            ProjectionHook(m, optimizer, 0.5, kind)  # type: ignore[arg-type]
            for _ in range(2):
                optimizer.zero_grad()
                m(torch.ones(2, 9)).sum().backward()
                optimizer.step()
        same_state(model.state_dict(), one.state_dict())


# ---- FullyShardedDataParallel, tensor parallelism ----------------------------------------------------------------


@check
def fully_sharded_data_parallel(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kinds = {SpectralLinear, SpectralConv2d, SpectralEmbedding, nn.Linear}
    for when in (None, "forward", "step", "manual"):
        one = Net()
        expected = train(one, when, lambda x: x, accumulate=1)
        for originals in (True, False):
            for policy in (None, ModuleWrapPolicy(kinds)):
                inner: Any = Net()
                model = Fsdp(
                    inner,
                    use_orig_params=originals,
                    auto_wrap_policy=policy,
                    device_id=torch.device("cpu"),
                )
                part = partial(own, rank=rank)
                losses = mean_of_ranks(train(model, when, part, inner, accumulate=1))
                torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
                same_on_ranks(buffers(model))
                if policy is not None:
                    continue
                model(part(data(0))).sum().backward()  # until then the root stays gathered
                words = "expected the whole weight, got .*summon_full_params"
                for ask in (
                    partial(getattr, inner.linear, "sigma"),
                    partial(getattr, inner.linear, "normalized_weight"),
                    partial(getattr, inner.dropped_in, "weight"),
                    partial(specnorm_ext.spectral_norms, model),
                ):
                    refused(RuntimeError, words, ask)
                assert "SpectralLinear(in_features=100, out_features=6" in repr(inner)
                for op in (specnorm_ext.remove, specnorm_ext.convert):
                    for m in (model, inner):
                        refused(ValueError, "expected a model that is not sharded", partial(op, m))
                with Fsdp.summon_full_params(model):
                    u, v = inner.linear.spectral._u, inner.linear.spectral._v
                    exact = u @ inner.linear.weight @ v
                    torch.testing.assert_close(inner.linear.sigma, exact.detach())


@check
def tensor_parallelism_is_refused(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    words = "expected the whole weight, got a DTensor in parts .*leave this one out of its plan"
    for style in (ColwiseParallel, RowwiseParallel):
        for layer in (SpectralLinear(8, 6), SpectralEmbedding(8, 6)):
            model = nn.Sequential(layer)
            y = layer.eval()(torch.ones(1, 8) if isinstance(layer, nn.Linear) else torch.arange(2))
            plan = {"0": style()}
            refused(TypeError, words, lambda m=model, p=plan: parallelize_module(m, mesh, p))
            assert type(layer.weight) is nn.Parameter
            x = torch.ones(1, 8) if isinstance(layer, nn.Linear) else torch.arange(2)
            assert torch.equal(layer(x), y)
        # the drop-in's is torch's own refusal
        dropped_in = nn.Sequential(spectral_norm(nn.Linear(8, 6)))
        with pytest.raises((KeyError, RuntimeError)):
            parallelize_module(dropped_in, mesh, {"0": style()})
    layer = SpectralLinear(8, 6)
    layer._parameters["weight"] = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))
    for training in (True, False):
        for grad in (True, False):
            layer.train(training)
            with torch.set_grad_enabled(grad):
                refused(TypeError, words, lambda: layer(torch.ones(2, 8)))
    # beside plain layers that are
    model = nn.Sequential(nn.Linear(8, 6), SpectralLinear(6, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    one = copy.deepcopy(model)
    parallelize_module(model, mesh, {"2": ColwiseParallel(), "3": RowwiseParallel()})
    x = torch.ones(2, 8)
    torch.testing.assert_close(model(x), one(x))
    norms = [specnorm_ext.spectral_norms(m) for m in (model, one)]
    assert norms[0] == norms[1]


# ---- DistributedDataParallel -------------------------------------------------------------------------------------


@check
def options_of_distributed_data_parallel(rank: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrap = nn.parallel.DistributedDataParallel
    for when in (None, "forward", "step"):
        one = Net()
        expected = train(one, when, lambda x: x, accumulate=1)
        for options in (
            {"static_graph": True},
            {"find_unused_parameters": True},
            {"gradient_as_bucket_view": True, "broadcast_buffers": False},
        ):
            model = Net()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers`")
                wrapped = wrap(model, **options)
            losses = train(wrapped, when, partial(own, rank=rank), model, accumulate=1)
            torch.testing.assert_close(mean_of_ranks(losses), expected, rtol=1e-4, atol=1e-5)
            same_on_ranks(model.state_dict())
    model = Net()
    wrapped = wrap(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.5)
    SpectralNormGroup(model, optimizer=optimizer)
    for i in range(3):
        optimizer.zero_grad()
        (wrapped(own(data(2 * i), rank)) + 1).square().mean().backward()
        optimizer.step()
    wrapped(own(data(6), rank))
    same_on_ranks(model.state_dict())
    same_state(model.state_dict(), one.state_dict())
    beside = nn.Sequential(SpectralConv2d(1, 2, 3), nn.BatchNorm2d(2), SpectralConv2d(2, 2, 3))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(beside)
    assert synced[0] is beside[0]
    assert isinstance(synced[1], nn.SyncBatchNorm)


# ---- running them -------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="specnorm_ext")
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, f in CHECKS.items():
        try:
            f(rank, folder)
        except BaseException:
            Path(folder, f"{name}.{rank}.failed").write_text(traceback.format_exc())
            raise
        dist.barrier()
        if rank == 0:
            Path(folder, f"{name}.passed").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes for all checks, one after another; the first that fails ends them."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("sharded")
    with suppress(multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException):
        multiprocessing.spawn(_rank, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name, folder):
    if not (folder / f"{name}.passed").exists():
        failed = [x.read_text() for x in folder.glob("*.failed")]
        pytest.fail("\n".join(failed) or "a process died, in this check or in one before it")


# ---- memory that processes share ----------------------------------------------------------------------------------


def shareable() -> nn.Sequential:
    """Without the drop-in, as torch pickles no parametrized modules."""
    torch.manual_seed(0)
    return nn.Sequential(SpectralEmbedding(40, 30), SpectralLinear(30, 40), SpectralLinear(40, 1))


def _write(models: list[nn.Module]) -> None:
    torch.set_num_threads(1)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for i in range(3):
            optimizer.zero_grad()
            model.train()(torch.arange(i, i + 30)).square().sum().backward()
            optimizer.step()


def test_shared_memory():
    """An actor in eval, whose weights, u and v another process trains (Hogwild), goes by the weights as they are."""
    models = [shareable(), shareable()]
    SpectralNormGroup(models[1])
    x = torch.arange(40)
    with torch.no_grad():
        before = [m.share_memory().eval()(x) for m in models]
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(models,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        for model, y in zip(models, before, strict=True):
            assert all(m.spectral._book.kept is not None for m in model)
            after = model(x)
            assert not torch.equal(after, y)
            assert torch.equal(after, copy.deepcopy(model)(x))


@pytest.mark.parametrize("when", [None, "forward", "step", "manual"])
def test_saved_whole(when):
    model = shareable()
    if when is not None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1) if when == "step" else None
        group = SpectralNormGroup(model, when, optimizer=optimizer)
        group.update()
    x = torch.arange(40)
    model(x).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    y = copy.deepcopy(model).eval()(x)
    for other in (loaded, averaged):
        assert torch.equal(other.eval()(x), y)
        other.train()(x).sum().backward()
    assert torch.equal(copy.deepcopy(model).eval()(x), y)  # u and v of the others are theirs
