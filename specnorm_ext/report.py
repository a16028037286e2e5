"""What ``specnorm-ext report`` shows: rows, and the table, JSON, CSV and picture made of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import natural_key, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from .estimate import Estimate
    from .lipschitz import LipschitzBound
    from .matrices import Matrix

__all__ = [
    "COLUMNS",
    "SORT_KEYS",
    "Row",
    "frobenius_norm",
    "make_rows",
    "plot",
    "sort_rows",
    "to_csv",
    "to_json",
    "to_table",
]

# The keys of a JSON object and the columns of the CSV, in this order.
COLUMNS = (
    "name",
    "shape",
    "dtype",
    "kind",
    "sigma",
    "frobenius",
    "stable_rank",
    "reads",
    "converged",
    "lower",
    "upper",
)

# Their spectral norm is that of the kernel laid out as one matrix, as torch's spectral_norm does:
# not the operator norm of the convolution, which is up to sqrt(kernel positions) larger.
_FLATTENED = ("conv", "conv_transpose")
_OPERATOR = " (operator)"  # what the kind of a convolution ends with where sigma is the operator's

# Okabe and Ito's palette: told apart under every common form of colour blindness. The markers say
# the same again for grey prints.
_STYLES = {
    "linear": ("#0072B2", "o"),
    "embedding": ("#E69F00", "s"),
    "recurrent": ("#009E73", "D"),
    "conv": ("#D55E00", "^"),
    "conv_transpose": ("#CC79A7", "v"),
    "other": ("#6E6E6E", "P"),
}
_BAD = "#B00020"
_INK = "#333333"

_CHUNK = 1 << 20  # elements taken to float64 at a time: 8 MiB, about a second-level cache
_BRACKET_DIGITS = 6  # of bounds
_NAMED_ROWS = 64  # up to here the picture has room for every name


@dataclass(frozen=True)
class Row:
    """One matrix of the report.

    ``kind`` is that of :class:`~specnorm_ext.matrices.Matrix`, followed by " (operator)" where the norms are those of
    the convolution between images. ``sigma`` is the estimate, ``lower`` a norm that some vector attains and ``upper``
    a proved bound, or inf where none was asked for; ``stable_rank`` is ``(frobenius / sigma)^2``, 0 for a zero matrix.
    ``converged`` is False for an estimate that missed the tolerance, and always where ``sigma`` is not finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    sigma: float
    frobenius: float
    stable_rank: float
    reads: int
    converged: bool
    lower: float
    upper: float = math.inf

    @property
    def flattened(self) -> bool:
        """Whether ``sigma`` is the norm of a convolution's flattened kernel."""
        return self.kind in _FLATTENED


