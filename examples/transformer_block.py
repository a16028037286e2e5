"""sigmaReparam and bounded weights in a small transformer block.

    python examples/transformer_block.py

Queries, keys and values carry a learned scale, gamma W / sigma, which keeps attention from collapsing (Zhai et
al., ICML 2023). The feed-forward part is held to norms of at most 2 by W / max(1, sigma / 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import specnorm_ext
from specnorm_ext import spectral_norm

BOUND = 2.0


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = (
            spectral_norm(nn.Linear(width, width), learnable_scale=True) for _ in range(3)
        )
        self.out = nn.Linear(width, width)
        self.up = spectral_norm(nn.Linear(width, 4 * width), bound=BOUND, n_vectors=4)
        self.down = spectral_norm(nn.Linear(4 * width, width), bound=BOUND, n_vectors=4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def main() -> None:
    torch.manual_seed(0)
    block = Block(width=32, heads=4)
    optimizer = torch.optim.AdamW(block.parameters(), 3e-2)
    for step in range(40):
        x = torch.randn(8, 12, 32)
        loss = F.mse_loss(block(x), 3 * x.cumsum(1) / 12**0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            scale = block.queries.parametrizations.weight[0].scale.item()
            print(f"step {step + 1}: loss {loss.item():.3f}, scale of the queries {scale:.3f}")

    # As the layers use them; u and v lag a step behind the weights, so a bound is met to a percent or so.
    norms = specnorm_ext.spectral_norms(block.eval())
    for name in ("queries.weight", "up.weight", "down.weight"):
        print(f"{name:15} {norms[name].value:.3f}")
    for name in ("up.weight", "down.weight"):
        assert norms[name].value <= 1.02 * BOUND


if __name__ == "__main__":
    main()
