r"""Penalties on gradients: of a critic for its input, of a loss for its input, of a loss for the parameters.

Each makes a graph of the gradient, so that the penalty can be differentiated for the parameters (double backward). All
call the critic or model as it is: training or eval, dropout on or off, is the caller's choice and stays as it was.
Batch normalization in training mixes samples, whose gradients are then no longer theirs: use another normalization,
or eval. Our layers iterate once more for this forward in training, as for every other (a group in "step" mode: not).

Under autocast the forward and backward of the critic run as autocast has it; interpolation, norms and the mean are
taken in float32 (float64 for float64 inputs). Gradients of float16 products may underflow inside the critic, where no
GradScaler helps: run these in float32, inside ``torch.autocast(device, enabled=False)``, or use bfloat16.

torch.compile cannot differentiate twice what it has compiled. So in a compiled step the penalties on inputs are left to
Python, and the critic with them, while the rest stays compiled; around a critic that is compiled itself they give the
value, and torch's error in backward. They run inside torch.func transforms (where an output that does not depend on
the input is not noticed), but for :func:`parameter_gradient_penalty`, whose loss is made outside of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._arguments import flag, function, number, random_source, recording
from ._checks import state_dtype
from ._directions import lengths_of

Sampling = Literal["interpolate", "real", "fake", "both"]
_SAMPLINGS = ("interpolate", "real", "fake", "both")


@contextlib.contextmanager
def _recording() -> Iterator[bool]:
    """Gradients on, whatever mode the caller is in; whether the caller can use a graph of them."""
    wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with recording():
        yield wanted


def _samples(op: str, name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: expected {name} to be of a float dtype, got {x.dtype}; of indices, pass their embeddings"
        )
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(
            f"{op}: expected {name} to have shape [batch, ...] with at least one sample, got {list(x.shape)}"
        )
    return x


def _check_output(op: str, what: str, y: Any, batch: int, fix: str) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"{op}: expected {what} to be a tensor, got {type(y).__name__}")
    if y.dim() < 1 or y.shape[0] != batch or y.numel() != batch:
        raise ValueError(
            f"{op}: expected {what} to hold one number for each sample, shape [{batch}] or [{batch}, 1], got "
            f"{list(y.shape)}; {fix}"
        )


def _gradient(
    op: str, what: str, function: Callable[[Tensor], Tensor], x: Tensor, fix: str, graph: bool
) -> Tensor:
    """Of sum(function(x)) for x: [batch, elements], float32 or wider. `what` and `fix`: for messages, its output."""
    if torch._C._are_functorch_transforms_active():
        # no leaf can be made there
        y, pull = torch.func.vjp(function, x.detach())[:2]
        _check_output(op, what, y, x.shape[0], fix)
        (found,) = pull(torch.ones_like(y))
    else:
        # what was made under inference_mode cannot be saved for a backward
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        y = function(leaf)
        _check_output(op, what, y, x.shape[0], fix)
        found = None
        if y.requires_grad:
            (found,) = torch.autograd.grad(y.sum(), leaf, create_graph=graph, allow_unused=True)
    if found is None:
        raise ValueError(
            f"{op}: expected {what} to depend on its input, got one without a gradient path to it; look for detach(), "
            ".data, no_grad(), argmax or an input that is not used"
        )
    return found.to(state_dtype(found.dtype)).reshape(x.shape[0], -1)


def _squared_norms(g: Tensor) -> Tensor:
    return g.square().sum(1)


def _distances(g: Tensor, target: float, one_sided: bool) -> Tensor:
    """(|g| - target)^2 of each row, above the target only where one_sided."""
    if target == 0:
        return _squared_norms(g)  # without the root, which has no derivative at 0
    off = lengths_of(g).squeeze(1) - target
    return (torch.relu(off) if one_sided else off).square()


def _critic_gradient(
    op: str, critic: Callable[..., Tensor], x: Tensor, conditions: Any, graph: bool
) -> Tensor:
    given = conditions if isinstance(conditions, (tuple, list)) else (conditions,)
    fix = "average over patches or heads, and leave the mean over the batch to the loss"
    return _gradient(op, "the critic's output", lambda x: critic(x, *given), x, fix, graph)


@torch.compiler.disable
def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor | None,
    fake: Tensor | None,
    target: float = 1.0,
    one_sided: bool = False,
    sampling: Sampling = "interpolate",
    conditions: Any = (),
    *,
    coefficient: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""How far the norm of a critic's gradient for its input is from a target, on average.

    .. math:: P = \lambda\, \mathbb E_x \bigl(|\nabla_x D(x)| - k\bigr)^2 \qquad \text{or, one-sided,} \qquad
        \lambda\, \mathbb E_x \max\bigl(0, |\nabla_x D(x)| - k\bigr)^2

    k = 1 and x between real and fake is WGAN-GP; the one-sided form is WGAN-LP; k = 0 is zero-centered.

    Args:
        critic: a module or function of x and the conditions that returns one number for each sample, [batch] or
            [batch, 1].
        real, fake: [batch, ...], of one dtype and device. Neither gets a gradient. The one that ``sampling`` does not
            need may be None.
        target: k, at least 0.
        one_sided: only norms above k.
        sampling: where the gradient is taken. "interpolate": :math:`x = \epsilon\, x_r + (1 - \epsilon)\, x_f` with one
            uniform :math:`\epsilon` for each sample; "real"; "fake"; "both": on either, in a call of the critic each,
            the mean over all samples (the batches may differ in size).
        conditions: labels and the like, passed on after x as they are: one tensor, or a tuple of anything. "both" uses
            them twice. Where real and fake have different ones, use two calls.
        coefficient: :math:`\lambda`, at least 0. The paper of WGAN-GP has 10.
        generator: of :math:`\epsilon`.

    Returns:
        the penalty, a scalar: float32, or float64 for float64 inputs. Differentiable in the critic's parameters (and in
        conditions that require grad). At a sample whose gradient is 0, the norm counts with derivative 0. Under
        no_grad and inference_mode: the value. NaN in, NaN out.

    Raises:
        TypeError: inputs that are no float tensors of one dtype, arguments of another kind.
        ValueError: real and fake of different shapes, no sample, an output that is not one number for each sample or
            does not depend on x, a negative target or coefficient, an unknown sampling.

    The critic must allow differentiation twice: recurrent layers on CUDA do so without cuDNN.

    Source: Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017, equation 3; one-sided: Petzka, Fischer
    and Lukovnicov, "On the Regularization of Wasserstein GANs", ICLR 2018; zero-centered: Thanh-Tung, Tran
    and Venkatesh, "Improving Generalization and Stability of GANs", ICLR 2019.

    Example:
        >>> import torch
        >>> from specnorm_ext.gradient_penalties import gradient_penalty
        >>> critic = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(critic.weight, 3.0)  # |gradient| = sqrt(18)
        >>> penalty = gradient_penalty(critic, torch.randn(5, 2), torch.randn(5, 2), coefficient=10.0)
        >>> round(penalty.item(), 3)
        105.147
        >>> penalty.backward()
    """
    op = "gradient_penalty"
    function(op, "critic", critic)
    flag(op, "one_sided", one_sided)
    random_source(op, generator)
    if sampling not in _SAMPLINGS:
        raise ValueError(
            f"{op}: expected sampling to be one of {', '.join(map(repr, _SAMPLINGS))}, got {sampling!r}"
        )
    target = number(op, "target", target)
    coefficient = number(op, "coefficient", coefficient)
    given = []
    if sampling != "fake":
        given.append(_samples(op, "real", real))
    if sampling != "real":
        given.append(_samples(op, "fake", fake))
    if len(given) == 2:
        _check_alike(op, given[0], given[1], sampling == "interpolate")
    with _recording() as graph:
        if sampling == "interpolate":
            given = [_between(given[0], given[1], generator)]
        values = [
            _distances(
                _critic_gradient(op, critic, x, conditions, graph),
                target,
                one_sided,
            )
            for x in given
        ]
        return torch.cat(values).mean() * coefficient


