"""The weight tensors of a checkpoint file, read without executing anything in it.

safetensors files hold no code by design. Pickles (.pt, .pth, .bin) go through torch's weights-only
unpickler and nothing else: a pickle that asks for any other class or function is refused.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MissingPackageError",
    "natural_key",
    "printable",
    "read_checkpoint",
]

# What the kernels take. Anything else with two or more dimensions is counted in Checkpoint.skipped.
_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_SAFETENSORS_DTYPES = {
    **{code: str(dtype).removeprefix("torch.") for dtype, code in _DTYPES.items()},
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

# Keys that only wrap one model's weights, as training scripts and frameworks save them.
_WRAPPERS = frozenset({"state_dict", "model_state_dict", "model", "module", "params"})

# Beyond this a pickle is built to exhaust the stack; real checkpoints nest about six deep.
_MAX_DEPTH = 64

_LFS_POINTER = b"version https://git-lfs"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_PROTOCOLS = tuple(bytes([0x80, version]) for version in range(2, 6))

# Where a directory is given. An index before single files: the shards that it lists lie next to
# it. safetensors before pickles: the same weights are often stored both ways. The usual name
# settles it where training left optimizer.pt and training_args.bin beside the weights.
_DIRECTORY_ORDER = (
    ("model.safetensors.index.json", (".safetensors.index.json",)),
    ("model.safetensors", (".safetensors",)),
    ("pytorch_model.bin.index.json", (".bin.index.json",)),
    ("pytorch_model.bin", (".pt", ".pth", ".bin")),
)


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message is one line that says why."""


class MissingPackageError(ImportError):
    """A package of the ``cli`` extra is not installed."""

    def __init__(self, package: str, what: str) -> None:
        super().__init__(f'{what} needs {package}; install it with pip install "specnorm_ext[cli]"')


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: the file, index file or directory that was asked for.
        tensors: name to tensor, on the CPU, dense, float16, bfloat16, float32 or float64, any
            number of dimensions. Pickles keep their own order; safetensors writers sort names as
            text, so there the order is by name with numbers counted (``layers.2`` before
            ``layers.10``). Memory-mapped where the format allows: a tensor is read when used.
        skipped: dtype (or another reason) to the number of tensors of two or more dimensions that
            are not in ``tensors`` because of it.
        aliases: name in ``tensors`` to further names of the very same memory (tied weights).
    """

    path: Path
    tensors: dict[str, Tensor]
    skipped: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the floating-point tensors of a checkpoint. Nothing in the file is ever executed.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth`` or ``.bin`` file with a state dict, also
            nested in dicts and lists (keys are joined with ``.``; a lone outer ``state_dict``,
            ``model_state_dict``, ``model``, ``module`` or ``params`` is left out of the names;
            optimizer states are skipped); an index of shards (``*.index.json``); or a directory
            that holds one of these. The content decides the format, not the suffix.

    Returns:
        A :class:`Checkpoint`.

    Raises:
        CheckpointError: the file is missing, empty, damaged, of another format, or a pickle that
            needs more than tensors.
        MissingPackageError: a safetensors file, and ``safetensors`` is not installed.
    """
    path = Path(path)
    found = _find_in_directory(path) if path.is_dir() else path
    reader = _Reader()
    if found.suffix == ".json":
        _read_index(found, reader)
    else:
        _read_file(found, reader)
    tensors, aliases = _merge_aliases(reader.tensors)
    return Checkpoint(path, tensors, reader.skipped, aliases)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that counts the numbers in a name: ``layers.2`` comes before ``layers.10``."""
    parts = re.split(r"([0-9]{1,18})", name)  # bounded: int() of a huge run of digits is an error
    return tuple((0, int(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(parts))


def printable(text: object) -> str:
    """``text`` with control characters escaped.

    Names come from files of unknown origin; unescaped, they could drive the terminal.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


