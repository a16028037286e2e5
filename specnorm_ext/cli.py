"""The ``specnorm-ext`` command: ``report`` a checkpoint, ``info`` on this build, ``bench``.

Needs the optional dependencies of ``pip install "specnorm_ext[cli]"``. They are imported only where
used, so importing this module never fails for the lack of them.
"""

# No "from __future__ import annotations": typer evaluates the annotations of the nested functions
# below, whose names are local.
import contextlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import report as _report
from .checkpoint import CheckpointError, MissingPackageError, printable
from .cli_model import ModelError, conv_calls, running_user_code, working_directory_on_path
from .cli_progress import ProgressBar
from .report_conv import ConvPlans, assumed_plans, enumerated, estimated_rows, model_plans
from .report_source import Source, read_source, skipped_text

if TYPE_CHECKING:
    import torch
    import typer

    from .matrices import Matrix

__all__ = ["ReportOptions", "build_app", "main", "run_report"]

_PROGRAM = "specnorm-ext"
_ALL_CONVERGED, _NOT_CONVERGED, _BAD_INPUT = 0, 1, 2

_APP_HELP = """Spectral norms of trained weights, with bounds."""

# A paragraph is one line of the string: typer keeps line breaks as they are.
_REPORT_HELP = """Spectral norm of every matrix in a checkpoint.

FILE is a .safetensors file, a .pt, .pth or .bin state dict, an index of shards \
(model.safetensors.index.json), or a directory that holds one of these. Only tensors are read: \
nothing in the file is executed, and a pickle that needs more than tensors is refused.

Convolutions are flattened to out x (in * kernel positions), as torch's spectral_norm does, and \
marked so: this is not the operator norm of the convolution. A checkpoint does not say which \
convolutions are transposed; theirs are flattened the same way, by the first dimension.

Only the data goes to standard output; notes, the progress bar and errors go to standard error.

Exit codes: 0 every matrix converged to --tol; 1 some did not, or hold NaN or Inf (their value is \
printed as a lower bound, or nan); 2 the file cannot be read, the model cannot be made, filled, run \
or bounded, or a wrong option.

With --conv operator a convolution is reported by its norm as a map between images, not flattened. \
frobenius and stable_rank are of that map, too; reads count it and its transposed, applied to four \
images. A checkpoint holds no geometry: every convolution is then taken at the spatial size of \
--input-size, with stride 1, dilation 1 and zero padding (k - 1) / 2, and those with even kernels \
stay flattened. With --model each has its own geometry, and the size that it sees when the model \
runs on one zeros input of --input-size.

--model package.module:factory runs your code: it imports the module, the current directory first \
on the path, and calls the factory without arguments for a torch.nn.Module. FILE, if given, is \
loaded into it, strictly, and weights are reported as the layers use them in eval. Without this \
flag no code but this program's runs.

With --lipschitz a bound of the Lipschitz constant of the model follows, layer by layer; the JSON \
is then an object: matrices, the list, and lipschitz.

With --certified each norm comes between two bounds that are proofs, rounding included (Rump 2006): \
columns lower and upper, which in JSON and CSV are always there; upper is null, or inf, without it.
"""


@dataclass(frozen=True)
class ReportOptions:
    """The options of ``specnorm-ext report``; the fields are its flags."""

    file: Path | None = None
    tol: float = 1e-3
    max_reads: int = 1000
    sort: str = "file"
    descending: bool = False
    top: int | None = None
    match: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    json: bool = False
    csv: bool = False
    certified: bool = False
    conv: str = "flattened"
    input_size: str | None = None
    model: str | None = None
    lipschitz: bool = False
    plot: Path | None = None
    threads: int | None = None
    progress: bool = True


class _InputError(Exception):
    """Wrong input or usage; the message is one line for the user."""


