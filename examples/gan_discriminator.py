"""A discriminator step of SN-GAN (Miyato et al., ICLR 2018), carried on from a checkpoint of torch's old API.

python examples/gan_discriminator.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import specnorm_ext


def discriminator(normalize: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        normalize(nn.Conv2d(3, 16, 3, padding=1)),
        nn.LeakyReLU(0.1),
        normalize(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        normalize(nn.Linear(32 * 8 * 8, 1)),
    )


def old_checkpoint() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a model of torch.nn.utils.spectral_norm has saved, and one of its outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is the old API
        model = discriminator(nn.utils.spectral_norm)
    images = torch.randn(4, 3, 16, 16)
    for _ in range(20):
        model(images)
    return model.state_dict(), images, model.eval()(images)


def main() -> None:
    torch.manual_seed(0)
    state, images, expected = old_checkpoint()

    # The keys weight_orig, weight_u and weight_v are read as they are.
    model = discriminator(lambda layer: specnorm_ext.spectral_norm(layer, n_vectors=2))
    model.load_state_dict(state)
    error = (model.eval()(images) - expected).abs().max().item()
    print(f"outputs of the old checkpoint, largest difference: {error:.1e}")
    assert error < 1e-4

    model.train()
    generator = nn.Sequential(nn.Linear(16, 3 * 16 * 16), nn.Tanh(), nn.Unflatten(1, (3, 16, 16)))
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.0, 0.9))
    for step in range(5):
        real = torch.randn(8, 3, 16, 16) * 0.3 + 0.5
        fake = generator(torch.randn(8, 16)).detach()
        # Two forwards and one backward, the larger one with its activations computed again: all of it counts.
        scores = model(real), checkpoint(model, fake, use_reentrant=False)
        loss = F.relu(1 - scores[0]).mean() + F.relu(1 + scores[1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms = specnorm_ext.spectral_norms(model)
        told = ", ".join(f"{name}: {e.value:.3f}" for name, e in norms.items())
        print(f"step {step}: hinge loss {loss.item():.3f}; spectral norms {told}")


if __name__ == "__main__":
    main()