def _check_alike(op: str, real: Tensor, fake: Tensor, whole: bool) -> None:
    if real.dtype != fake.dtype:
        raise TypeError(
            f"{op}: expected real and fake of one dtype, got {real.dtype} and {fake.dtype}"
        )
    if real.device != fake.device:
        raise TypeError(
            f"{op}: expected real and fake on one device, got {real.device} and {fake.device}"
        )
    first = 0 if whole else 1
    if real.shape[first:] != fake.shape[first:]:
        what = "one shape" if whole else "samples of one shape"
        raise ValueError(
            f"{op}: expected real and fake to have {what}, got {list(real.shape)} and {list(fake.shape)}"
        )


def _between(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> Tensor:
    wide = state_dtype(real.dtype)
    shape = (real.shape[0], *(1 for _ in real.shape[1:]))
    epsilon = torch.rand(shape, dtype=wide, device=real.device, generator=generator)
    with torch.no_grad():
        return torch.lerp(fake.to(wide), real.to(wide), epsilon).to(real.dtype)


def r1_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    conditions: Any = (),
    *,
    coefficient: float = 1.0,
) -> Tensor:
    r"""The squared norm of a critic's gradient at real samples.

    .. math:: R_1 = \frac{\gamma}{2}\, \mathbb E_{x \sim p_r} |\nabla_x D(x)|^2

    With fake samples in their place this is :math:`R_2`, :func:`r2_penalty`. D is the logit, before any sigmoid.

    Args:
        critic, conditions, coefficient (:math:`\gamma`): as in :func:`gradient_penalty`.
        real: [batch, ...].

    Returns, Raises: as :func:`gradient_penalty`.

    Source: Mescheder, Geiger and Nowozin, "Which Training Methods for GANs do actually Converge?", ICML 2018,
    equation 9 (and 10 for :math:`R_2`).

    Example:
        >>> import torch
        >>> from specnorm_ext.gradient_penalties import r1_penalty
        >>> r1_penalty(lambda x: x.square().sum(1), torch.tensor([[1.0, 2.0]])).item()  # gradient 2 x
        10.0
    """
    return _centered("r1_penalty", "real", critic, real, conditions, coefficient)