def frobenius_norm(weight: Tensor) -> float:
    """``sqrt(sum w^2)`` of a tensor of any strided layout, summed in float64.

    Converts a bounded piece at a time, so a large half-precision tensor is never copied whole.
    Squares cannot overflow or underflow: float64 holds those of every narrower dtype, and float64
    input is scaled where its own do. NaN or Inf in ``weight`` gives NaN.
    """
    matrix = weight.detach()
    matrix = matrix.reshape(1, -1) if matrix.ndim < 2 else matrix
    total = 0.0
    for piece in _pieces(matrix):
        wide = piece.to(torch.float64)
        norm = torch.linalg.vector_norm(wide).item()
        if not 1e-140 < norm < math.inf:
            largest = torch.linalg.vector_norm(wide, math.inf).item()
            if not math.isfinite(largest):
                return math.nan
            if largest > 0:
                norm = torch.linalg.vector_norm(wide / largest).item() * largest
        total = math.hypot(total, norm)  # hypot: the sum of two squares, itself without overflow
    return total


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Views of at most _CHUNK elements that tile ``tensor``; split by its outer dimensions."""
    if tensor.numel() <= _CHUNK:
        return [tensor] if tensor.numel() else []
    axis = next(i for i, size in enumerate(tensor.shape) if size > 1)
    slice_size = tensor.numel() // tensor.shape[axis]
    if slice_size <= _CHUNK:
        return list(tensor.split(max(1, _CHUNK // slice_size), dim=axis))
    return [p for part in tensor.split(1, dim=axis) for p in _pieces(part)]


def make_rows(
    matrices: Sequence[Matrix],
    estimates: Sequence[Estimate],
    operators: Mapping[str, float] | None = None,
) -> list[Row]:
    """Pairs matrices with their estimates and adds the Frobenius norm and the stable rank.

    ``operators``: name to Frobenius norm of the convolutions whose estimate is of the operator.
    """
    operators = operators or {}
    rows = []
    for matrix, estimate in zip(matrices, estimates, strict=True):
        operator = matrix.name in operators
        frobenius = operators[matrix.name] if operator else frobenius_norm(matrix.weight)
        sigma = float(estimate.value)
        rows.append(
            Row(
                name=matrix.name,
                shape=tuple(matrix.shape),
                dtype=str(matrix.dtype).removeprefix("torch."),
                kind=matrix.kind + _OPERATOR if operator else matrix.kind,
                sigma=sigma,
                frobenius=frobenius,
                stable_rank=_stable_rank(frobenius, sigma),
                reads=estimate.n_reads,
                converged=estimate.converged and math.isfinite(sigma),
                lower=estimate.lower,
                upper=estimate.upper,
            )
        )
    return rows


def _stable_rank(frobenius: float, sigma: float) -> float:
    if sigma > 0:
        ratio = frobenius / sigma
        return ratio * ratio  # inf where ** 2 would raise
    return 0.0 if sigma == 0 and frobenius == 0 else math.nan


def _number_key(value: float) -> float:
    return math.inf if math.isnan(value) else value  # a broken matrix ranks as the largest


SORT_KEYS: dict[str, Callable[[Row], Any] | None] = {
    "file": None,
    "name": lambda row: natural_key(row.name),
    "sigma": lambda row: _number_key(row.sigma),
    "frobenius": lambda row: _number_key(row.frobenius),
    "stable_rank": lambda row: _number_key(row.stable_rank),
    "reads": lambda row: row.reads,
    "shape": lambda row: (math.prod(row.shape), row.shape),
}


def sort_rows(rows: Sequence[Row], key: str = "file", descending: bool = False) -> list[Row]:
    """Rows by one of ``SORT_KEYS``; stable, so ties keep the file's order."""
    by = SORT_KEYS[key]
    if by is None:
        return list(reversed(rows)) if descending else list(rows)
    return sorted(rows, key=by, reverse=descending)


