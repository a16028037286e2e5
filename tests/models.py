"""Networks that convert() is tried on: an SN-GAN discriminator, a ResNet-18, a transformer; and 10 steps of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from helpers import F64, tolerance
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

# ---- an SN-GAN discriminator with residual blocks (Miyato et al. 2018, table 4), narrow ---------------------------


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, down: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else nn.Identity()
        self.down = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(nnf.softplus(self.conv1(nnf.softplus(x))))
        return self.down(h) + self.down(self.skip(x))


class Discriminator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            DownBlock(3, width, True),
            DownBlock(width, width, True),
            DownBlock(width, width, False),
        )
        self.fc = nn.Linear(width, 1)
        self.embed = nn.Embedding(5, width)

    def forward(self, x: Tensor) -> Tensor:
        h = nnf.softplus(self.blocks(x)).mean((2, 3))
        label = torch.arange(len(x)) % 5
        return self.fc(h) + (self.embed(label) * h).sum(1, keepdim=True)


# ---- ResNet-18 (He et al. 2016), narrow --------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(nnf.silu(self.bn1(self.conv1(x)))))
        return nnf.silu(h + self.downsample(x))


class ResNet18(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                BasicBlock(widths[i] if j == 0 else widths[i + 1], widths[i + 1], 2 - (j or i == 0))
                for i in range(4)
                for j in range(2)
            )
        )
        self.fc = nn.Linear(8 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(nnf.silu(self.bn1(self.conv1(x))))
        return self.fc(h.mean((2, 3)))


# ---- a transformer: torch's encoder layer, one of separate projections, a recurrent cell, a transposed convolution -


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + nnf.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))


class Transformer(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.patch = nn.ConvTranspose2d(3, d, 4, 4)
        self.attention = Attention(d)
        self.encoder = nn.TransformerEncoderLayer(
            d, 4, 2 * d, dropout=0.0, batch_first=True, activation="gelu"
        )
        self.cell = nn.GRUCell(d, d)
        self.head = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x[:, :, :2, :2]).flatten(2).mT
        h = self.encoder(self.attention(h))
        return self.head(self.cell(h.mean(1), h[:, 0]))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    layers: int  # that become ours: the rest gets the parametrization
    parametrized: int


NETWORKS = {
    "SN-GAN": Case(Discriminator, 10, 0),
    "ResNet-18": Case(ResNet18, 21, 0),
    "transformer": Case(Transformer, 5, 6),
}

# ---- normalized, in each way --------------------------------------------------------------------------------------


def tensors_of(module: nn.Module, way: Any) -> tuple[str, ...]:
    if way is old_spectral_norm and type(module) is NonDynamicallyQuantizableLinear:
        return ()  # of attention, which the hook never normalizes
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight",)
    if isinstance(module, nn.GRUCell):
        return ("weight_hh", "weight_ih")
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
    return ("weight",) if isinstance(module, kinds) else ()


def normalized(model: nn.Module, normalize: Callable[..., Any], **options: Any) -> nn.Module:
    for module in list(model.modules()):
        for name in tensors_of(module, normalize):
            normalize(module, name, **options)
    return model


WAYS: dict[str, Callable[..., Any]] = {"torch": torch_spectral_norm, "old": old_spectral_norm}


def make(name: str, way: str, dtype: torch.dtype = F64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name].build().to(dtype)
    return model if way == "plain" else normalized(model, WAYS[way], **options)


def images(seed: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 16, 16, generator=generator, dtype=F64).to(dtype)


# ---- training -----------------------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> Iterator[float]:
    for seed in seeds:
        x = images(seed, next(model.parameters()).dtype)
        loss = (model(x) - x.flatten(1).sum(1, keepdim=True).sign()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def pairs(model: nn.Module) -> dict[str, Tensor]:
    """u and v under torch's names, whoever holds them."""
    out = {}
    for key, x in model.state_dict().items():
        key = key.replace(".spectral._", ".weight_").replace("parametrizations.", "")
        key = key.replace(".0._", "_")
        if key.endswith(("_u", "_v")):
            out[key] = x.detach().double()
    return out


def moved(model: nn.Module, seed: int) -> nn.Module:
    """Every weight off by as much as a product with it may be, by the table: a rounding error at its largest.

    A random matrix of entries +-t |w_ij| has a norm of t S and more for weights as they are initialized: the backward
    error that "product" allows for.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            n = math.prod(p.shape[1:]) if p.dim() > 1 else 1
            p.mul_(1 + sign.to(p.dtype) * tolerance("product", p.dtype, n))
    return model


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {k: (a[k] - b[k]).abs().max().item() for k in b}
