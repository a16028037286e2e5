"""SpectralNormGroup: u, v and sigma of every spectrally normalized weight of a model, in one call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import recomputation
from . import state as states
from ._ops import is_ordinary, is_untraced
from ._sharded import is_distributed, is_remnant
from .book import Book, Values, is_capturing, trace_of
from .layers import SpectralLayer
from .parametrizations import parametrizations_of
from .state import SpectralState


@dataclass(eq=False, slots=True)
class _Member:
    """One weight, and what was last seen of it."""

    name: str
    state: SpectralState
    parameters: dict[str, Any]  # of the module that holds the weight
    key: str
    values: Any = None  # of the last update; its weight, pointer, u and v are what was seen
    u: Tensor | None = None
    v: Tensor | None = None
    strides: tuple[int, ...] = ()

    def is_given(self) -> bool:
        """Whether what the layer has been given holds for the weight as it is."""
        given = self.state._book.given
        if given is None or given.version is None:
            return given is not None
        return not is_remnant(given.weight) and given.version == trace_of(given.weight)

    def is_as_seen(self) -> bool:
        values, state = self.values, self.state
        if values is None:
            return False
        weight, buffers, book = self.parameters.get(self.key), state._buffers, state._book
        return (
            weight is values.weight
            and weight.data_ptr() == values.pointer
            and weight.stride() == self.strides  # w.data = w.data.t()
            and buffers["_u"] is self.u
            and buffers["_v"] is self.v
            and not book.unverified
            and not book.unseeded
        )


class _Call:
    """Members that go into one call of the op, and its arguments."""

    def __init__(self, members: list[_Member]) -> None:
        self.members = members
        self.matrices: list[Tensor] = []
        self.us: list[Tensor] = []
        self.vs: list[Tensor] = []
        self.counts: list[int] = []  # matrices of each member
        self.copied: list[tuple[int, int, _Member]] = []  # matrices that are no views (dim = 1)
        self.shapes: list[torch.Size] = []  # of u and v of each member, in turn
        for x in members:
            weight, state = x.parameters[x.key], x.state
            x.u, x.v = state.place(weight)
            x.values = Values(weight, weight.data_ptr(), x.u, x.v, x.u)
            x.strides = weight.stride()
            parts, us, vs = state.iterated(state.matrices(weight.detach()), x.u, x.v)
            memory = weight.untyped_storage().data_ptr()
            if any(p.untyped_storage().data_ptr() != memory for p in parts):
                self.copied.append((len(self.matrices), len(self.matrices) + len(parts), x))
            self.matrices += parts
            self.us += us
            self.vs += vs
            self.counts.append(state.count)
            self.shapes += [x.u.shape, x.v.shape]
        self.sizes = [s.numel() for s in self.shapes]
        self.one_column = all(len(s) == 1 for s in self.shapes)

    def refresh(self) -> None:
        """What was copied from the weights follows them."""
        for i, j, x in self.copied:
            parts = x.state.matrices(x.parameters[x.key].detach())
            self.matrices[i:j] = [w.mT for w in parts] if x.state.v_first else parts

    def run(self, keep: bool, this_version: bool) -> None:
        """Iterate, and give each member what came of it.

        keep: out of reach of the next iteration. this_version: it holds until the weight changes.
        """
        first = self.members[0].state
        on_cpu = self.matrices[0].is_cpu
        # of before the iteration: a weight that another thread writes to meanwhile is one that this does not hold for
        versions = [trace_of(m.values.weight) if this_version else None for m in self.members]
        sigma = first._iterate(
            self.matrices, self.us, self.vs, first.n_power_iterations, on_cpu, sum(self.counts)
        )
        # not split(), which is Python of torch's before it is this
        sigmas = sigma.split_with_sizes(self.counts)
        pieces: Sequence[Any] = [x for m in self.members for x in (m.u, m.v)]
        if keep:
            # one copy for all, of which each has a view: two small copies for each would be two launches on a GPU
            flat = torch.cat([x if self.one_column else x.reshape(-1) for x in pieces])
            pieces = flat.split_with_sizes(self.sizes)
            if not self.one_column:
                pieces = [x.view(s) for x, s in zip(pieces, self.shapes, strict=True)]
        captured = is_capturing(sigma)
        i = 0
        for m, s, version in zip(self.members, sigmas, versions, strict=True):
            # A new one each time: a forward in another thread may be reading the last.
            old, u, v = m.values, pieces[i], pieces[i + 1]
            view = old.transposed
            m.values = Values(old.weight, old.pointer, u, v, s, None, view, captured, version)
            m.state._book.given = m.values
            i += 2


class _Arrangement(NamedTuple):
    """Calls of the op; in one object, as another thread may arrange others at any time."""

    members: list[_Member] | None  # whom they are for; None where some had no weight there
    calls: list[_Call]
    absent: list[_Member]  # those: sharded, and gathered for their own forward alone


_NOTHING = _Arrangement(None, [], [])


class _Link:
    """What the hooks on a root share: its group. A copy of the root has none, until its first forward."""

    def __init__(self, group: SpectralNormGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Link:
        return _Link()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Link, ()


class _RootHook:
    """Before or after each forward of the root."""

    def __init__(self, link: _Link, after: bool) -> None:
        self.link = link
        self.after = after

    def __call__(self, module: nn.Module, *_: Any) -> None:
        # Compiled, each layer iterates by itself; a DataParallel replica has u and v of its own.
        if recomputation.is_compiling() or "_is_replica" in module.__dict__:
            return
        group = self.link.group
        if self.after:
            if group is not None:
                group._forget()
            return
        if group is None:
            states = [x for x in module.modules() if isinstance(x, SpectralState)]
            if not states or any(x.group is not None for x in states):
                return  # its owner has seen to it
            group = self.link.group = SpectralNormGroup(module, "manual")
            group._of_copy = True
        group._before_forward()


def is_group_hook(hook: Any) -> bool:
    """Whether a hook of a module is a group's."""
    return isinstance(hook, _RootHook)


