"""Threads that share a model, or only the process: what one of them does is no other's fault."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from specnorm_ext import SpectralLinear, SpectralNormGroup, remove, spectral_norm, verification
from specnorm_ext.convolution import conv_weight
from specnorm_ext.matrices import collect_matrices
from specnorm_ext.state import SpectralState


@contextmanager
def busy(work: Callable[[], object], threads: int = 3) -> Iterator[None]:
    """`work` again and again in other threads, which take turns at nearly every line; their errors are this one's."""
    every, stop, errors = sys.getswitchinterval(), threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                work()
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(every)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("when", ["manual", "step"])
def test_forwards_beside_an_update(when):
    """Actors beside a learner: a forward sees the values of one update, and leaves nothing of an old one behind."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(SpectralLinear(16, 16) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.0) if when == "step" else None
    group = SpectralNormGroup(model, when, optimizer=optimizer)
    group.update()
    x = torch.randn(2, 16)

    @torch.no_grad()
    def act() -> None:
        model(x)

    for step in range(30):
        with busy(act):
            for _ in range(10):
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.25 if step % 2 else 0.8)
                group.update()
        for layer in model:
            given = layer.spectral._book.given
            if given.inverse is not None:
                assert given.inverse == 1 / given.sigma.item()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_while_another_thread_compiles(use_reentrant):
    """torch.compiler.is_compiling() is one flag for the process."""
    inside, done = threading.Event(), threading.Event()

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        inside.set()
        done.wait(60)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    other = threading.Thread(target=compiled, args=(torch.ones(2),))
    other.start()
    try:
        assert inside.wait(60)
        layers = nn.Sequential(SpectralLinear(4, 4), SpectralLinear(4, 4))
        SpectralNormGroup(layers)
        before = layers[0].spectral._u.clone()
        x = torch.randn(2, 4, requires_grad=True)
        checkpoint(layers, x, use_reentrant=use_reentrant).sum().backward()
        assert x.grad is not None
        # by the group, in one call: that alone iterates on what it has copied from
        assert not torch.equal(layers[0].spectral._u, before)
    finally:
        done.set()
        other.join()


def test_a_group_updates_while_another_thread_compiles(monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    model = nn.Sequential(SpectralLinear(4, 4), SpectralLinear(4, 4))
    group = SpectralNormGroup(model)
    updates = []
    monkeypatch.setattr(group, "_update_training", lambda keep: updates.append(keep))
    model(torch.randn(2, 4))
    assert updates == [True]


def test_looking_at_weights_leaves_the_mode_of_their_parametrizations_to_others():
    """Two who look at once: the second found eval, which the first had switched to, and left it so."""
    model = nn.Sequential(*(spectral_norm(nn.Conv1d(4, 4, 1)) for _ in range(2)))
    modes = []

    class Look(nn.Module):
        def forward(self, x):
            modes.append([m.training for m in model.modules()])
            return x

    for layer in model:
        parametrize.register_parametrization(layer, "weight", Look())
    modes.clear()
    collect_matrices(model)
    conv_weight(model[0])
    remove(copy.deepcopy(model))  # whose parametrizations are copies, and the model theirs
    assert len(modes) == 5
    assert all(all(x) for x in modes)


LAYERS = {
    "layer": lambda: SpectralLinear(8, 8),
    "parametrization": lambda: spectral_norm(nn.Linear(8, 8)),
}


def weight_u_v(layer: nn.Module) -> list[torch.Tensor]:
    return [x for name, x in layer.state_dict().items() if "bias" not in name]


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_loaded_while_u_and_v_are_looked_at_stays(kind, monkeypatch):
    """A forward beside load_state_dict sees the new weight with the old u and v. It may not overwrite the new ones."""
    server, other = LAYERS[kind]().eval(), LAYERS[kind]().eval()
    x = torch.randn(2, 8)
    want, loaded = other(x), weight_u_v(other)
    weight, *state = weight_u_v(server)
    with torch.no_grad():
        weight.copy_(loaded[0])
    iterate, calls = SpectralState._iterate, []

    def interrupted(self, parts, *args):
        calls.append(len(calls))
        if len(calls) == 2:  # the old ones were found wanting; the other thread goes on
            for old, new in zip(state, loaded[1:], strict=True):
                old.copy_(new)
        return iterate(self, parts, *args)

    monkeypatch.setattr(SpectralState, "_iterate", interrupted)
    torch.testing.assert_close(server(x), want + (server.bias - other.bias))
    assert len(calls) > 2
    for got, new in zip(weight_u_v(server), loaded, strict=True):
        assert torch.equal(got, new)


def test_a_weight_that_changes_while_u_and_v_are_looked_at_is_looked_at_again(monkeypatch):
    layer, x = SpectralLinear(8, 8).eval(), torch.randn(2, 8)
    first, second = torch.randn(8, 8), torch.randn(8, 8)
    verify = SpectralState.verify

    def interrupted(self, parts):
        verify(self, parts)
        if torch.equal(layer.weight, first):
            layer.weight.copy_(second)  # by another thread

    with torch.no_grad():
        layer.weight.copy_(first)
        monkeypatch.setattr(SpectralState, "verify", interrupted)
        for _ in range(2):
            with pytest.warns(UserWarning, match="do not belong"):
                layer(x)
    sigma = torch.linalg.matrix_norm(second, 2)
    assert 0.75 * sigma < layer.spectral._book.kept.sigma.item() < 1.01 * sigma


def test_a_lock_that_is_never_free_holds_nobody_up():
    """As in a process that was forked while another thread had it."""
    layer, other = SpectralLinear(8, 8).eval(), SpectralLinear(8, 8)
    with verification._lock:
        layer.load_state_dict(other.state_dict())
    for got, new in zip(weight_u_v(layer), weight_u_v(other), strict=True):
        assert torch.equal(got, new)


def test_threads_on_one_layer_in_eval():
    """Whoever is first keeps sigma for all; nobody sees half of it, or that of the weight before."""
    torch.manual_seed(0)
    layer = SpectralLinear(32, 32).eval()
    x, wrong = torch.randn(4, 32), []
    every = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for step in range(20):
            with torch.no_grad():
                layer.weight.mul_(1.0 + step).add_(0.01)
            expected = copy.deepcopy(layer)(x).detach()

            def run(expected=expected):
                try:
                    with torch.no_grad():
                        for _ in range(10):
                            torch.testing.assert_close(layer(x), expected)
                except Exception as error:
                    wrong.append(repr(error))

            workers = [threading.Thread(target=run) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        sys.setswitchinterval(every)
    assert not wrong, wrong[0]