def r2_penalty(
    critic: Callable[..., Tensor],
    fake: Tensor,
    conditions: Any = (),
    *,
    coefficient: float = 1.0,
) -> Tensor:
    r""":func:`r1_penalty` at fake samples, :math:`R_2 = \frac{\gamma}{2} \mathbb E_{x \sim p_f} |\nabla_x D(x)|^2`.

    Example:
        >>> import torch
        >>> from specnorm_ext.gradient_penalties import r2_penalty
        >>> r2_penalty(lambda x: x.square().sum(1), torch.tensor([[1.0, 2.0]]), coefficient=10.0).item()
        100.0
    """
    return _centered("r2_penalty", "fake", critic, fake, conditions, coefficient)


@torch.compiler.disable
def _centered(
    op: str,
    name: str,
    critic: Callable[..., Tensor],
    x: Tensor,
    conditions: Any,
    coefficient: float,
) -> Tensor:
    function(op, "critic", critic)
    coefficient = number(op, "coefficient", coefficient)
    x = _samples(op, name, x)
    with _recording() as graph:
        g = _critic_gradient(op, critic, x, conditions, graph)
        return _squared_norms(g).mean() * (coefficient / 2)


@torch.compiler.disable
def input_gradient_penalty(
    model: Callable[[Tensor], Any],
    inputs: Tensor,
    loss: Callable[[Any], Tensor],
    *,
    coefficient: float = 1.0,
) -> Tensor:
    r"""The squared norm of each sample's loss gradient for its input: for supervised models.

    .. math:: P = \lambda\, \mathbb E_{(x, y)} |\nabla_x L(x, y)|^2

    To first order it is what training on :math:`x + \epsilon \nabla_x L` adds to the loss, with :math:`\lambda =
    \epsilon`: adversarial training without the adversary.

    Args:
        model: a module or function of the inputs.
        inputs: [batch, ...]; get no gradient. Of tokens, their embeddings.
        loss: of the model's output, a number for each sample, as
            ``lambda z: torch.nn.functional.cross_entropy(z, y, reduction="none")``.
        coefficient: :math:`\lambda`, at least 0.

    Returns:
        the penalty, a scalar: float32, or float64 for float64 inputs. Differentiable in the parameters.

    Raises:
        TypeError: inputs that are no float tensor, arguments of another kind.
        ValueError: a loss that is not one number for each sample or does not depend on the inputs, no sample, a
            negative coefficient.

    Source: Drucker and LeCun, "Improving Generalization Performance Using Double Backpropagation", 1992; Ross and
    Doshi-Velez, "Improving the Adversarial Robustness and Interpretability of Deep Neural Networks by Regularizing
    their Input Gradients", AAAI 2018; as adversarial training: Su, kexue.fm/archives/7234, 2020.

    Example:
        >>> import torch
        >>> from specnorm_ext.gradient_penalties import input_gradient_penalty
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])
        >>> penalty = input_gradient_penalty(model, x, lambda z: 0.5 * (z - y).square())
        >>> penalty.item()  # (3 - 1)^2 |(1, 1)|^2
        8.0
    """
    op = "input_gradient_penalty"
    function(op, "model", model)
    function(op, "loss", loss)
    coefficient = number(op, "coefficient", coefficient)
    x = _samples(op, "inputs", inputs)
    with _recording() as graph:
        fix = 'pass one with reduction="none"'
        g = _gradient(op, "the loss", lambda x: loss(model(x)), x, fix, graph)
        return _squared_norms(g).mean() * coefficient


