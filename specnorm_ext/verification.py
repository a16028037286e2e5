"""Whether u and v belong to a weight, and what is done where they do not: after loading, after it was replaced."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .recomputation import version_of

if TYPE_CHECKING:
    from .state import SpectralState

WARM_UP_ITERATIONS = 15  # torch's, at registration

# u and v of a healthy layer give at least 0.84 of what one more iteration gives (one iteration from a random
# start, square Gaussian; anything longer is closer to 1). u and v of other weights give next to nothing.
STALE_BELOW = 0.75


# Looked at once more, where another thread writes to the weight or to u and v meanwhile (loads them, say); then enough.
_LOOKS = 8

_lock = threading.Lock()


@contextmanager
def writing() -> Iterator[None]:
    """Of two that overwrite u and v, a load and a forward beside it, one after the other. Nobody waits for long: in a
    process forked meanwhile the lock would never be free."""
    held = _lock.acquire(timeout=1)
    try:
        yield
    finally:
        if held:
            _lock.release()


def draw(
    state: SpectralState,
    which: Sequence[int],
    parts: list[Tensor],
    generator: torch.Generator | None = None,
) -> None:
    """New u and v for these parts of the weight, iterated on as torch does at registration."""
    _draw(state, which, parts, state._us(state._u), state._vs(state._v), generator)


def _draw(
    state: SpectralState,
    which: Sequence[int],
    parts: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    generator: torch.Generator | None,
) -> None:
    for i in which:
        for x in (us[i], vs[i]):
            # drawn contiguous, as torch draws, whatever x's strides
            fresh = torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_(
                0, 1, generator=generator
            )
            x.copy_(nn.functional.normalize(fresh, dim=0))
    _warm_up(state, which, parts, us, vs)


def _warm_up(
    state: SpectralState,
    which: Sequence[int],
    parts: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
) -> None:
    chosen = [[xs[i] for i in which] for xs in (parts, us, vs)]
    state._iterate(chosen[0], chosen[1], chosen[2], WARM_UP_ITERATIONS)


def same_everywhere(state: SpectralState) -> torch.Generator:
    """For what is drawn in a forward: the processes of FSDP, whose seeds may differ, must have the same norms."""
    return torch.Generator(state._u.device).manual_seed(0)


@torch.no_grad()
def verify(state: SpectralState, parts: list[Tensor]) -> None:
    """Make u and v fit this weight before they are used; warn once of what had to be mended."""
    if state._book.unseeded:
        state._book.unseeded = state._book.unverified = False
        draw(state, range(len(parts)), parts, same_everywhere(state))
        return
    if any(0 in x.shape for x in parts):
        state._book.unverified = False
        return
    for left in reversed(range(_LOOKS)):
        state._book.unverified = False
        u, v = state._u, state._v
        looked_at = (u, v, *parts)
        versions = [version_of(x) for x in looked_at]
        # Mended as copies: what another thread loads meanwhile is not for this one to overwrite.
        mended = u.clone(), v.clone()
        words = _mend(state, parts, *mended)
        if not words:
            return
        with writing():
            same = u is state._u and v is state._v
            if left and not (same and versions == [version_of(x) for x in looked_at]):
                continue
            u.copy_(mended[0])
            v.copy_(mended[1])
        break
    for text in words:
        if text:
            warnings.warn(f"specnorm_ext: {text}", stacklevel=3)


def _mend(state: SpectralState, parts: list[Tensor], u: Tensor, v: Tensor) -> list[str]:
    """Make these copies of u and v fit; what was wrong with them, "" for their last bits. Empty if nothing was."""
    us, vs = state._us(u), state._vs(v)
    pairs = list(zip(us, vs, strict=True))
    # Divided by their largest entries first: their squares may be past the largest or the least float.
    tops = [x.abs().amax(0) for pair in pairs for x in pair]
    units = [
        torch.linalg.vector_norm(x / top, dim=0)
        for x, top in zip((x for pair in pairs for x in pair), tops, strict=True)
    ]
    per = 2 * (1 if u.dim() == 1 else u.shape[1])  # lengths of one pair
    factors = zip(
        *(torch.cat([y.reshape(-1) for y in z]).tolist() for z in (tops, units)), strict=True
    )
    lengths = [top * unit for top, unit in factors]
    bad = [
        i
        for i in range(len(parts))
        if not all(0 < x < math.inf for x in lengths[i * per : (i + 1) * per])
    ]
    words = []
    if bad:
        words.append("u or v of a spectrally normalized weight held NaN, Inf or zeros; drawn anew")
        _draw(state, bad, parts, us, vs, same_everywhere(state))
        if len(bad) == len(parts):
            return words
    good = [i for i in range(len(parts)) if i not in bad]
    measured = [x for i in good for x in lengths[i * per : (i + 1) * per]]
    shortest, longest = min(measured), max(measured)
    if shortest < 0.98 or longest > 1.02:
        words.append(
            f"u and v of a spectrally normalized weight were not normalized (lengths {shortest:.3g} to {longest:.3g}); "
            "normalized"
        )
    if max(1 - shortest, longest - 1) > 64 * torch.finfo(u.dtype).eps:
        words.append("")
        for i in good:
            for x, top in zip(pairs[i], tops[2 * i : 2 * i + 2], strict=True):
                x.copy_(nn.functional.normalize(x / top, dim=0))
    copies = [[x.clone() for x in xs] for xs in (us, vs)]
    better = state._iterate(parts, copies[0], copies[1], 1)
    stored = state._form(parts, us, vs)
    after, before = better.tolist(), stored.abs().tolist()
    if not all(math.isfinite(x) for x in after):
        state._book.unverified = True  # a bad weight says nothing about u and v: look again
    stale = [
        i
        for i, (x, y) in enumerate(zip(before, after, strict=True))
        if math.isfinite(y) and x < STALE_BELOW * y
    ]
    if stale:
        words.append(
            "u and v of a spectrally normalized weight do not belong to it (loaded without them, or the weight was "
            "replaced); recomputed"
        )
        _warm_up(state, stale, parts, us, vs)
    return words