def main() -> None:
    """The entry point of the ``specnorm-ext`` command."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the report.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app = build_app()
    except MissingPackageError as error:
        _note(f"error: {error}")
        sys.exit(_BAD_INPUT)
    app(prog_name=_PROGRAM)


def run_report(options: ReportOptions) -> int:
    """Reads, estimates and prints; returns the exit code.

    Raises:
        CheckpointError: the file cannot be read, or holds no matrix.
        MissingPackageError: an optional dependency is missing.
        ModelError: the model cannot be made, filled or run, or has no bound for --lipschitz.
        _InputError: an option is wrong, or no matrix is left to report.
    """
    # Every complaint that can be made before minutes of work is made before them.
    checked = _check_options(options)
    with working_directory_on_path() if options.model is not None else contextlib.nullcontext():
        return _report_checked(options, checked)


@dataclass(frozen=True)
class _Checked:
    """What the texts of the options mean."""

    match: list[re.Pattern[str]]
    exclude: list[re.Pattern[str]]
    input_size: tuple[int, ...] | None


def _report_checked(options: ReportOptions, checked: _Checked) -> int:
    import torch

    source = read_source(options.file, options.model)
    found = len(source.matrices)
    matrices = [
        matrix
        for matrix in source.matrices
        if _matches(checked, [matrix.name, *source.aliases.get(matrix.name, [])])
    ]
    if not matrices:
        raise _InputError(f"none of the {found} matrices passes --match and --exclude")

    threads = torch.get_num_threads()
    start = time.perf_counter()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        operators = _operators(matrices, source, options, checked.input_size)
        bound = _lipschitz(source.model, checked.input_size) if options.lipschitz else None
        with ProgressBar(options.progress) as bar:
            rows = estimated_rows(
                matrices,
                operators,
                tol=options.tol,
                max_reads=options.max_reads,
                certified=options.certified,
                progress=bar.update,
            )
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start

    shown = _report.sort_rows(rows, options.sort, options.descending)[: options.top]
    if options.json:
        sys.stdout.write(_report.to_json(shown, bound))
    elif options.csv:
        sys.stdout.write(_report.to_csv(shown))
    else:
        # As many digits as the tolerance vouches for, and four in any case.
        _print_table(shown, min(15, max(4, 1 + math.ceil(-math.log10(options.tol)))))
        if bound is not None:
            sys.stdout.write("".join(f"{printable(x)}\n" for x in bound.table().splitlines()))
    sys.stdout.flush()
    if options.plot is not None:
        try:
            _report.plot(rows, options.plot, source.name)
        except OSError as error:
            raise _InputError(f"--plot {printable(options.plot)}: {error.strerror}") from None
        _note(f"wrote {printable(options.plot)}")
    _print_notes(rows, source, operators, options, seconds)
    return _ALL_CONVERGED if all(row.converged for row in rows) else _NOT_CONVERGED


def _operators(
    matrices: "Sequence[Matrix]",
    source: Source,
    options: ReportOptions,
    input_size: tuple[int, ...] | None,
) -> ConvPlans:
    if options.conv != "operator" or input_size is None:
        return ConvPlans()
    if source.model is not None:
        return model_plans(matrices, conv_calls(source.model, input_size), input_size)
    plans = assumed_plans(matrices, input_size)
    if plans.left and not plans.plans:
        left = [f"{name} ({why})" for name, why in plans.left.items()]
        raise _InputError(
            f"--conv operator --input-size {','.join(map(str, input_size))}: fits no convolution:"
            f" {enumerated(left)}; --model gives their geometry"
        )
    return plans


def _lipschitz(model: "torch.nn.Module | None", input_size: tuple[int, ...] | None) -> Any:
    from .lipschitz import lipschitz_bound

    assert model is not None
    assert input_size is not None
    with running_user_code("--lipschitz"):
        return lipschitz_bound(model, input_size)


def _check_options(options: ReportOptions) -> _Checked:
    if options.file is None and options.model is None:
        raise _InputError("expected FILE, a checkpoint, or --model package.module:factory")
    if options.json and options.csv:
        raise _InputError("--json and --csv exclude each other; give one of them")
    if not 0 < options.tol < 1:
        raise _InputError(f"--tol: expected a number between 0 and 1, got {options.tol:g}")
    for flag, count in (
        ("--max-reads", options.max_reads),
        ("--top", options.top),
        ("--threads", options.threads),
    ):
        if count is not None and count < 1:
            raise _InputError(f"{flag}: expected at least 1, got {count}")
    if options.sort not in _report.SORT_KEYS:
        raise _InputError(
            f"--sort: expected one of {', '.join(_report.SORT_KEYS)}, got"
            f" {printable(options.sort)!r}"
        )
    if options.plot is not None:
        _check_plot(options.plot)
    return _Checked(
        _patterns("--match", options.match),
        _patterns("--exclude", options.exclude),
        _check_input_size(options),
    )


def _check_input_size(options: ReportOptions) -> tuple[int, ...] | None:
    """Of the three options that go together, --conv, --lipschitz and --input-size."""
    if options.conv not in ("flattened", "operator"):
        raise _InputError(
            f"--conv: expected flattened or operator, got {printable(options.conv)!r}"
        )
    if options.lipschitz and options.csv:
        raise _InputError("--lipschitz and --csv exclude each other; --json takes both reports")
    if options.lipschitz and options.model is None:
        raise _InputError(
            "--lipschitz: expected --model package.module:factory beside it; a checkpoint does not say how its"
            " layers are connected"
        )
    wanting = "--lipschitz" if options.lipschitz else f"--conv {options.conv}"
    text = options.input_size
    if text is None:
        if options.lipschitz or options.conv == "operator":
            raise _InputError(f"{wanting}: expected --input-size C,H,W beside it, such as 3,32,32")
        return None
    if not options.lipschitz and options.conv != "operator":
        raise _InputError(
            "--input-size: expected --conv operator or --lipschitz beside it; nothing else depends on it"
        )
    shown = f"--input-size: expected C,H,W, such as 3,32,32, got {printable(text)!r}"
    # bounded: int() of a huge run of digits is an error
    if not re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*", text):
        raise _InputError(shown)
    size = tuple(int(x) for x in text.split(","))
    if min(size) < 1:
        raise _InputError(f"{shown}; sizes are at least 1")
    if options.model is None and not 2 <= len(size) <= 4:
        raise _InputError(f"{shown}; channels and 1 to 3 spatial sizes")
    return size


def _check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "--plot") from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise _InputError(f"--plot {printable(path)}: expected a name ending in .png, .pdf or .svg")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else "its directory does not exist"
        raise _InputError(f"--plot {printable(path)}: {what}")


def _patterns(flag: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise _InputError(
                f"{flag} {printable(pattern)!r}: not a regular expression ({error})"
            ) from None
    return compiled


def _matches(checked: _Checked, names: list[str]) -> bool:
    wanted = not checked.match or any(p.search(name) for p in checked.match for name in names)
    return wanted and not any(p.search(name) for p in checked.exclude for name in names)


def _print_table(rows: Sequence[_report.Row], digits: int) -> None:
    try:
        from rich.console import Console
    except ImportError:
        raise MissingPackageError("rich", "the table (--json and --csv do not)") from None
    table = _report.to_table(rows, digits)
    console = Console(file=sys.stdout, highlight=False)
    needed = Console(width=100_000).measure(table)
    # Long names fold in a terminal; numbers are never cut, and a pipe has no width to keep to.
    width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.width = width
    console.print(table, crop=False)


def _print_notes(
    rows: Sequence[_report.Row],
    source: Source,
    operators: ConvPlans,
    options: ReportOptions,
    seconds: float,
) -> None:
    if any(row.flattened for row in rows) and options.conv == "flattened":
        _note(
            "convolutions are flattened to out x (in * kernel positions), as torch's spectral_norm"
            " does; this is not the operator norm of the convolution"
        )
    for line in operators.notes():
        _note(line)
    if source.skipped:
        _note(skipped_text(source.skipped).removeprefix("; "))
    if source.stays:
        _note(
            "not floating-point, so not read from the file but as the factory made them:"
            f" {enumerated(source.stays)}"
        )
    reported = {row.name for row in rows}
    for name, others in source.aliases.items():
        if name in reported:
            _note(f"tied, reported once: {printable(name)} = {', '.join(map(printable, others))}")
    broken = sum(not math.isfinite(row.sigma) for row in rows)
    missed = sum(not row.converged for row in rows) - broken
    count = f"{len(rows)} matri{'x' if len(rows) == 1 else 'ces'}"
    parts = [f"{len(rows) - broken - missed} of {count} converged to {options.tol:g}"]
    if missed:
        parts.append(
            f"{missed} not converged within {options.max_reads} reads (raise --max-reads or --tol)"
        )
    if broken:
        parts.append(f"{broken} with NaN or Inf")
    _note(f"{', '.join(parts)}; {seconds:.2f} s")


def _run_info(as_json: bool) -> int:
    import specnorm_ext

    info: dict[str, Any] = dict(specnorm_ext.build_info())
    if as_json:
        sys.stdout.write(json.dumps(info, indent=2, default=str) + "\n")
        return 0
    width = max(map(len, info), default=0)
    for key, value in info.items():
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            text = ", ".join(map(str, value))
        else:
            text = str(value)
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {text or 'none'}\n")
    return 0


def _bench_scripts(root: Path) -> dict[str, Path]:
    """The runnable scripts of the repository's bench/; empty for an installed package."""
    # pyproject.toml tells the repository from a site-packages that happens to hold a "bench".
    if not (root / "pyproject.toml").is_file():
        return {}
    return {
        path.stem: path
        for path in sorted((root / "bench").glob("bench_*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }


def _run_bench(names: Sequence[str], only_list: bool) -> int:
    scripts = _bench_scripts(Path(__file__).resolve().parent.parent)
    if not scripts:
        raise _InputError(
            "the benchmarks are not part of the installed package; clone the repository and run"
            f" `{_PROGRAM} bench` or `make bench` there after `pip install -e .`"
        )
    unknown = [name for name in names if name not in scripts]
    if unknown:
        raise _InputError(
            f"no benchmark named {printable(unknown[0])!r}; expected one of {', '.join(scripts)}"
        )
    if only_list:
        sys.stdout.write("".join(f"{name}  {path}\n" for name, path in scripts.items()))
        return 0
    failed = []
    for name in names or scripts:
        _note(f"bench: {name}")
        if subprocess.run([sys.executable, str(scripts[name])], check=False).returncode:
            failed.append(name)
    if failed:
        _note(f"error: failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run_guarded(work: Callable[..., int], *args: Any) -> int:
    """The exit code of ``work``; what the user can mend becomes one line on standard error."""
    try:
        return work(*args)
    except (_InputError, CheckpointError, MissingPackageError, ModelError) as error:
        _note(f"error: {error}")
        return _BAD_INPUT


def build_app() -> "typer.Typer":
    """The typer application.

    Raises:
        MissingPackageError: typer is not installed.
    """
    try:
        import typer
    except ImportError:
        raise MissingPackageError("typer", "the command line") from None

    app = typer.Typer(
        help=_APP_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def run(work: Callable[..., int], *args: Any) -> None:
        raise typer.Exit(_run_guarded(work, *args))

    @app.command(help=_REPORT_HELP)
    def report(
        file: Annotated[
            Path | None,
            typer.Argument(
                help="the checkpoint; optional with --model", metavar="FILE", show_default=False
            ),
        ] = None,
        tol: Annotated[
            float, typer.Option(help="relative tolerance of sigma, by residual", metavar="TOL")
        ] = 1e-3,
        max_reads: Annotated[
            int, typer.Option(help="reads of a matrix before giving up", metavar="N")
        ] = 1000,
        sort: Annotated[
            str,
            typer.Option(help=f"order: {', '.join(_report.SORT_KEYS)}", metavar="KEY"),
        ] = "file",
        descending: Annotated[
            bool, typer.Option("--descending", "--reverse", "-r", help="largest or last first")
        ] = False,
        top: Annotated[
            int | None, typer.Option(help="print only the first N rows", metavar="N")
        ] = None,
        match: Annotated[
            list[str] | None,
            typer.Option(
                help="only names in which this regular expression is found; repeatable",
                metavar="REGEX",
            ),
        ] = None,
        exclude: Annotated[
            list[str] | None, typer.Option(help="not these names; repeatable", metavar="REGEX")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="print a JSON list (an object with --lipschitz)")
        ] = False,
        as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
        certified: Annotated[
            bool,
            typer.Option(
                "--certified",
                help="a lower and a proved upper bound for each norm, rounding included; a few seconds for "
                "each 4096 x 4096 matrix",
            ),
        ] = False,
        conv: Annotated[
            str,
            typer.Option(
                help="norm of convolutions: flattened, of the kernel as a matrix, or operator, of what it does to an"
                " image of --input-size",
                metavar="KIND",
            ),
        ] = "flattened",
        input_size: Annotated[
            str | None,
            typer.Option(
                help="one input without the batch: channels, then spatial sizes, such as 3,32,32",
                metavar="C,H,W",
            ),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="call this function for the model and load FILE into it, if given; this runs your code",
                metavar="MODULE:FACTORY",
            ),
        ] = None,
        lipschitz: Annotated[
            bool,
            typer.Option(
                "--lipschitz",
                help="also bound the Lipschitz constant of the --model for inputs of --input-size",
            ),
        ] = False,
        plot: Annotated[
            Path | None,
            typer.Option(help="draw sigma by layer to this .png, .pdf or .svg", metavar="PATH"),
        ] = None,
        threads: Annotated[
            int | None, typer.Option(help="CPU threads (torch decides without it)", metavar="N")
        ] = None,
        no_progress: Annotated[
            bool, typer.Option("--no-progress", help="never draw a progress bar")
        ] = False,
    ) -> None:
        options = ReportOptions(
            file=file,
            tol=tol,
            max_reads=max_reads,
            sort=sort,
            descending=descending,
            top=top,
            match=tuple(match or ()),
            exclude=tuple(exclude or ()),
            json=as_json,
            csv=as_csv,
            certified=certified,
            conv=conv,
            input_size=input_size,
            model=model,
            lipschitz=lipschitz,
            plot=plot,
            threads=threads,
            progress=not no_progress,
        )
        run(run_report, options)

    @app.command(help="What this build is: version, kernels, compiler, torch.")
    def info(
        as_json: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
    ) -> None:
        run(_run_info, as_json)

    @app.command(help="Run the repository's benchmarks, or those named; needs a clone of it.")
    def bench(
        names: Annotated[
            list[str] | None, typer.Argument(metavar="NAME", show_default=False)
        ] = None,
        only_list: Annotated[bool, typer.Option("--list", help="print them, run none")] = False,
    ) -> None:
        run(_run_bench, names or (), only_list)

    return app


def _note(text: str) -> None:
    sys.stderr.write(f"{_PROGRAM}: {text}\n")


if __name__ == "__main__":
    main()
