"""Functions and methods that lipschitz_graph.py knows in a graph: which of them do alike."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# function or method -> module of the same meaning, and its arguments after the first, in the function's order
_POOL = ("kernel_size", "stride", "padding")
AS_MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {}
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
        AS_MODULES[_target] = (_module, _names)

ADD: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
ADD |= {"add", "add_", "sub", "sub_"}
MUL: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIV: set[Any] = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
# one sample's numbers in another order, or the same; "contiguous", "clone" and "float" move none
MOVES: set[Any] = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.clone}
MOVES |= {"flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous", "clone"}
MOVES |= {"float", "double", "to", "type", "detach", torch.unflatten}
NEGATIONS: set[Any] = {operator.neg, torch.neg, "neg"}
DROPOUTS: set[Any] = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    torch.dropout,
}
TRANSPOSES: set[Any] = {torch.transpose, torch.permute, "transpose", "permute"}
CHUNKS: set[Any] = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
BOUNDED_BY_ONE: set[Any] = {torch.abs, torch.sin, torch.cos, torch.atan, torch.clamp, torch.asinh}
BOUNDED_BY_ONE |= {"abs", "sin", "cos", "atan", "clamp", "asinh", abs}
PRODUCTS: set[Any] = {torch.matmul, torch.bmm, operator.matmul, torch.einsum, "matmul", "bmm"}
