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

from .convolution import certified_operator_norm, conv_weight, operator_of
from .lipschitz_rules import (
    NO_ATTENTION,
    Shape,
    batch_norm_scale,
    certified_matrix_norm,
    conv_rule,
    rule_for,
)

OP = "lipschitz_bound"
BATCH = 7  # samples that shapes are taken from: a number that no model would have written down
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
    if 1 in (a, b):
        return a * b  # exact
    return math.inf if math.isnan(a * b) else a * b * (1 + 2**-52)


# ---- functions in the graph -----------------------------------------------------------------------------------------

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# function or method -> module of the same meaning, and its arguments after the first, in the function's order
_POOL = ("kernel_size", "stride", "padding")
_AS_MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {}
for _module, _names, _targets in (
    (nn.ReLU, (), (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    (nn.Tanh, (), (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_")),
    (nn.Sigmoid, (), (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_")),
    (nn.ReLU6, (), (F.relu6,)),
    (nn.Hardswish, (), (F.hardswish,)),
    (nn.Hardsigmoid, (), (F.hardsigmoid,)),
    (nn.Softsign, (), (F.softsign,)),
    (nn.LogSigmoid, (), (F.logsigmoid,)),
    (nn.Tanhshrink, (), (F.tanhshrink,)),
    (nn.SiLU, (), (F.silu,)),
    (nn.Mish, (), (F.mish,)),
    (nn.SELU, (), (F.selu, torch.selu)),
    (nn.GELU, ("approximate",), (F.gelu,)),
    (nn.LeakyReLU, ("negative_slope",), (F.leaky_relu, F.leaky_relu_)),
    (nn.ELU, ("alpha",), (F.elu, F.elu_)),
    (nn.Softplus, ("beta", "threshold"), (F.softplus,)),
    (nn.Hardtanh, ("min_val", "max_val"), (F.hardtanh,)),
    (nn.Softmax, ("dim",), (F.softmax, torch.softmax, "softmax")),
    (nn.LogSoftmax, ("dim",), (F.log_softmax, torch.log_softmax, "log_softmax")),
    (nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode"), (F.max_pool1d,)),
    (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode"), (F.max_pool2d,)),
    (nn.MaxPool3d, (*_POOL, "dilation", "ceil_mode"), (F.max_pool3d,)),
    (nn.AvgPool1d, (*_POOL, "ceil_mode", "count_include_pad"), (F.avg_pool1d,)),
    (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"), (F.avg_pool2d,)),
    (nn.AvgPool3d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"), (F.avg_pool3d,)),
    (nn.AdaptiveAvgPool1d, ("output_size",), (F.adaptive_avg_pool1d,)),
    (nn.AdaptiveAvgPool2d, ("output_size",), (F.adaptive_avg_pool2d,)),
    (nn.AdaptiveAvgPool3d, ("output_size",), (F.adaptive_avg_pool3d,)),
    (nn.AdaptiveMaxPool1d, ("output_size",), (F.adaptive_max_pool1d,)),
    (nn.AdaptiveMaxPool2d, ("output_size",), (F.adaptive_max_pool2d,)),
):
    for _target in _targets:
        _AS_MODULES[_target] = (_module, _names)

_ADD: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_ADD |= {"add", "add_", "sub", "sub_"}
_MUL: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DIV: set[Any] = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
# one sample's numbers in another order, or the same; "contiguous", "clone" and "float" move none
_MOVES: set[Any] = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.clone}
_MOVES |= {"flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous", "clone"}
_MOVES |= {"float", "double", "to", "type", "detach", torch.unflatten}
_NEGATIONS: set[Any] = {operator.neg, torch.neg, "neg"}
_DROPOUTS: set[Any] = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    torch.dropout,
}
_TRANSPOSES: set[Any] = {torch.transpose, torch.permute, "transpose", "permute"}
_CHUNKS: set[Any] = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
_BOUNDED_BY_ONE: set[Any] = {torch.abs, torch.sin, torch.cos, torch.atan, torch.clamp, torch.asinh}
_BOUNDED_BY_ONE |= {"abs", "sin", "cos", "atan", "clamp", "asinh", abs}
_PRODUCTS: set[Any] = {torch.matmul, torch.bmm, operator.matmul, torch.einsum, "matmul", "bmm"}


_IN_PLACE: set[Any] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if rule_for(m) is not None:
            return True
        return type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result


def trace(model: nn.Module) -> fx.GraphModule:
    if rule_for(model) is not None:
        model = nn.Sequential(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        at = f"module {tracer.path[-1]!r}" if tracer.path else "the model"
        raise TypeError(
            f"{OP}: expected a model that torch.fx can trace, got an error in {at}: {error}; register a rule "
            "for the type of module that holds what cannot be traced"
        ) from error
    return fx.GraphModule(model, graph)


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
        if inputs and self.is_in_place(node):
            self.check_alone(node)
        value = self.evaluate(node, *args)
        self.values[node] = value
        tensors = value if isinstance(value, tuple | list) else (value,)
        if not inputs or not any(isinstance(x, Tensor) for x in tensors):
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
        if rule_for(module) is None or len(inputs) > 1:
            raise TypeError(
                f"{OP}: expected modules with a known Lipschitz constant, got {self.place(node)}; "
                f"register_rule({type(module).__name__}, rule) tells it"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(
                f"{OP}: expected modules without forward hooks, got {self.place(node)}; remove them, or "
                "turn torch's old spectral_norm and weight_norm into parametrizations"
            )

    def is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.modules[str(node.target)], "inplace", False))
        name = getattr(node.target, "__name__", str(node.target))
        written = name.endswith("_") or node.target in _IN_PLACE
        return written or bool(node.kwargs.get("inplace", False)) or "out" in node.kwargs

    def check_alone(self, node: fx.Node) -> None:
        """What is written over, and what that is a view of, must have no reader after this: it would read the new
        value, of which its bound knows nothing."""
        order = {x: i for i, x in enumerate(self.traced.graph.nodes)}
        x: fx.Node | None = node.all_input_nodes[0]
        while x is not None:
            if any(order[user] > order[node] for user in x.users):
                self.refuse(
                    node, "writes over a value that is read again later; use the form that does not"
                )
            is_view = x.target in _MOVES | _TRANSPOSES | _CHUNKS | {operator.getitem}
            if x.op == "call_module":
                is_view = isinstance(
                    self.modules[str(x.target)],
                    nn.Identity | nn.Flatten | nn.Unflatten | nn.Dropout,
                )
            x = x.all_input_nodes[0] if is_view and x.all_input_nodes else None

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
        as_module = _AS_MODULES.get(target)
        if as_module is not None:
            cls, names = as_module
            given = dict(zip(names, node.args[1:], strict=False))
            given |= {k: v for k, v in node.kwargs.items() if k in names}
            module = cls(**given)
            found = rule_for(module)
            assert found is not None
            return [self.ask(node, module, self.known[inputs[0]].shape)], found.affine, False
        spread = [self.spread(x, shape) for x in inputs]
        if target in _ADD and not (set(node.kwargs) - {"alpha", "other"}):
            alpha = abs(float(node.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
            second = [alpha if i and len(inputs) > 1 else 1.0 for i in range(len(inputs))]
            if len(inputs) == 1 and node.args[0] is not inputs[0]:
                second = [alpha]
            twice = sum(1 for x in node.args if x is inputs[0]) == 2
            if twice:  # x + x has one input in the graph's eyes
                second = [1 + alpha]
            return [_times(a, b) for a, b in zip(second, spread, strict=True)], True, False
        if target in _MUL | _DIV and len(inputs) == 1:
            others = [x for x in (*node.args, *node.kwargs.values()) if x is not inputs[0]]
            if len(others) == 1 and (target in _MUL or node.args[0] is inputs[0]):
                size = self.largest(others[0], inverse=target in _DIV)
                return [_times(size, spread[0])], True, False
        if target in _NEGATIONS or target in _DROPOUTS:
            if target in _DROPOUTS and self.argument(node, "training", 2, True):
                self.refuse(node, "drops numbers at random; pass training=self.training")
            return [1.0], True, False
        if target in _MOVES:
            return [spread[0]], True, False
        if target in _TRANSPOSES and self.leaves_batch(node):
            return [1.0], True, False
        if target in _CHUNKS and self.argument(node, "dim", 1 if "unbind" in str(target) else 2, 0):
            return [1.0], True, False
        if target is operator.getitem and self.is_slice(node):
            return [1.0], True, False
        if target in (torch.cat, torch.concat, torch.stack) and self.argument(node, "dim", 1, 0):
            parts = node.args[0]
            counts = [math.sqrt(sum(p is x for p in parts)) for x in inputs]  # type: ignore[union-attr]
            return counts, True, True
        if target in (torch.mean, "mean", torch.sum, "sum") and self.leaves_batch(node):
            n = math.prod(self.known[inputs[0]].shape) / max(1, math.prod(shape))
            factor = math.sqrt(n) if target in (torch.sum, "sum") else 1 / math.sqrt(n)
            return [factor * (1 + 2**-51)], True, False
        if target in _BOUNDED_BY_ONE and len(inputs) == 1:
            return [1.0], False, False
        if target in (torch.maximum, torch.minimum):
            return spread, False, True
        if target is F.linear and len(inputs) == 1 and node.args[0] is inputs[0]:
            return [certified_matrix_norm(self.constant(node, "weight", 1))], True, False
        if target in _PRODUCTS:
            other = self.argument(node, "other", 1, None)
            alone = len(inputs) == 1 and all(x is not inputs[0] for x in node.args[1:])
            if (
                alone
                and node.args[0] is inputs[0]
                and isinstance(other, Tensor)
                and other.dim() == 2
            ):
                return [certified_matrix_norm(other)], True, False
            self.refuse(node, "multiplies activations; " + NO_ATTENTION)
        if target is F.scaled_dot_product_attention:
            self.refuse(node, "multiplies activations; " + NO_ATTENTION)
        if target in _MUL | _DIV:
            self.refuse(node, "multiplies or divides activations, which has no constant")
        self.refuse(node, "is not known; make it a module, and register_rule its type")

    def of_module(self, node: fx.Node, module: nn.Module, shape: Shape) -> float:
        """A convolution takes up the scale of the BatchNorm that follows: the norm of both is below their product."""
        if node in self.folded:
            return 1.0
        users = list(node.users)
        known = rule_for(module)
        plain = isinstance(module, _CONVS) and known is not None and known.rule is conv_rule
        if plain and len(users) == 1 and users[0].op == "call_module":
            norm = self.modules[str(users[0].target)]
            if isinstance(norm, _BATCH_NORMS) and norm.running_var is not None:
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
        value = node.kwargs.get(name, node.args[position] if len(node.args) > position else default)
        return self.values[value] if isinstance(value, fx.Node) else value

    def constant(self, node: fx.Node, name: str, position: int) -> Tensor:
        value = self.argument(node, name, position, None)
        if not isinstance(value, Tensor):
            self.refuse(node, f"has no constant {name}")
        return value

    def largest(self, x: Any, inverse: bool) -> float:
        value = self.values[x] if isinstance(x, fx.Node) else x
        sizes = torch.as_tensor(value).detach().double().abs()
        if sizes.numel() == 0:
            return 0.0
        least, most = float(sizes.min()), float(sizes.max())
        if inverse:
            return math.inf if least == 0 or math.isnan(least) else 1 / least * (1 + 2**-51)
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
            whole = math.hypot(*parts) if euclidean else math.fsum(parts)
            return whole * (1 + 2**-51) if len(parts) > 1 else whole

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
        images = []
        for start in (
            torch.eye(n, dtype=torch.float64).view(n, *shape),
            torch.zeros(1, *shape, dtype=torch.float64),
        ):
            env: dict[fx.Node, Any] = {source: start}
            try:
                with _doubled(
                    self.modules[str(x.target)] for x in between if x.op == "call_module"
                ):
                    self.replay(node, env)
            except (
                Exception
            ):  # sizes taken from elsewhere, say: the product of the factors holds in any case
                return None
            images.append(env[node].reshape(len(start), -1))
        # u = 1e-16: a thousand roundings of numbers of the size of the factors' product and of the constant
        constant = float(torch.linalg.vector_norm(images[1]))
        rounding = 1e-12 * (self.known[node].factor + constant) * math.sqrt(n)
        return rounding, (images[0] - images[1]).mT

    def replay(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
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
                return


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


__all__ = ["BATCH", "OP", "LayerBound", "Walk", "trace"]