@dataclass
class _Reader:
    """Collects tensors and counts what is left out."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_quantized:
            reason = "quantized" if tensor.is_quantized else "sparse"
        elif tensor.device.type != "cpu":
            reason = f"on the {tensor.device.type} device"
        elif tensor.dtype not in _DTYPES:
            reason = str(tensor.dtype).removeprefix("torch.")
        else:
            unique, n = name, 1
            while unique in self.tensors:  # {"a": {"b": x}, "a.b": y}: neither may vanish
                n += 1
                unique = f"{name}#{n}"
            self.tensors[unique] = tensor.detach()
            return
        if tensor.ndim >= 2:
            self.skip(reason)


def _find_in_directory(path: Path) -> Path:
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(_os_message(path, error)) from None
    for usual, suffixes in _DIRECTORY_ORDER:
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1 or usual in found:
            return path / (found[0] if len(found) == 1 else usual)
        if found:
            raise CheckpointError(
                f"{printable(path)}: expected one checkpoint in this directory, found {len(found)}"
                f" ({_enumerate(found)}); name the file to read"
            )
    raise CheckpointError(
        f"{printable(path)}: this directory holds no *.safetensors, *.safetensors.index.json, *.pt,"
        " *.pth or *.bin file"
    )


def _read_index(path: Path, reader: _Reader) -> None:
    _check_regular(path)
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(_os_message(path, error)) from None
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise CheckpointError(
            f"{printable(path)}: not valid JSON ({_first_sentence(error)})"
        ) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{printable(path)}: expected an index with a "weight_map" of tensor names to shard'
            " files, as transformers and huggingface_hub write it"
        )
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                f"{printable(path)}: shard {printable(shard)!r} of tensor {printable(name)!r} is"
                " not a path inside the index's own folder; absolute paths and '..' are refused"
            )
        shards.setdefault(shard, []).append(name)

    whole = _Reader()
    for shard, names in sorted(shards.items()):
        _read_file(path.parent / shard, whole, only=frozenset(names), index=path)
    # Over all shards, so that the order does not depend on how the layers were dealt out.
    reader.tensors.update(sorted(whole.tensors.items(), key=lambda item: natural_key(item[0])))
    reader.skipped.update(whole.skipped)


def _stays_inside(shard: str) -> bool:
    # Judged by the text alone: hub caches keep shards as links out of the folder, which is fine.
    # Windows' rules cover POSIX paths too: both slashes, drives, and a leading slash as an anchor.
    parsed = PureWindowsPath(shard)
    return bool(shard) and "\0" not in shard and not parsed.anchor and ".." not in parsed.parts


def _read_file(
    path: Path, reader: _Reader, only: frozenset[str] | None = None, index: Path | None = None
) -> None:
    """Adds the tensors of one file; of a shard, those that the index names (all must be there)."""
    try:
        file_format = _format_of(path)
    except CheckpointError as error:
        where = f" (a shard named by {printable(index)})" if index else ""
        raise CheckpointError(f"{error}{where}") from None
    if file_format == "safetensors":
        names = _read_safetensors(path, reader, only)
    else:
        names = _read_pickle(path, file_format, reader, only)
    missing = sorted((only or frozenset()) - names)
    if missing:
        raise CheckpointError(
            f"{printable(path)}: lacks {len(missing)} of the tensors that {printable(index)}"
            f" places there ({_enumerate(missing)}); the shards are of different checkpoints"
        )


def _check_regular(path: Path) -> None:
    try:
        exists, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{printable(path)}: {_first_sentence(error)}") from None
    if not exists:
        raise CheckpointError(f"{printable(path)}: no such file")
    if not regular:
        raise CheckpointError(f"{printable(path)}: not a regular file")


def _format_of(path: Path) -> str:
    """ "safetensors", "zip" (torch.save since 1.6) or "legacy" (torch.save before), by content."""
    _check_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise CheckpointError(_os_message(path, error)) from None
    name = printable(path)
    if size == 0:
        raise CheckpointError(f"{name}: the file is empty")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{name}: a Git LFS pointer, not the weights; run `git lfs pull` to download them"
        )
    # The header's length comes first, so the two leading bytes alone can look like a pickle's.
    if head[8:9] == b"{" and not head.startswith(_ZIP_MAGIC):
        return "safetensors"
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{name}: not a safetensors file (its header does not start with a JSON object);"
            " it is damaged or carries the wrong suffix"
        )
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if head.startswith(_PICKLE_PROTOCOLS):
        return "legacy"
    raise CheckpointError(
        f"{name}: neither a safetensors file nor a state dict saved by torch.save; expected"
        " .safetensors, *.safetensors.index.json, .pt, .pth or .bin"
    )


def _read_safetensors(path: Path, reader: _Reader, only: frozenset[str] | None) -> set[str]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingPackageError("safetensors", f"reading {printable(path)}") from None
    codes = set(_DTYPES.values())
    names: set[str] = set()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(file.keys(), key=natural_key):
                if only is not None and name not in only:
                    continue
                names.add(name)
                entry = file.get_slice(name)
                code = str(entry.get_dtype())
                if code in codes:
                    reader.add(name, file.get_tensor(name))
                elif len(entry.get_shape()) >= 2:
                    # Not loaded: torch need not know every dtype that the format does.
                    reader.skip(_SAFETENSORS_DTYPES.get(code, printable(code.lower())))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{printable(path)}: damaged safetensors file ({_first_sentence(error)})"
        ) from None
    return names


def _read_pickle(
    path: Path, file_format: str, reader: _Reader, only: frozenset[str] | None
) -> set[str]:
    content = _load_weights_only(path, file_format)
    found: list[tuple[tuple[str, ...], Tensor]] = []
    if isinstance(content, Tensor):
        found.append(((path.stem,), content))
    else:
        _walk(content, (), found, reader, set(), path)
    matrices = [keys for keys, tensor in found if tensor.ndim >= 2]
    prefix = _wrapper(matrices)
    names: set[str] = set()
    for keys, tensor in found:
        if keys[: len(prefix)] == prefix:
            keys = keys[len(prefix) :]
        name = ".".join(keys)
        if only is None or name in only:
            names.add(name)
            reader.add(name, tensor)
    return names


def _wrapper(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The leading keys that every path shares and that only say "here are the weights"."""
    prefix: tuple[str, ...] = ()
    while paths and all(len(keys) > len(prefix) + 1 for keys in paths):
        heads = {keys[len(prefix)] for keys in paths}
        if len(heads) != 1 or not heads <= _WRAPPERS:
            break
        prefix += (heads.pop(),)
    return prefix


