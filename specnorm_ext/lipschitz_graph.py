"""The Lipschitz constant of a network along its graph, as torch.fx traces it: which operation does what to a bound."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from ._checks import state_dtype
from .convolution import certified_operator_norm, conv_weight, operator_of
from .lipschitz_functions import (
    ADD,
    AS_MODULES,
    BOUNDED_BY_ONE,
    CHUNKS,
    DIV,
    DROPOUTS,
    MOVES,
    MUL,
    NEGATIONS,
    PRODUCTS,
    TRANSPOSES,
)
from .lipschitz_rules import (
    ATTENTION,
    NO_ATTENTION,
    Shape,
    batch_norm_rule,
    batch_norm_scale,
    certified_matrix_norm,
    conv_rule,
    rule_for,
)
from .lipschitz_trace import BATCH, OP, AnotherBatch, count, given, memory, same

_EXPLICIT = (
    2048  # numbers of a sample up to which a chain of affine layers is written out as one matrix
)
_EXPLICIT_NUMBERS = 1 << 25


@dataclass(frozen=True)
class LayerBound:
    """One operation of the network.

    Attributes:
        name: the module's, or the operation's in the graph.
        kind: the module's class or the function.
        input_shape, output_shape: of one sample.
        factor: by how much it can lengthen a difference of its input; the number of sums and concatenations is that
            of their inputs.
        bound: the Lipschitz constant of its output as a function of the network's input is at most this.
    """

    name: str
    kind: str
    input_shape: Shape
    output_shape: Shape
    factor: float
    bound: float


def _times(a: float, b: float) -> float:
    """a b, where inf stands for what is not known and nan for nothing."""
    if 1 in (a, b) or 0 in (a, b):
        return math.inf if math.isnan(a * b) else a * b  # exact
    return math.inf if math.isnan(a * b) else math.nextafter(a * b, math.inf)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _sum(parts: list[float]) -> float:
    whole = math.fsum(parts)
    return math.nextafter(whole, math.inf) if sum(x != 0 for x in parts) > 1 else whole


def _root_sum(parts: list[float]) -> float:
    """hypot, which is good to one unit in the last place."""
    whole = math.hypot(*parts)
    return whole * (1 + 2**-51) if sum(x != 0 for x in parts) > 1 else whole


# ---- the walk along the graph ---------------------------------------------------------------------------------------


@dataclass
class _Known:
    """What is known of the value of a node.

    Attributes:
        shape: of one sample; () for a tuple of tensors.
        source: the node that this one is an affine function of: itself, where it is not affine in what precedes it.
        factor: the Lipschitz constant as a function of the source.
        bound: the same as a function of the network's input, of the source itself.
        factors: how many maps other than isometries lie between; from two on a product can be improved.
    """

    shape: Shape
    source: fx.Node
    factor: float = 1.0
    bound: float = 0.0
    factors: int = 0


class Walk:
    def __init__(self, traced: fx.GraphModule, sample: Tensor) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.sample = sample
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, _Known] = {}
        self.layers: list[LayerBound] = []
        self.folded: set[fx.Node] = set()  # BatchNorms whose scale is in the factor before them
        self.sized: set[fx.Node] = set()  # constants that come of the input's size
        self.another: AnotherBatch | None = None

    def run(self) -> float:
        result = math.nan
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if self.known:
                    raise TypeError(
                        f"{OP}: expected a model with one input, got a second one, {node.target!r}"
                    )
                self.values[node] = self.sample
                self.known[node] = _Known(tuple(self.sample.shape[1:]), node, bound=1.0)
            elif node.op == "output":
                result = self.of_output(node)
            else:
                self.step(node)
        return result

    def of_output(self, node: fx.Node) -> float:
        (value,) = node.args
        if not isinstance(value, fx.Node):
            raise TypeError(f"{OP}: expected a model with one tensor as output, got {value!r}")
        known = self.known.get(value)
        return 0.0 if known is None else self.tightened(value)

    def step(self, node: fx.Node) -> None:
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "get_attr":
            value = self.traced
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.values[node] = value
            return
        inputs = [x for x in node.all_input_nodes if x in self.known]
        if node.op == "call_module":
            self.check_module(node, inputs)
        versions = {
            x: y._version for x in node.all_input_nodes if isinstance(y := self.values[x], Tensor)
        }
        value = self.evaluate(node, *args)
        for x, version in versions.items():
            if self.values[x]._version != version:
                self.check_alone(node, x)
        self.values[node] = value
        tensors = value if isinstance(value, tuple | list) else (value,)
        if not inputs or not any(isinstance(x, Tensor) for x in tensors):
            if any(x in self.known or x in self.sized for x in node.all_input_nodes):
                self.sized.add(node)
            return  # a constant, or a size
        for x in tensors:
            if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] != BATCH:
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(
                    f"{OP}: expected {self.place(node)} to keep a batch of {BATCH} samples apart, in front, "
                    f"got {got}"
                )
            if not x.is_floating_point():
                self.refuse(node, f"makes {x.dtype} of real numbers, in jumps")
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        factors, affine, euclidean = self.rule(node, inputs, shape)
        self.record(node, inputs, shape, factors, affine, euclidean)

    def check_module(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        module = self.modules[str(node.target)]
        found = rule_for(module)
        if "forward" in vars(module):
            self.refuse(
                node, "has a forward put in place of its class's; make it a class of its own"
            )
        if found is None or len(inputs) > 1:
            raise TypeError(
                f"{OP}: expected modules with a known Lipschitz constant, got {self.place(node)}; "
                f"register_rule({type(module).__name__}, rule) tells it"
            )
        if found.rule is conv_rule and len(node.args) + len(node.kwargs) > 1:
            self.refuse(
                node,
                "is called with an output_size, which changes its operator; set output_padding",
            )
        if isinstance(module, ATTENTION):
            self.ask(node, module, ())  # before it raises of arguments that are missing
        if isinstance(module, nn.RMSNorm) and module.eps is None and inputs:
            # what torch takes for this dtype; the search in float64 is to find the same function
            module.eps = torch.finfo(state_dtype(self.values[inputs[0]].dtype)).eps
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(
                f"{OP}: expected modules without forward hooks, got {self.place(node)}; remove them, or "
                "turn torch's old spectral_norm and weight_norm into parametrizations"
            )

    def check_alone(self, node: fx.Node, over: fx.Node) -> None:
        """What is written over must have no reader after this, by whatever name: it would read the new value, of which
        its bound knows nothing. Views lie in the memory of what they are of, as does what a dropout gives in eval."""
        order = {x: i for i, x in enumerate(self.traced.graph.nodes)}
        written = memory(self.values[over])
        for x, value in self.values.items():
            if written & memory(value) and any(order[user] > order[node] for user in x.users):
                self.refuse(
                    node, "writes over a value that is read again later; use the form that does not"
                )

    def evaluate(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if node.op == "call_module":
                return self.modules[str(node.target)](*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise ValueError(
                f"{OP}: expected an input_size that the model takes, got {list(self.sample.shape[1:])}: "
                f"{self.place(node)} raised {error}"
            ) from error

    def place(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.modules[str(node.target)]).__name__} at {str(node.target)!r}"
        name = getattr(node.target, "__name__", str(node.target))
        stack = node.meta.get("nn_module_stack")
        where = f" in {list(stack.values())[-1][0]!r}" if stack else ""
        return f"{name}() at {node.name!r}{where}"

    # ---- what a node does to a difference of its inputs

    def rule(
        self, node: fx.Node, inputs: list[fx.Node], shape: Shape
    ) -> tuple[list[float], bool, bool]:
        """A factor for each input; whether the map is affine; whether the parts lie side by side (root of the sum of
        squares) or on top of each other (sum)."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            found = rule_for(module)
            assert found is not None
            return [self.of_module(node, module, self.known[inputs[0]].shape)], found.affine, False
        target: Any = node.target
        spread = [self.spread(x, shape) for x in inputs]
        first = given(node, "input", 0)
        # an input that is named twice is one in the graph's eyes: x + x, say
        counts = [count(node, x) for x in inputs]
        if target in ADD and not set(node.kwargs) - {"input", "alpha", "other"}:
            alpha = abs(float(self.argument(node, "alpha", 2, 1)))
            other = given(node, "other", 1)
            factors = [_sum([float(x is first), alpha * (x is other)]) for x in inputs]
            return [_times(a, b) for a, b in zip(factors, spread, strict=True)], True, False
        if target in (torch.cat, torch.concat, torch.stack):
            parts = given(node, "tensors", 0)
            rank = self.value(parts)[0].dim() + (target is torch.stack)
            if self.argument(node, "dim", 1, 0) % rank:
                # of chunks that come as one tuple the bound is that of all of them
                return (
                    ([1.0] if isinstance(parts, fx.Node) else list(map(math.sqrt, counts))),
                    True,
                    True,
                )
        if target in (torch.maximum, torch.minimum):
            return spread, False, True
        if counts == [1]:
            found_alone = self.rule_of_one(node, inputs[0], first, spread[0], shape)
            if found_alone is not None:
                return [found_alone[0]], found_alone[1], False
        if target in PRODUCTS and counts == [1]:
            self.refuse(node, "multiplies by a constant in a form that is not known; write x @ w")
        if target in PRODUCTS or target is F.linear or target is F.scaled_dot_product_attention:
            self.refuse(node, "multiplies activations; " + NO_ATTENTION)
        if target in MUL | DIV:
            self.refuse(node, "multiplies or divides activations, which has no constant")
        self.refuse(node, "is not known; make it a module, and register_rule its type")

    def rule_of_one(
        self, node: fx.Node, x: fx.Node, first: Any, spread: float, shape: Shape
    ) -> tuple[float, bool] | None:
        """A factor, and whether the map is affine, for a function of one input that is not constant, `x`."""
        target: Any = node.target
        before = self.known[x].shape
        if target in MUL | DIV:
            others = [y for y in (*node.args, *node.kwargs.values()) if y is not x]
            if len(others) == 1 and (target in MUL or first is x):
                return _times(self.largest(others[0], inverse=target in DIV), spread), True
        if first is not x:
            return None
        if target in AS_MODULES:
            cls, names = AS_MODULES[target]
            given = dict(zip(names, node.args[1:], strict=False))
            given |= {k: v for k, v in node.kwargs.items() if k in names}
            module = cls(**{k: self.value(v) for k, v in given.items()})
            found = rule_for(module)
            assert found is not None
            return self.ask(node, module, before), found.affine
        if target in NEGATIONS or target in DROPOUTS:
            if target in DROPOUTS and self.argument(node, "training", 2, True):
                self.refuse(node, "drops numbers at random; pass training=self.training")
            return 1.0, True
        if target in MOVES:
            return spread, True
        if target in TRANSPOSES and self.leaves_batch(node):
            return 1.0, True
        if target in CHUNKS:
            dim = self.argument(node, "dim", 1 if "unbind" in str(target) else 2, 0)
            return (1.0, True) if dim % (len(before) + 1) else None
        if target is operator.getitem and self.is_slice(node):
            return 1.0, True
        if target in (torch.mean, "mean", torch.sum, "sum") and self.leaves_batch(node):
            n = math.prod(before) / max(1, math.prod(shape))
            factor = math.sqrt(n) if target in (torch.sum, "sum") else 1 / math.sqrt(n)
            return factor * (1 + 2**-51), True
        if target in BOUNDED_BY_ONE:
            return spread, False
        if target is F.linear:
            weight = self.constant(node, "weight", 1)
            return certified_matrix_norm(weight.reshape(-1, weight.shape[-1])), True
        if target in PRODUCTS:
            other = self.argument(node, "other", 1, None)
            if isinstance(other, Tensor) and other.dim() == 2:
                return certified_matrix_norm(other), True
        return None

    def of_module(self, node: fx.Node, module: nn.Module, shape: Shape) -> float:
        """A convolution takes up the scale of the BatchNorm that follows: the norm of both is below their product."""
        if node in self.folded:
            return 1.0
        users = list(node.users)
        known = rule_for(module)
        plain = isinstance(module, _CONVS) and known is not None and known.rule is conv_rule
        if plain and len(users) == 1 and users[0].op == "call_module":
            norm = self.modules[str(users[0].target)]
            rule = rule_for(norm)
            theirs = rule is not None and rule.rule is batch_norm_rule
            if theirs and isinstance(norm, _BATCH_NORMS) and norm.running_var is not None:
                weight = conv_weight(module).detach().double()
                scale = batch_norm_scale(norm).view(-1, *[1] * (weight.dim() - 1))
                a = operator_of(module, shape[1:], OP)
                self.folded.add(users[0])
                return certified_operator_norm(a, weight * scale, 2**-50)
        return self.ask(node, module, shape)

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        raise TypeError(
            f"{OP}: expected operations with a Lipschitz constant, got {self.place(node)}, which {why}"
        )

    def ask(self, node: fx.Node, module: nn.Module, shape: Shape) -> float:
        found = rule_for(module)
        assert found is not None
        try:
            factor = float(found.rule(module, shape))
        except TypeError as error:
            raise TypeError(f"{error} (it is {self.place(node)})") from None
        if math.isnan(factor) or factor < 0:
            raise ValueError(
                f"{OP}: expected a rule to return a number >= 0, got {factor} for {self.place(node)}"
            )
        return factor

    def argument(self, node: fx.Node, name: str, position: int, default: Any) -> Any:
        return self.value(given(node, name, position, default))

    def value(self, x: Any) -> Any:
        """Of an argument: a constant, with the nodes in it as what they came to."""
        return fx.node.map_arg(x, self.fixed)

    def fixed(self, x: fx.Node) -> Any:
        value = self.values[x]
        if x in self.sized:
            if self.another is None:
                self.another = AnotherBatch(self.traced, self.sample)
            if not same(value, self.another.found[x]):
                self.refuse(
                    x, "depends on the number of samples, and scales with it what is computed"
                )
        return value

    def constant(self, node: fx.Node, name: str, position: int) -> Tensor:
        value = self.argument(node, name, position, None)
        if not isinstance(value, Tensor):
            self.refuse(node, f"has no constant {name}")
        return value

    def largest(self, x: Any, inverse: bool) -> float:
        value = self.value(x)
        # a number of Python is one of float64
        sizes = (
            value.detach().double()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64)
        )
        sizes = sizes.abs()
        if sizes.numel() == 0:
            return 0.0
        least, most = float(sizes.min()), float(sizes.max())
        if inverse:
            return (
                math.inf if least == 0 or math.isnan(least) else math.nextafter(1 / least, math.inf)
            )
        return math.inf if math.isnan(most) else most

    def spread(self, x: fx.Node, shape: Shape) -> float:
        """Broadcasting repeats numbers; the norm of that is the root of how often."""
        n = math.prod(self.known[x].shape)
        ratio = math.prod(shape) / n if n else 0.0
        return math.sqrt(max(ratio, 1.0)) * (1 + 2**-51 if ratio > 1 else 1.0)

    def leaves_batch(self, node: fx.Node) -> bool:
        """Whether the dimensions that are named leave the first one, the samples, where it is."""
        dims = [x for k, x in node.kwargs.items() if k in ("dim", "dims", "dim0", "dim1")]
        flat: list[Any] = []
        for x in (*node.args[1:], *dims):
            flat += list(x) if isinstance(x, tuple | list) else [x]
        n = len(self.known[node.all_input_nodes[0]].shape) + 1
        numbers = [x % n for x in flat if isinstance(x, int) and not isinstance(x, bool)]
        if not numbers:
            return False
        return numbers[0] == 0 if "permute" in str(node.target) else 0 not in numbers

    def is_slice(self, node: fx.Node) -> bool:
        index = node.args[1]
        if self.known[node.all_input_nodes[0]].shape == () and isinstance(index, int):
            return True  # of a tuple of chunks
        parts = index if isinstance(index, tuple) else (index,)
        simple = all(x is None or x is Ellipsis or isinstance(x, slice | int) for x in parts)
        first = parts[0] if parts else None
        return simple and (first is Ellipsis or first == slice(None, None, None))

    # ---- the bound of a node

    def record(
        self,
        node: fx.Node,
        inputs: list[fx.Node],
        shape: Shape,
        factors: list[float],
        affine: bool,
        euclidean: bool,
    ) -> None:
        def total(parts: list[float]) -> float:
            return _root_sum(parts) if euclidean else _sum(parts)

        sources = {self.known[x].source for x in inputs}
        plain = len(inputs) == 1 and factors[0] == 1
        if affine and len(sources) == 1:
            befores = [self.known[x] for x in inputs]
            factor = total([_times(f, k.factor) for f, k in zip(factors, befores, strict=True)])
            # a sum of several paths is worth a second look whatever its factors
            count = max(k.factors for k in befores) + (0 if plain else 1 if len(inputs) == 1 else 2)
            source = befores[0].source
            known = _Known(shape, source, factor, self.known[source].bound, count)
        else:
            bounds = [self.tightened(x) for x in inputs]
            bound = total([_times(f, b) for f, b in zip(factors, bounds, strict=True)])
            known = _Known(shape, node, 1.0, bound, 0)
        self.known[node] = known
        if plain and node.op != "call_module":
            return
        kind = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            kind = type(self.modules[str(node.target)]).__name__
            kind += ", in the above" if node in self.folded else ""
        first = self.known[inputs[0]].shape
        shown = factors[0] if len(inputs) == 1 else float(len(inputs))
        name = str(node.target) if node.op == "call_module" else node.name
        bound = _times(known.factor, known.bound)
        self.layers.append(LayerBound(name, kind, first, shape, shown, bound))

    def tightened(self, node: fx.Node) -> float:
        known = self.known[node]
        if known.factors > 1 and math.isfinite(known.factor):
            matrix = self.matrix(node, known.source)
            if matrix is not None:
                rounding, linear = matrix
                known.factor = min(known.factor, certified_matrix_norm(linear) + rounding)
                known.factors = 1
                for i in reversed(range(len(self.layers))):
                    layer = self.layers[i]
                    if layer.name in (node.name, str(node.target)):
                        tight = _times(known.factor, known.bound)
                        self.layers[i] = replace(layer, bound=min(layer.bound, tight))
                        break
        return _times(known.factor, known.bound)

    def matrix(self, node: fx.Node, source: fx.Node) -> tuple[float, Tensor] | None:
        """The affine map from `source` to `node` as a matrix in float64, without its constant, and what rounding may
        have done to it; None where it is too large."""
        shape = self.known[source].shape
        n = math.prod(shape)
        if n > _EXPLICIT or n * math.prod(self.known[node].shape) > _EXPLICIT_NUMBERS:
            return None
        between = []
        for x in self.traced.graph.nodes:
            if x in self.known and self.known[x].source is source and x is not source:
                between.append(x)
            if x is node:
                break
        if any(n * math.prod(self.known[x].shape) > _EXPLICIT_NUMBERS for x in between):
            return None
        like: Any = {"dtype": torch.float64, "device": self.sample.device}
        zero = torch.zeros(1, *shape, **like)
        eye = torch.eye(n, **like).view(n, *shape)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, *shape, generator=generator, dtype=torch.float64).to(zero)
        try:
            with _doubled(self.modules[str(x.target)] for x in between if x.op == "call_module"):
                # The tangents: differences of images lose what is small beside the constants. The probe finds a module
                # whose tangent is not its linear part, say one that detaches.
                with forward_ad.dual_level():
                    image = self.replay(
                        node, source, forward_ad.make_dual(zero.expand_as(eye).clone(), eye)
                    )
                    linear = forward_ad.unpack_dual(image).tangent
                gap = self.replay(node, source, probe) - self.replay(node, source, zero)
        except Exception:
            return None  # sizes taken from elsewhere, say: the product of the factors holds in any case
        if linear is None:
            return None
        linear = linear.reshape(n, -1).mT
        factor = self.known[node].factor
        off = torch.linalg.vector_norm(gap.flatten() - linear @ probe.flatten())
        if not off <= 1e-6 * factor * torch.linalg.vector_norm(probe):
            return None
        # Each map A sums at most t products of numbers of float64, for n columns X. Its error is at most
        # gamma_(t + 8) |A|_F |X|_F in the Frobenius norm (8 for scales that are roots and quotients themselves), which
        # is below gamma_(t + 8) sqrt(t n) |A| |X|, and what comes before and after it multiplies that.
        t = max(math.prod(self.known[x].shape) for x in (source, *between))
        rounding = len(between) * 2**-53 * (t + 16) * math.sqrt(t * n)
        return rounding * factor, linear

    def replay(self, node: fx.Node, source: fx.Node, start: Tensor) -> Tensor:
        """The value of `node` where that of `source` is `start`."""
        env: dict[fx.Node, Any] = {source: start.clone()}  # which may be written over
        for x in self.traced.graph.nodes:
            if x in env:
                continue
            if x.op == "get_attr":
                value = self.values[x]
                env[x] = value.double() if value.is_floating_point() else value
            elif x.op in ("call_function", "call_method", "call_module") and all(
                y in env for y in x.all_input_nodes
            ):
                args = fx.node.map_arg((x.args, x.kwargs), lambda y: env[y])
                env[x] = self.evaluate(x, *args)
            if x is node:
                break
        return env[node]


@contextlib.contextmanager
def _doubled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in float64 for a while. (They are of a copy of the model.)"""
    kept = []
    for m in modules:
        for t in (*m.parameters(), *m.buffers()):
            if t.is_floating_point():
                kept.append((t, t.data))
                t.data = t.data.double()
    try:
        yield
    finally:
        for t, data in reversed(kept):
            t.data = data


__all__ = ["LayerBound", "Walk"]
