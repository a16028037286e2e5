"""Spectrally normalized layers, in times of the plain layer: python bench/bench_layers.py [--quick]

All variants of a group start from the same weights, u and v; their first step is compared with torch's
parametrization in float64, output and every gradient, before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from harness import Group, Target, Variant, require_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import specnorm_ext

NAME = "layers"

PLAIN = "plain, no normalization"
TORCH, TORCH_COMPILED = "torch spectral_norm", "torch spectral_norm, compiled"
OURS, OURS_COMPILED = "specnorm_ext.spectral_norm", "specnorm_ext.spectral_norm, compiled"
LAYERS, LAYERS_COMPILED = "specnorm_ext layers", "specnorm_ext layers, compiled"
GROUPED = "specnorm_ext layers in a group"
COMPILED = (TORCH_COMPILED, OURS_COMPILED, LAYERS_COMPILED)

# float32 against float64 through up to 11 layers. A ReLU that rounding pushes over its kink moves a gradient by far
# more than rounding does (1e-2 of an MLP's first bias): inputs are drawn until no nn.ReLU has one that near.
OUTPUT_RTOL, GRADIENT_RTOL = 1e-5, 1e-3
KINK = 4e-6  # of the root mean square of what enters the ReLU


# ---- the networks -------------------------------------------------------------------------------------------


def mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Residual block of the SN-GAN discriminator; the first one takes the image and has no ReLU before it."""

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if down else None
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else F.relu(x))
        y = self.conv2(F.relu(y))
        if self.shortcut is None:
            return x + y
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """SN-GAN's ResNet discriminator for 32 x 32 images (Miyato et al., ICLR 2018, table 4b): 11 weights."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(3, channels, down=True, first=True),
            Block(channels, channels, down=True),
            Block(channels, channels, down=False),
            Block(channels, channels, down=False),
        )
        self.linear = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.blocks(x)).sum((2, 3)))


def normalize_all(model: nn.Module, spectral_norm: Callable[..., nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spectral_norm(module)
    return model


# ---- a group ------------------------------------------------------------------------------------------------


def build_models(make: Callable[[], nn.Module], compiled: bool) -> dict[str, nn.Module]:
    """The plain model and its normalized versions, all with the same weights, u and v; never compiled here."""
    torch.manual_seed(0)
    plain = make()
    theirs = normalize_all(copy.deepcopy(plain), parametrizations.spectral_norm)
    state = theirs.state_dict()
    models = {PLAIN: plain, TORCH: theirs}
    for name in (TORCH_COMPILED, OURS, OURS_COMPILED, LAYERS, LAYERS_COMPILED, GROUPED):
        if name in COMPILED and not compiled:
            continue
        if name in (OURS, OURS_COMPILED):
            models[name] = normalize_all(copy.deepcopy(plain), specnorm_ext.spectral_norm)
            models[name].load_state_dict(state)
        else:
            models[name] = copy.deepcopy(theirs)
        if name in (LAYERS, LAYERS_COMPILED, GROUPED):
            models[name] = specnorm_ext.convert(models[name])
        if name == GROUPED:
            specnorm_ext.SpectralNormGroup(models[name])
    return models


def one_step(
    model: nn.Module,
    x: Tensor,
    g: Tensor | None,
    compiled: bool = False,
    backward_only: bool = False,
) -> Callable[[], Tensor]:
    """The timed work: a forward, and with g the backward of <g, y> into gradients made anew, as after zero_grad.

    backward_only: the backward of one and the same forward, again and again.
    """
    leaves = [x, *model.parameters()]
    run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if compiled else model
    if g is None:
        return lambda: run(x)
    if backward_only:
        out = run(x)

        def again() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            out.backward(g, retain_graph=True)
            return out

        return again

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = run(x)
        y.backward(g)
        return y

    return step


def input_for(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Normal, and in float64 nowhere near a kink of the model's nn.ReLU modules."""
    twin = copy.deepcopy(model).double()
    nearest = [1.0]

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z = inputs[0].detach()
        nearest.append(float(z.abs().min() / z.square().mean().sqrt()))

    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(look)
    for seed in range(1, 101):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        nearest[:] = [1.0]
        copy.deepcopy(twin)(x.double())  # of the first forward: a forward in training moves u and v
        if min(nearest) > KINK:
            return x
    raise harness.WrongResult("no input of 100 stays away from the kinks of the model's ReLUs")


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {
        name.replace("parametrizations.weight.original", "weight"): p.grad
        for name, p in model.named_parameters()
    }
    if x.requires_grad:
        found["input"] = x.grad
    return {name: grad for name, grad in found.items() if grad is not None}