def _release(books: list[Book]) -> None:
    """What a group that is no more has given holds no more."""
    for book in books:
        if book.group is None or book.group() is None:
            book.group = book.given = None


class _StepHook:
    """After each step of an optimizer."""

    def __init__(self, group: SpectralNormGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _StepHook:
        return _StepHook()  # a copied optimizer steps other weights

    def __reduce__(self) -> tuple[Any, ...]:
        return _StepHook, ()

    def __call__(self, *_: Any) -> None:
        if self.group is not None:
            self.group._after_step()


class SpectralNormGroup:
    r"""Update u, v and sigma of all spectrally normalized weights of a model in one call; the layers use them.

    Without a group every layer runs its own power iteration in every training forward. With one, a single call of
    ``torch.ops.specnorm_ext.power_iteration_`` does it for the whole model (one call for each dtype, device,
    n_power_iterations and eps, where they differ, and one for each convolution with norm="operator"), and the layers
    use its result until the next. It pays with many layers, or small ones, where calls take longer than
    arithmetic; weights of megabytes gain nothing on a CPU, where one that its own layer iterates on is still in the
    cache for the product that follows.

    Args:
        model: holds the weights: our layers (:class:`SpectralLinear`, ...) and those of :func:`spectral_norm`, shared
            ones once. Layers that are added later are found as soon as they have run once.
        when: "forward": before each training forward of ``model`` itself, which is torch's way (layers called past it
            iterate by themselves). "step": after each step of ``optimizer`` (and at once, for the first forward), so
            that several forwards between steps, of a GAN or of accumulated gradients, cost one update. A weight that
            others change (a second optimizer, clipping) gets another at its next forward. "manual": when
            :meth:`update` is called, and not before, whatever changes; until the first call, and once nobody holds the
            group any more, layers iterate by themselves.
        optimizer: for "step", which it implies.

    Only weights whose layers are in training are updated, except by :meth:`update`, which takes all: call it for an
    averaged copy of a model, say, whose u and v follow its weights then. In eval layers compute sigma by themselves,
    once per version of the weight.

    A deep copy of the model is in no group (and a copy of a group of no use): under "forward" it makes one of its
    own, which gives way to another one, otherwise its layers iterate by themselves. Under torch.compile "forward"
    leaves the iteration to the compiled layers; "step" and :meth:`update` run outside of the graph, whose layers use
    what they give. Weights that FSDP has dealt out are updated where a forward of their layer has them gathered: "step"
    and :meth:`update` hold from that next training forward on; "forward" takes in one call what the root has gathered.
    Layers captured in a CUDA graph use an update that was captured with them, and otherwise iterate
    by themselves.

    Raises:
        ValueError: "step" without an optimizer, another ``when``; no spectrally normalized weight in the model; a
            weight that is in a group already.

    Example:
        >>> import torch, specnorm_ext
        >>> model = torch.nn.Sequential(specnorm_ext.SpectralLinear(8, 8), specnorm_ext.SpectralLinear(8, 1))
        >>> group = specnorm_ext.SpectralNormGroup(model)
        >>> y = model(torch.randn(2, 8))  # one call for both layers
        >>> list(group.sigmas())
        ['0.weight', '1.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        when: Literal["forward", "step", "manual"] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        when = when or ("forward" if optimizer is None else "step")
        if when not in ("forward", "step", "manual"):
            raise ValueError(
                f"SpectralNormGroup: expected when to be 'forward', 'step' or 'manual', got {when!r}"
            )
        if (when == "step") != (optimizer is not None):
            raise ValueError(
                f"SpectralNormGroup: expected an optimizer with when='step' and with nothing else, got when={when!r} "
                f"and {'none' if optimizer is None else 'one'}"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"SpectralNormGroup: expected model to be a torch.nn.Module, got {type(model).__name__}"
            )
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(
                f"SpectralNormGroup: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self._root = model
        self.serves = when == "step"  # whether a layer that has been given nothing yet may ask
        # weights may change by other hands: another optimizer, clipping, a copy of averages
        self.follows_versions = when != "manual"
        self._removed = False
        self._of_copy = False  # made by a hook that came with a copied model: gives way to one that is asked for
        self._members: list[_Member] = []
        self._arrangement = _NOTHING  # the last one
        self._handles: list[Any] = []
        self._standalone = -1
        self._books: list[Book] = []
        weakref.finalize(self, _release, self._books).atexit = False
        self._scan()
        if not self._members:
            raise ValueError(
                "SpectralNormGroup: expected a model with spectrally normalized weights, got "
                f"{type(model).__name__} without any; use SpectralLinear and the like, or spectral_norm(), first"
            )
        if when == "forward":
            link = _Link(self)
            self._handles += [
                model.register_forward_pre_hook(_RootHook(link, after=False)),
                # what an update gave holds in this forward: one that goes past the root must not find it
                model.register_forward_hook(_RootHook(link, after=True), always_call=True),
            ]
        elif optimizer is not None:
            hook = _StepHook(self)
            self._handles.append(optimizer.register_step_post_hook(hook))
            hook()

    def __repr__(self) -> str:
        return f"SpectralNormGroup({len(self._members)} weights)"

    def __len__(self) -> int:
        return len(self._members)

    # ---- what users call ----------------------------------------------------------------------------------------

    def update(self) -> None:
        """Iterate on every weight, also of layers in eval, and give the layers in training what comes of it."""
        self._check_in_use("update")
        self.serves = self.serves or not self._handles
        self._renew(self._look(), keep=torch.is_grad_enabled())

    @torch.no_grad()
    def sigmas(self) -> dict[str, Tensor]:
        """|u^T W v| of every weight by name, as u and v stand, in one call; [], or [blocks] for fused weights.

        Sharded weights are gathered one after another, by all processes: all must ask.
        """
        self._check_in_use("sigmas")
        out: dict[str, Tensor] = {}
        members = self._look()
        for call in self._arranged(members):
            state = call.members[0].state
            values = state._form(call.matrices, call.us, call.vs).abs()
            for m, s in zip(call.members, values.split(call.counts), strict=True):
                out[m.name] = s[0] if m.state.blocks is None else s
        for m in members:
            weight = m.parameters.get(m.key)
            if weight is not None and (is_distributed(weight) or is_remnant(weight)):
                out[m.name] = m.state.sigma_of(weight)
        return {m.name: out[m.name] for m in self._members if m.name in out}

    def remove(self) -> None:
        """Leave the model: no hook stays, and each layer iterates by itself again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for m in self._members:
            m.state.leave_group()
        self._members, self._arrangement = [], _NOTHING
        self._removed = True

    def _check_in_use(self, method: str) -> None:
        if self._removed:
            raise RuntimeError(
                f"SpectralNormGroup.{method}: expected a group in use, got one after its remove(), or a copy of one; "
                "make another"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNormGroup:
        return _copied()

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, ()

    # ---- which weights ------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        found: dict[int, _Member] = {}
        for prefix, module in self._root.named_modules():
            name = f"{prefix}." if prefix else ""
            if isinstance(module, SpectralLayer):
                member = _Member(f"{name}weight", module.spectral, module._parameters, "weight")
                found.setdefault(id(member.state), member)
            for key, plist, own in parametrizations_of(module):
                # a weight that other parametrizations compute first is a new tensor each time
                if own is plist[0] and "original" in plist._parameters and own.is_matrix:
                    member = _Member(f"{name}{key}", own, plist._parameters, "original")
                    found.setdefault(id(own), member)
        for m in found.values():
            other = m.state.group
            if other is not None and other is not self and other._of_copy:
                other.remove()
            elif other is not None and other is not self:
                raise ValueError(
                    f"SpectralNormGroup: expected {m.name} in no group yet, got one in another; "
                    "call remove() of that one first"
                )
        mine: weakref.ref[Any] = weakref.ref(self)
        for m in self._members:
            if id(m.state) not in found:
                m.state.leave_group()
        for m in found.values():
            m.state._book.group = mine
            m.state.keeps_sigma = True
        known = {id(m.state): m for m in self._members}
        self._members = [known.get(i, m) for i, m in found.items()]
        self._books[:] = [m.state._book for m in self._members]
        self._standalone = states.standalone_forwards

    def rescan(self) -> None:
        """For what changes layers of the model (convert.py)."""
        if not self._removed:
            self._scan()

    def _look(self) -> list[_Member]:
        """The members, among them those that were added since."""
        if self._standalone != states.standalone_forwards:
            self._scan()
        return self._members

    def _arranged(self, members: list[_Member]) -> list[_Call]:
        """`members` as calls of the op, with u and v that fit their weights."""
        was = self._arrangement
        if members == was.members and all([m.is_as_seen() for m in members]):  # noqa: C419  (quicker)
            for call in was.calls:
                call.refresh()
            return was.calls
        usable: list[_Member] = []
        absent: list[_Member] = []
        for m in members:
            weight = m.parameters.get(m.key)
            there = weight is not None and is_ordinary(weight) and not is_remnant(weight)
            (usable if there else absent).append(m)
        calls: dict[Any, list[_Member]] = {}
        for m in usable:
            weight, state = m.parameters[m.key], m.state
            if state._book.unseeded or state._book.unverified:
                state.place(weight)
                state.verify(state.separate(weight.detach()))
            alone = (
                None if state.operator is None else id(state)
            )  # it iterates through its convolution
            which = (weight.dtype, weight.device, state.n_power_iterations, state.eps, alone)
            calls.setdefault(which, []).append(m)
        arranged = [_Call(x) for x in calls.values()]
        self._arrangement = _Arrangement(None if absent else members, arranged, absent)
        return arranged

    def _run(self, members: list[_Member], keep: bool) -> None:
        if not is_untraced():
            return  # under a transform each layer iterates by itself, on the tensors of the transform
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what is given now may serve training later
                return self._run(members, keep)
        for call in self._arranged(members):
            call.run(keep, self.follows_versions)

    def _renew(self, members: list[_Member], keep: bool) -> None:
        """_run(); who cannot have an update now has none, and asks for one when its weight is there."""
        self._run(members, keep)
        for m in self._arrangement.absent:
            m.state._book.given = None

    def _update_training(self, keep: bool) -> None:
        members = self._look()
        training = [m for m in members if m.state.training]
        if training:
            self._renew(members if len(training) == len(members) else training, keep)

    def serve(self) -> None:
        """For layers that have been given nothing: just loaded, moved or found, or back in training. Or for another
        version of their weight: changed by somebody else than the optimizer that is listened to."""
        self._run([m for m in self._look() if m.state.training and not m.is_given()], True)

    def _after_step(self) -> None:
        for m in self._members:
            if not m.state.training:
                m.state._book.given = None  # of the weight as it was
        self._update_training(keep=True)

    # ---- around the root's forward ------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        if self._removed:
            return  # in favour of one that was asked for
        place = recomputation.here()
        if place is not None and (place.again or place.task != -1):
            return  # activation checkpointing runs the root again: its layers repeat what they had
        self._update_training(keep=torch.is_grad_enabled())

    def _forget(self) -> None:
        for m in self._members:
            m.state._book.given = None


def _copied() -> SpectralNormGroup:
    """What a model that holds its own group has in a copy: in no use, like any group that was removed."""
    group = SpectralNormGroup.__new__(SpectralNormGroup)
    group._members, group._arrangement, group._handles = [], _NOTHING, []
    group._removed = True
    return group


__all__ = ["SpectralNormGroup"]
