"""Losses of critics and generators, on their scores alone, and flooding of any loss.

Scores are a critic's outputs, of any shape and not squashed by a sigmoid. Each mean is taken over all of them, in
float32 for 16-bit scores. The generator's losses take the scores of fakes that it has made and get no real ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._arguments import number
from ._checks import state_dtype
from .gradient_penalties import require_scalar


def _scores(op: str, **given: Any) -> list[Tensor]:
    found = []
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: expected {name} to be of a float dtype, got {x.dtype}")
        if x.numel() == 0:
            raise ValueError(
                f"{op}: expected {name} to hold at least one score, got shape {list(x.shape)}"
            )
        found.append(x.to(state_dtype(x.dtype)))
    return found


def wgan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""The critic's loss of a Wasserstein GAN; the negative of it estimates the distance.

    .. math:: L_D = \mathbb E[D(x_f)] - \mathbb E[D(x_r)]

    Args:
        real_scores, fake_scores: of any shapes and float dtypes.

    Returns:
        a scalar, float32, or float64 for float64 scores. Differentiable to any order.

    Raises:
        TypeError: scores that are no float tensors.
        ValueError: no score.

    Source: Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017, equation 3.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import wgan_critic_loss
        >>> wgan_critic_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.5]))
        tensor(-1.5000)
    """
    real, fake = _scores("wgan_critic_loss", real_scores=real_scores, fake_scores=fake_scores)
    return fake.mean() - real.mean()


def wgan_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""The generator's loss of a Wasserstein GAN, :math:`L_G = -\mathbb E[D(x_f)]`.

    Args, Returns, Raises, Source: as :func:`wgan_critic_loss`.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import wgan_generator_loss
        >>> wgan_generator_loss(torch.tensor([3.0, 1.0]))
        tensor(-2.)
    """
    (fake,) = _scores("wgan_generator_loss", fake_scores=fake_scores)
    return -fake.mean()


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""The hinge loss of a critic: scores beyond the margin of 1 pull no more.

    .. math:: L_D = \mathbb E[\max(0, 1 - D(x_r))] + \mathbb E[\max(0, 1 + D(x_f))]

    Args, Returns, Raises: as :func:`wgan_critic_loss`; at the margin the derivative is taken as 0.

    Source: Lim and Ye, "Geometric GAN", 2017; Miyato et al., "Spectral Normalization for GANs", ICLR 2018,
    section 4.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import hinge_critic_loss
        >>> hinge_critic_loss(torch.tensor([3.0, 0.5]), torch.tensor([-0.5]))
        tensor(0.7500)
    """
    real, fake = _scores("hinge_critic_loss", real_scores=real_scores, fake_scores=fake_scores)
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()


def hinge_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""The generator's loss beside :func:`hinge_critic_loss`, :math:`L_G = -\mathbb E[D(x_f)]`.

    Args, Returns, Raises: as :func:`wgan_critic_loss`. Source: Miyato et al., ICLR 2018, section 4.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import hinge_generator_loss
        >>> hinge_generator_loss(torch.tensor([3.0, 1.0]))
        tensor(-2.)
    """
    (fake,) = _scores("hinge_generator_loss", fake_scores=fake_scores)
    return -fake.mean()


def nonsaturating_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""The cross entropy of a critic that tells real from fake, of logits.

    .. math:: L_D = \mathbb E[-\log s(D(x_r))] + \mathbb E[-\log (1 - s(D(x_f)))], \qquad s(z) = 1 / (1 + e^{-z})

    Args, Returns, Raises: as :func:`wgan_critic_loss`. Taken as softplus, it neither over- nor underflows.

    Source: Goodfellow et al., "Generative Adversarial Nets", NIPS 2014, equation 1.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import nonsaturating_critic_loss
        >>> nonsaturating_critic_loss(torch.zeros(2), torch.zeros(3))  # 2 log 2
        tensor(1.3863)
    """
    op = "nonsaturating_critic_loss"
    real, fake = _scores(op, real_scores=real_scores, fake_scores=fake_scores)
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""The generator's loss that pulls while the critic is sure, :math:`L_G = \mathbb E[-\log s(D(x_f))]`.

    Args, Returns, Raises: as :func:`wgan_critic_loss`. Source: Goodfellow et al., NIPS 2014, section 3.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import nonsaturating_generator_loss
        >>> nonsaturating_generator_loss(torch.tensor([-100.0]))
        tensor(100.)
    """
    (fake,) = _scores("nonsaturating_generator_loss", fake_scores=fake_scores)
    return F.softplus(-fake).mean()


def flooding(loss: Tensor, level: float) -> Tensor:
    r"""Keep a loss from falling below a level: descent above it, ascent below.

    .. math:: L' = |L - b| + b, \qquad \nabla L' = \operatorname{sign}(L - b)\, \nabla L

    Once the loss hovers at b, steps go down and up in turn. With the gradient g and the learning rate :math:`\eta`, one
    of each is

    .. math:: \theta - \eta g(\theta) + \eta g(\theta - \eta g(\theta)) = \theta - \eta^2 H g + O(\eta^3)
        = \theta - \frac{\eta^2}{2} \nabla |g|^2 + O(\eta^3),

    and up first, then down, the same: descent on the squared norm of the gradient, towards where the loss is flat.
    ``parameter_gradient_penalty`` is that norm itself. No label enters but through the loss.

    Args:
        loss: a scalar: the mean over a batch, flooded per batch. (Samples flooded each would all be kept at the level.)
        level: b, finite. Below the smallest value that the loss can take it changes nothing.

    Returns:
        a scalar of the loss's dtype. Differentiable; exactly at the level the gradient is 0, as of \|x\| in torch.

    Raises:
        TypeError: a loss that is no float tensor, a level that is no number.
        ValueError: a loss that is no scalar, a level that is not finite.

    Source: Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?", ICML 2020;
    the expansion: Su, kexue.fm/archives/7643, 2020.

    Example:
        >>> import torch
        >>> from specnorm_ext.losses import flooding
        >>> loss = torch.tensor(0.125, requires_grad=True)
        >>> flooded = flooding(loss, 0.5)
        >>> flooded.backward()
        >>> flooded.item(), loss.grad.item()
        (0.875, -1.0)
    """
    op = "flooding"
    require_scalar(op, loss)
    level = number(op, "level", level, -math.inf)
    return (loss - level).abs() + level


__all__ = [
    "flooding",
    "hinge_critic_loss",
    "hinge_generator_loss",
    "nonsaturating_critic_loss",
    "nonsaturating_generator_loss",
    "wgan_critic_loss",
    "wgan_generator_loss",
]