def layer_group(
    title: str,
    make: Callable[[], nn.Module],
    x_shape: Sequence[int],
    options: argparse.Namespace,
    *,
    mode: str,
    with_compile: bool = True,
    input_gradient: bool = False,
    targets: dict[str, tuple[Target, ...]] | None = None,
) -> Group:
    """mode: "train" and "eval" are one forward under no_grad, "backward" is a training forward and backward, "backward
    only" leaves the forward out."""
    compiled = with_compile and not options.no_compile
    torch._dynamo.reset()  # its limit of compiled versions counts across groups
    models = build_models(make, compiled)
    generator = torch.Generator().manual_seed(0)
    x = input_for(models[TORCH].train(mode != "eval"), x_shape)
    backward, backward_only = mode.startswith("backward"), mode == "backward only"
    y_shape = models[PLAIN](x).shape
    g = torch.randn(y_shape, generator=generator) if backward else None
    twin = copy.deepcopy(models[TORCH]).double()
    inputs, steps = {}, {}
    for name, model in models.items():
        model.train(mode != "eval")
        inputs[name] = x.clone().requires_grad_(backward and input_gradient)
        steps[name] = one_step(model, inputs[name], g, name in COMPILED, backward_only)

    def check() -> dict[str, Any]:
        twin.train(mode != "eval")
        x64 = x.double().requires_grad_(backward and input_gradient)
        expected = one_step(twin, x64, None if g is None else g.double())()
        expected_gradients = gradients(twin, x64)
        largest = 0.0
        for name, step in steps.items():
            y = step()
            if name == PLAIN:
                continue
            error = require_close(f"output of {name}", y, expected, OUTPUT_RTOL)
            got = gradients(models[name], inputs[name])
            if got.keys() != expected_gradients.keys():
                raise harness.WrongResult(
                    f"{name}: gradients of {sorted(got)}, expected {sorted(expected_gradients)}"
                )
            for key, value in expected_gradients.items():
                what = f"gradient of {key}, {name}"
                error = max(error, require_close(what, got[key], value, GRADIENT_RTOL))
            if name.startswith("specnorm_ext"):
                largest = max(largest, error)
        return {"largest error": largest}

    def variant(name: str, step: Callable[[], Tensor]) -> Variant:
        # --no-compile leaves out variants that targets compare with; "" is the plain one.
        kept = tuple(t for t in (targets or {}).get(name, ()) if t.than in ("", *steps))
        return Variant(name, lambda _: step(), kept, ours=name.startswith("specnorm_ext"))

    return Group(
        name=title,
        unit=PLAIN,
        unit_label="x plain",
        variants=[variant(name, step) for name, step in steps.items()],
        check=check,
        data_bytes=sum(p.numel() * 4 for p in models[PLAIN].parameters()),
        context=contextlib.nullcontext if backward else torch.no_grad,
    )


def calls_group(options: argparse.Namespace) -> Group:
    """What one call costs of each thing that a 32 x 32 layer does, one thread's work and Python's."""
    torch.manual_seed(0)
    plain, layer = nn.Linear(32, 32), specnorm_ext.SpectralLinear(32, 32)
    model = nn.Sequential(copy.deepcopy(layer))
    group = specnorm_ext.SpectralNormGroup(model, "manual")
    still = copy.deepcopy(layer).eval()
    x = torch.randn(64, 32)
    w, b, u, v = (
        t.detach() for t in (layer.weight, layer.bias, layer.spectral._u, layer.spectral._v)
    )
    sigma = specnorm_ext.functional.power_iteration(w, u, v, 50)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: plain(x),
        "F.linear": lambda: F.linear(x, w, b),
        "torch.addmm with alpha": lambda: torch.addmm(b, x, w.t(), alpha=0.5),
        "torch.ops.specnorm_ext.spectral_linear": lambda: torch.ops.specnorm_ext.spectral_linear(
            x, w, b, u, v, sigma
        ),
        "functional.power_iteration": lambda: specnorm_ext.functional.power_iteration(w, u, v),
        "SpectralLinear, training": lambda: layer(x),
        "SpectralLinear, eval": lambda: still(x),
        "SpectralNormGroup.update, 1 layer": group.update,
    }

    def check() -> dict[str, Any]:
        for name in ("torch.ops.specnorm_ext.spectral_linear", "SpectralLinear, eval"):
            norm = sigma if "ops" in name else still.sigma
            require_close(
                name,
                calls[name](),
                F.linear(x.double(), w.double() / norm, b.double()),
                OUTPUT_RTOL,
            )
        return {}

    return Group(
        name="Where the time of a small layer goes (32 x 32, batch 64, no_grad)",
        unit="nn.Linear",
        unit_label="x nn.Linear",
        variants=[
            Variant(k, lambda _, f=f: f(), ours="spec" in k or "Spec" in k)
            for k, f in calls.items()
        ],
        check=check,
        data_bytes=w.numel() * 4,
        context=torch.no_grad,
    )