def to_json(rows: Sequence[Row], bound: LipschitzBound | None = None) -> str:
    """A JSON list, one object a line, keys ``COLUMNS``; what is not finite becomes null. With a ``bound`` an object of
    ``matrices``, that list, and ``lipschitz``, with ``bound`` and the ``layers``."""
    matrices = []
    for row in rows:
        record = {column: getattr(row, column) for column in COLUMNS}
        for column in ("sigma", "frobenius", "stable_rank", "lower", "upper"):
            record[column] = _finite(record[column])
        matrices.append(record)
    if bound is None:
        return _json_list(matrices) + "\n"
    layers = []
    for layer in bound.layers:
        record = dataclasses.asdict(layer)
        layers.append({**record, "factor": _finite(layer.factor), "bound": _finite(layer.bound)})
    # without data nothing was searched for: the lower end, 0, is no finding
    value = json.dumps(_finite(bound.bound))
    return (
        f'{{"matrices": {_json_list(matrices)},\n'
        f'"lipschitz": {{"bound": {value}, "layers": {_json_list(layers)}}}}}\n'
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json_list(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["  " + json.dumps(record, allow_nan=False) for record in records]
    return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"


def to_csv(rows: Sequence[Row]) -> str:
    """CSV with a header line; shapes as ``64x3x3x3``, numbers in full precision or ``nan``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        record = {column: getattr(row, column) for column in COLUMNS}
        record["name"] = printable(row.name)
        record["shape"] = _shape_text(row.shape)
        record["converged"] = "true" if row.converged else "false"
        writer.writerow(record.values())
    return text.getvalue()


def to_table(rows: Sequence[Row], digits: int = 4) -> Table:
    """A rich table; an unconverged value is shown only as the bound that it is. Where upper bounds were asked for,
    the bracket has two columns of its own, rounded outwards."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    certified = any(math.isfinite(row.upper) for row in rows)
    bracket = (("lower", "right"), ("upper", "right")) if certified else ()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold", min_width=20)
    for heading, justify in (
        ("shape", "left"),
        ("dtype", "left"),
        ("kind", "left"),
        ("sigma", "right"),
        *bracket,
        ("Frobenius", "right"),
        ("stable rank", "right"),
        ("reads", "right"),
        ("converged", "left"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        # Text, never str: rich would read a name such as "[red]" as markup.
        style = "" if row.converged else "red"
        table.add_row(
            Text(printable(row.name)),
            Text(_shape_text(row.shape)),
            Text(row.dtype),
            Text(_kind_text(row.kind)),
            Text(_sigma_text(row, digits), style=style),
            *(
                Text(_bound_text(bound, max(digits, _BRACKET_DIGITS), upwards))
                for bound, upwards in ((row.lower, False), (row.upper, True))
                if certified
            ),
            Text(_number_text(row.frobenius, digits)),
            Text(_stable_rank_text(row, digits)),
            Text(str(row.reads)),
            Text("yes" if row.converged else "no", style=style),
        )
    return table


def _kind_text(kind: str) -> str:
    return f"{kind} (flattened)" if kind in _FLATTENED else kind


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _number_text(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return str(value)
    text = f"{value:#.{digits}g}" if value else "0"
    return text.removesuffix(".")


def _bound_text(value: float, digits: int, upwards: bool) -> str:
    """Rounded away from the number, so that the printed bound still is one."""
    text = _number_text(value, digits)
    if math.isfinite(value) and (float(text) < value if upwards else float(text) > value):
        step = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
        text = _number_text(value + step / 2 if upwards else value - step / 2, digits)
    return text


def _sigma_text(row: Row, digits: int) -> str:
    if row.converged or not math.isfinite(row.sigma):
        return _number_text(row.sigma, digits)
    return f">= {_bound_text(row.lower, digits, upwards=False)} (not converged)"


def _stable_rank_text(row: Row, digits: int) -> str:
    if row.converged or not math.isfinite(row.stable_rank):
        return _number_text(row.stable_rank, digits)
    most = _stable_rank(row.frobenius, row.lower)
    return f"<= {_bound_text(most, digits, upwards=True)}" if math.isfinite(most) else "unknown"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws sigma and stable rank of every matrix, in the order of ``rows``, a colour per kind.

    Up to 64 matrices have a line and a name each; more are drawn along one axis, with the largest
    named. A hollow mark is an unconverged value, a lower bound; a red cross is NaN or Inf.

    Args:
        rows: at least one.
        path: where to write; the suffix chooses the format (png, pdf, svg).
        title: what was measured, usually the file's name.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    import warnings

    from matplotlib.figure import Figure

    labels = _short_names([printable(row.name) for row in rows])
    named = len(rows) <= _NAMED_ROWS
    if named:
        figure = Figure(figsize=(11, max(3.2, 1.6 + 0.235 * len(rows))))
        axes = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    else:
        figure = Figure(figsize=(min(20.0, 11 + len(rows) / 60), 7.6))
        axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    sigma_axes, rank_axes = axes
    blocks = _blocks(labels)
    for axis, values, heading in (
        (sigma_axes, [row.sigma for row in rows], "spectral norm sigma"),
        (rank_axes, [row.stable_rank for row in rows], "stable rank"),
    ):
        _draw(axis, rows, values, blocks, named)
        (axis.set_xlabel if named else axis.set_ylabel)(heading)
    if named:
        _name_rows(sigma_axes, rows, labels)
    else:
        _name_blocks(rank_axes, blocks, len(rows))
        _name_largest(sigma_axes, rows, labels, figure.get_figwidth())
    _head(figure, rows, labels, title)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes: a blemish, not a fault.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=150, facecolor="white")


def _short_names(names: list[str], limit: int = 44) -> list[str]:
    """Names without the prefix that most share and the word "weight", cut in the middle if long."""
    tail = re.compile(r"\.(weight|weight_orig|parametrizations\.weight\.original)$")
    short = [tail.sub("", name) for name in names]
    while len(short) > 1:
        head = Counter(name.partition(".")[0] for name in short).most_common(1)[0][0] + "."
        shared = [name for name in short if name.startswith(head)]
        stripped = [name.removeprefix(head) for name in short]
        # "model." goes although lm_head lacks it; "layers." of a bare stack would take its sense.
        if len(shared) < 0.8 * len(short) or len(set(stripped)) < len(set(short)):
            break
        if any(name[len(head) :].partition(".")[0].isdigit() for name in shared):
            break
        short = stripped
    half = (limit - 3) // 2
    return [s if len(s) <= limit else f"{s[:half]}...{s[-half:]}" for s in short]


def _blocks(labels: list[str]) -> list[tuple[str, int, int]]:
    """Runs of neighbours in one block of the model: (label, first row, one past the last)."""
    blocks: list[tuple[str, int, int]] = []
    for i, label in enumerate(labels):
        numbered = re.match(r"(?:[^.]*\.)*?\d+(?=\.)", label)
        block = numbered[0] if numbered else label.partition(".")[0]
        if blocks and blocks[-1][0] == block:
            blocks[-1] = (block, blocks[-1][1], i + 1)
        else:
            blocks.append((block, i, i + 1))
    return blocks


def _draw(
    axis: Axes,
    rows: Sequence[Row],
    values: list[float],
    blocks: list[tuple[str, int, int]],
    named: bool,
) -> None:
    """Marks on stems, one per row; along y where rows have names, else along x."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    across = axis.axhspan if named else axis.axvspan
    for _, first, end in blocks[1::2]:
        across(first - 0.5, end - 0.5, color="#F3F5F7", zorder=0, linewidth=0)
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    high, low = max(positive, default=1.0), min(positive, default=1.0)
    logarithmic = high > 30 * low
    floor = low / 1.6 if logarithmic else 0.0
    ceiling = high * (high / floor) ** 0.09 if logarithmic else high * 1.14
    if logarithmic:
        (axis.set_xscale if named else axis.set_yscale)("log")
        scale = axis.xaxis if named else axis.yaxis
        wide = high > 3000 * low
        scale.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_locator(NullLocator())
    (axis.set_xlim if named else axis.set_ylim)(floor, ceiling)

    size = 42 if named else max(9.0, 30 - len(rows) / 20)
    stems = axis.hlines if named else axis.vlines
    for kind, (colour, marker) in _STYLES.items():
        for hollow in (False, True):
            places = [
                i
                for i, row in enumerate(rows)
                if _style(row) == kind and math.isfinite(values[i]) and row.converged != hollow
            ]
            # Zero has no place on a logarithmic axis; it is drawn on its floor.
            heights = [max(values[i], floor) for i in places]
            stems(places, floor, heights, color=colour, alpha=0.35, linewidth=1.6 if named else 0.8)
            x, y = (heights, places) if named else (places, heights)
            face = "white" if hollow else colour
            axis.scatter(
                x,
                y,
                s=size,
                marker=marker,
                facecolor=face,
                edgecolor=colour,
                zorder=3,
                clip_on=False,
            )
    broken = [i for i, value in enumerate(values) if not math.isfinite(value)]
    base = [floor] * len(broken)
    x, y = (base, broken) if named else (broken, base)
    axis.scatter(x, y, s=size + 10, marker="x", color=_BAD, zorder=4, clip_on=False)

    axis.grid(axis="x" if named else "y", color="#D8DDE2", linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9AA2AA")
    axis.tick_params(length=0, labelsize=8.5, colors=_INK)
    if named:
        axis.tick_params(axis="y", pad=8)
    (axis.set_ylim if named else axis.set_xlim)(
        *((len(rows) - 0.4, -0.6) if named else (-1, len(rows)))
    )


def _name_rows(axis: Axes, rows: Sequence[Row], labels: list[str]) -> None:
    # parse_math off everywhere: a "$" in a name is a dollar sign.
    axis.set_yticks(range(len(rows)), labels, parse_math=False)
    for i, row in enumerate(rows):
        text = _number_text(row.sigma, 4)
        if not row.converged and math.isfinite(row.sigma):
            text = f">= {_bound_text(row.lower, 4, upwards=False)}"
        at = row.sigma if math.isfinite(row.sigma) else axis.get_xlim()[0]
        axis.annotate(
            text,
            (max(at, axis.get_xlim()[0]), i),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=_INK if row.converged else _BAD,
        )


def _name_blocks(axis: Axes, blocks: list[tuple[str, int, int]], count: int) -> None:
    taken: dict[float, str] = {}
    # Largest blocks first, in order; 44 slanted labels side by side stay readable.
    for label, first, end in sorted(blocks, key=lambda block: block[1] - block[2]):
        middle = (first + end - 1) / 2
        if all(abs(middle - other) >= max(1.0, count / 44) for other in taken):
            taken[middle] = label
    axis.set_xticks(
        list(taken), list(taken.values()), rotation=40, ha="right", rotation_mode="anchor",
        parse_math=False,
    )  # fmt: skip


def _name_largest(
    axis: Axes, rows: Sequence[Row], labels: list[str], inches: float, count: int = 6
) -> None:
    """Names the largest, skipping a label that would run into one already placed."""
    boxes: list[tuple[float, float, float]] = []  # left, right, height, as parts of the axes
    to_axes = axis.transData + axis.transAxes.inverted()
    finite = [i for i, row in enumerate(rows) if math.isfinite(row.sigma)]
    for i in sorted(finite, key=lambda i: -rows[i].sigma)[: 4 * count]:
        text = f"{labels[i]}  {_number_text(rows[i].sigma, 4)}"
        x, y = to_axes.transform((i, max(rows[i].sigma, axis.get_ylim()[0])))
        width = 0.058 * len(text) / inches  # 7.5 points, inches a letter
        right = x + width > 1
        left = x - width if right else x
        if len(boxes) < count and all(
            left + width < a or left > b or abs(y - height) > 0.045 for a, b, height in boxes
        ):
            boxes.append((left, left + width, y))
            axis.annotate(
                text,
                (i, rows[i].sigma),
                xytext=(-4 if right else 4, 5),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=7.5,
                color=_INK,
                parse_math=False,
            )


def _head(figure: Figure, rows: Sequence[Row], labels: list[str], title: str) -> None:
    """Title, summary and legend in a strip of their own above the panels."""
    from matplotlib.lines import Line2D

    summary = f"{len(rows)} matri{'x' if len(rows) == 1 else 'ces'}"
    finite = [i for i, row in enumerate(rows) if math.isfinite(row.sigma)]
    if finite:
        top = max(finite, key=lambda i: rows[i].sigma)
        summary += f", largest sigma {_number_text(rows[top].sigma, 4)} ({labels[top]})"
    marks = []
    for kind, (colour, marker) in _STYLES.items():
        texts = {
            "other" if kind == "other" else _kind_text(r.kind) for r in rows if _style(r) == kind
        }
        if texts:
            marks.append((marker, colour, colour, " and ".join(sorted(texts))))
    if any(not row.converged and math.isfinite(row.sigma) for row in rows):
        marks.append(("o", _INK, "white", "not converged: a lower bound"))
    if len(finite) < len(rows):
        marks.append(("x", _BAD, _BAD, "NaN or Inf"))

    title = printable(title)
    title = title if len(title) <= 80 else f"{title[:38]}...{title[-38:]}"
    inch = 1 / figure.get_figheight()
    one_line = sum(0.5 + 0.075 * len(text) for *_, text in marks) < figure.get_figwidth()
    lines = 1 if one_line else 2
    left = 0.12 / figure.get_figwidth()
    style: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    figure.text(left, 1 - 0.10 * inch, title, fontsize=13, weight="bold", **style)
    figure.text(left, 1 - 0.36 * inch, summary, fontsize=9.5, color=_INK, **style)
    figure.legend(
        handles=[
            Line2D([], [], ls="", marker=m, markeredgecolor=edge, markerfacecolor=face, label=text)
            for m, edge, face, text in marks
        ],
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.56 * inch),
        ncols=math.ceil(len(marks) / lines),
        frameon=False,
        fontsize=9,
        borderaxespad=0,
        borderpad=0.2,
        handletextpad=0.2,
        columnspacing=1.6,
    )
    strip = (0.66 + 0.2 * lines) * inch
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - strip))


def _style(row: Row) -> str:
    kind = row.kind.removesuffix(_OPERATOR)
    return kind if kind in _STYLES else "other"