def _load_weights_only(path: Path, file_format: str) -> Any:
    name = printable(path)
    mmap = False
    if file_format == "zip":
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{name}: damaged or cut off; not a complete zip archive ({_first_sentence(error)})"
            ) from None
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(
                f"{name}: a TorchScript archive, which holds code; only tensors are read. Save the"
                " weights with torch.save(model.state_dict(), path)"
            )
        # Mapped, a compressed record would be read as if its compressed bytes were the weights.
        mmap = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    try:
        with warnings.catch_warnings():
            # About the pickle's protocol and torch's own storages: nothing to act on here.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(name, str(error))) from None
    except MemoryError:
        raise CheckpointError(f"{name}: does not fit into memory, or is damaged") from None
    except Exception as error:
        # A damaged pickle can fail anywhere in torch's reader: KeyError, struct.error,
        # AssertionError and more have all been seen. None of it is a fault of this program.
        raise CheckpointError(
            f"{name}: damaged, or not a state dict saved by torch.save"
            f" ({type(error).__name__}: {_first_sentence(error)})"
        ) from None


def _refusal(name: str, message: str) -> str:
    # torch's own advice is to load with weights_only=False; it must not reach the user.
    wanted = re.search(r"GLOBAL (\S+)|Can only (?:build|create) .*<class '(.+?)'>", message)
    if wanted:
        what = printable(wanted[1] or wanted[2])
        return (
            f"{name}: refused, the pickle needs more than tensors ({what}) and loading"
            " it could run code. Save only the weights, with"
            " torch.save(model.state_dict(), path), or as safetensors"
        )
    reason = re.sub(r"^.*?WeightsUnpickler error: ", "", message, flags=re.DOTALL)
    return f"{name}: damaged, or a pickle that needs more than tensors ({_first_sentence(reason)})"


def _walk(
    value: Any,
    keys: tuple[str, ...],
    found: list[tuple[tuple[str, ...], Tensor]],
    reader: _Reader,
    seen: set[int],
    path: Path,
) -> None:
    """Appends every tensor below ``value`` with the keys that lead to it."""
    if isinstance(value, Tensor):
        found.append((keys, value))
        return
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return
    # A container is entered once: a pickle can hold itself, or 2^50 paths to one list.
    if id(value) in seen:
        return
    seen.add(id(value))
    if len(keys) >= _MAX_DEPTH:
        raise CheckpointError(
            f"{printable(path)}: nested deeper than {_MAX_DEPTH} levels; not a checkpoint"
        )
    optimizer = isinstance(value, Mapping) and "param_groups" in value and "state" in value
    below: list[tuple[tuple[str, ...], Tensor]] = [] if optimizer else found
    for key, item in items:
        _walk(item, (*keys, str(key)), below, reader, seen, path)
    if optimizer:
        moments = sum(tensor.ndim >= 2 for _, tensor in below)
        if moments:
            reader.skip("optimizer state", moments)


def _merge_aliases(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Drops tensors that are the same view of the same memory as an earlier one."""
    first: dict[tuple[object, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Empty tensors all share the null pointer and are not tied.
        owner = first.setdefault(view, name) if tensor.numel() else name
        if owner == name:
            kept[name] = tensor
        else:
            aliases.setdefault(owner, []).append(name)
    return kept, aliases


def _enumerate(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ..."


def _os_message(path: Path, error: OSError) -> str:
    return f"{printable(path)}: cannot be read ({error.strerror or error})"


def _first_sentence(error: object) -> str:
    """The first sentence of a message; those of torch's C++ go on with advice and a backtrace."""
    lines = str(error).strip().splitlines()
    return printable(lines[0].partition(". ")[0].strip()[:200]) if lines else "no reason given"