def parameter_gradient_penalty(
    loss: Tensor,
    parameters: Tensor | Iterable[Tensor],
    *,
    coefficient: float = 1.0,
) -> Tensor:
    r"""The squared norm of a batch's loss gradient for the parameters: what flooding comes to, without the level.

    .. math:: P = \lambda\, |\nabla_\theta L|^2

    Needs no labels of its own, only the loss of the batch as it is. Two steps of flooding around its level, one down
    and one up with the learning rate :math:`\eta`, make together one step of descent on it with the rate
    :math:`\eta^2 / 2`; ``losses.flooding`` says more.

    Args:
        loss: a scalar that the parameters lead to. It keeps its graph: call ``(loss + penalty).backward()``.
        parameters: a tensor or a list of tensors (``model.parameters()``). One that is given twice counts once. Frozen
            ones are passed over, and those that the loss does not depend on add 0.
        coefficient: :math:`\lambda`, at least 0.

    Returns:
        the penalty, a scalar: float32, or float64 if a gradient is. Differentiable in the parameters; its value alone
        under no_grad.

    Raises:
        TypeError: a loss or parameters that are no tensors.
        ValueError: a loss that is no scalar, without a graph or without any of the parameters in it; no parameter that
            requires grad; a negative coefficient.

    Source: Su, "Do we really need to reduce the training loss to zero?", kexue.fm/archives/7643, 2020; Barrett and
    Dherin, "Implicit Gradient Regularization", ICLR 2021.

    Example:
        >>> import torch
        >>> from specnorm_ext.gradient_penalties import parameter_gradient_penalty
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> penalty = parameter_gradient_penalty(0.5 * w.square().sum(), w)  # the gradient is w
        >>> penalty.backward()
        >>> penalty.item(), w.grad
        (25.0, tensor([6., 8.]))
    """
    op = "parameter_gradient_penalty"
    coefficient = number(op, "coefficient", coefficient)
    require_scalar(op, loss)
    if isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{op}: expected parameters to be tensors, got {type(parameters).__name__}"
            + ("; pass its parameters()" if isinstance(parameters, nn.Module) else "")
        )
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"{op}: expected parameters[{i}] to be a tensor, got {type(p).__name__}"
            )
    trained = list({id(p): p for p in found if p.requires_grad}.values())
    if not trained:
        raise ValueError(
            f"{op}: expected a parameter that requires grad, got {len(found)} without; "
            "unfreeze some, or leave the penalty out"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{op}: expected a loss with a graph, got one that does not require grad; compute it with gradients "
            "enabled and without detach()"
        )
    graph = torch.is_grad_enabled()
    gradients = torch.autograd.grad(
        loss, trained, create_graph=graph, retain_graph=True, allow_unused=True
    )
    norms = [g.to(state_dtype(g.dtype)).square().sum() for g in gradients if g is not None]
    if not norms:
        raise ValueError(
            f"{op}: expected a loss that depends on the parameters, got one that leads to none of the "
            f"{len(trained)} that require grad"
        )
    return torch.stack([x.to(norms[0].device) for x in norms]).sum() * coefficient


def require_scalar(op: str, loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: expected loss to be a tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(
            f"{op}: expected loss to be a scalar, got shape {list(loss.shape)}; take the mean over the batch first"
        )
    if not loss.is_floating_point():
        raise TypeError(f"{op}: expected loss to be of a float dtype, got {loss.dtype}")


__all__ = [
    "gradient_penalty",
    "input_gradient_penalty",
    "parameter_gradient_penalty",
    "r1_penalty",
    "r2_penalty",
]