# ---- the list -----------------------------------------------------------------------------------------------

WIDTHS = (256, 512, 1024, 1024, 1024, 512, 256)


def groups() -> list[tuple[str, harness.Builder]]:
    found: list[tuple[str, harness.Builder]] = []

    def add(
        title: str, make: Callable[[int], nn.Module], x_shape: Sequence[int], **how: Any
    ) -> None:
        """`make` and the features of x are divided by the shrink factor: 1, or 8 with --quick."""

        def build(options: argparse.Namespace) -> Group:
            shrink = 8 if options.quick else 1
            # (batch, features), or an image, which keeps its 3 channels
            features = x_shape[1] // shrink if len(x_shape) == 2 else x_shape[1]
            shape = (x_shape[0], features, *(s // shrink for s in x_shape[2:]))
            return layer_group(title, lambda: make(shrink), shape, options, **how)

        found.append((title, build))

    def linear(n_in: int, n_out: int) -> Callable[[int], nn.Module]:
        return lambda shrink: nn.Linear(n_in // shrink, n_out // shrink)

    add(
        "Linear 32 x 32, batch 64, training forward, no_grad",
        linear(32, 32),
        (64, 32),
        mode="train",
        targets={OURS: (Target(0.5, TORCH),), LAYERS: (Target(5),)},
    )
    add(
        "8 Linear 32 x 32, batch 64, training forward, no_grad",
        lambda shrink: nn.Sequential(*(nn.Linear(32 // shrink, 32 // shrink) for _ in range(8))),
        (64, 32),
        mode="train",
        with_compile=False,
        targets={GROUPED: (Target(3.5),)},
    )
    add(
        "Linear 32 x 32, batch 64, eval forward, no_grad",
        linear(32, 32),
        (64, 32),
        mode="eval",
        targets={LAYERS: (Target(2),)},
    )
    found.append(("Where the time of a small layer goes", calls_group))
    add(
        "MLP of 6 layers 256..1024, batch 64, forward + backward",
        lambda shrink: mlp([w // shrink for w in WIDTHS]),
        (64, WIDTHS[0]),
        mode="backward",
        targets={
            OURS: (Target(1, TORCH, faster=True), Target(1, TORCH_COMPILED, faster=True)),
            OURS_COMPILED: (Target(1, TORCH_COMPILED, faster=True),),
            LAYERS: (Target(1.2),),
            GROUPED: (Target(1.2), Target(1, TORCH_COMPILED, faster=True)),
        },
    )
    for m, n in ((1024, 4096), (4096, 4096), (4096, 14336)):
        targets = {LAYERS: (Target(1.15),)} if m == 4096 else None
        add(
            f"Linear {m} x {n}, batch 64, forward + backward",
            linear(n, m),
            (64, n),
            mode="backward",
            input_gradient=True,
            with_compile=n < 14336,  # three more copies of a quarter of a gigabyte
            targets=targets,
        )
    # 64 is the batch that SN-GAN is trained with; 4 shows what normalization costs where convolutions hide less of it.
    for batch, mode, targets in (
        (64, "backward", {LAYERS: (Target(1.02),), GROUPED: (Target(1.02),)}),
        (4, "backward", None),
        (4, "backward only", {LAYERS: (Target(1, TORCH),)}),
    ):
        what = "forward + backward" if mode == "backward" else mode
        add(
            f"SN-GAN CIFAR discriminator, batch {batch}, {what}",
            lambda shrink: Discriminator(128 // shrink),
            (batch, 3, 32, 32),
            mode=mode,
            with_compile=False,  # a minute of compilation, for a step that convolutions rule
            targets=targets,
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    description = "Spectrally normalized layers against torch's and the plain layer."
    return harness.run(NAME, groups(), harness.parser(description), argv)


if __name__ == "__main__":
    sys.exit(main())
