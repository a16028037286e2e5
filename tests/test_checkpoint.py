"""checkpoint.py: what is read, what is left out and said so, and what is refused, never run."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
from safetensors.torch import save_file

from specnorm_ext.checkpoint import CheckpointError, natural_key, printable, read_checkpoint


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def refused(path: Path) -> str:
    """The message of the refusal: one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


class Shell:
    """Unpickling an instance with pickle.load runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


# ---- safetensors --------------------------------------------------------------------------------


def test_safetensors_keeps_the_four_dtypes_and_counts_the_others(tmp_path):
    kept = {
        "a": torch.randn(3, 2),
        "b": torch.randn(3, 2).bfloat16(),
        "c": torch.randn(3, 2).half(),
        "d": torch.randn(3, 2).double(),
        "one_dimension": torch.randn(4),
    }
    left = {
        "i8": torch.ones(2, 2, dtype=torch.int8),
        "i8_too": torch.ones(2, 2, 2, dtype=torch.int8),
        "f8": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "counter": torch.tensor(3),  # not a matrix: not worth a word
    }
    save_file({**kept, **left}, tmp_path / "m.safetensors")
    checkpoint = read_checkpoint(str(tmp_path / "m.safetensors"))
    same(checkpoint.tensors, kept)
    assert checkpoint.skipped == {"float8_e4m3fn": 1, "int8": 2}
    assert checkpoint.aliases == {}


def test_safetensors_names_are_ordered_with_numbers_counted(tmp_path):
    names = [f"layers.{i}.w" for i in range(12)]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "m.safetensors")
    assert list(read_checkpoint(tmp_path / "m.safetensors").tensors) == names


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_joined_in_the_order_of_names(tmp_path):
    tensors = {f"layers.{i}.w": torch.randn(2, 3) for i in range(11)}
    names = list(tensors)
    index = sharded(
        tmp_path,
        {
            "two.safetensors": {name: tensors[name] for name in names[::2]},
            "one.safetensors": {name: tensors[name] for name in names[1::2]},
        },
    )
    same(read_checkpoint(index).tensors, tensors)
    same(read_checkpoint(tmp_path).tensors, tensors)  # the directory has shards and an index


def test_a_shard_gives_only_what_the_index_says(tmp_path):
    index = sharded(tmp_path, {"s.safetensors": {"a": torch.ones(2, 2), "stale": torch.ones(2, 2)}})
    index.write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    assert list(read_checkpoint(index).tensors) == ["a"]


def test_shards_linked_from_a_cache_are_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    sharded(snapshot, {"s.safetensors": {"a": torch.ones(2, 2)}})
    (snapshot / "s.safetensors").rename(blobs / "0123")
    (snapshot / "s.safetensors").symlink_to(blobs / "0123")
    assert list(read_checkpoint(snapshot).tensors) == ["a"]


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors", "C:\\x", ""],
)
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "inside the index's own folder" in refused(index)


def test_absolute_shards_are_refused(tmp_path):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": str(tmp_path / "s.safetensors")}}))
    assert "inside the index's own folder" in refused(index)


def test_an_index_whose_shards_do_not_fit_is_refused(tmp_path):
    index = sharded(tmp_path, {"s.safetensors": {"a": torch.ones(2, 2)}})
    index.write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the tensors .*\(b\)"):
        read_checkpoint(index)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone.safetensors: no such file .*index.json"):
        read_checkpoint(index)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    refused(index)


# ---- pickles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dict(tmp_path, zipped, suffix):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    path = tmp_path / f"m{suffix}"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    expected = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    checkpoint = read_checkpoint(path)
    same(checkpoint.tensors, expected)
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())
    assert checkpoint.skipped == {}


def test_a_compressed_archive_is_not_mapped(tmp_path):
    weight = torch.zeros(64, 64)
    weight[0, 0] = 3.0
    torch.save({"w": weight}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as source,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    same(read_checkpoint(tmp_path / "m.pt").tensors, {"w": weight})


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_lone_wrapper_is_left_out_of_the_names(tmp_path, wrapper):
    weight = torch.randn(3, 3)
    moments = {"state": {0: {"exp_avg": torch.randn(3, 3)}}, "param_groups": [{"params": [0]}]}
    torch.save(
        {wrapper: {"fc.weight": weight}, "epoch": 3, "optimizer": moments, "lr": [0.1]},
        tmp_path / "m.pt",
    )
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    same(checkpoint.tensors, {"fc.weight": weight})
    assert checkpoint.skipped == {"optimizer state": 1}


def test_several_networks_are_joined_by_dots(tmp_path):
    a, b = torch.randn(3, 3), torch.randn(2, 2)
    torch.save({"generator": {"fc": {"weight": a}}, "ema": [b]}, tmp_path / "m.pt")
    same(read_checkpoint(tmp_path / "m.pt").tensors, {"generator.fc.weight": a, "ema.0": b})


def test_names_that_collide_after_joining_are_both_kept(tmp_path):
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    torch.save({"x": {"y": a}, "x.y": b}, tmp_path / "m.pt")
    same(read_checkpoint(tmp_path / "m.pt").tensors, {"x.y": a, "x.y#2": b})


def test_a_bare_tensor_is_named_after_the_file(tmp_path):
    weight = torch.randn(3, 3)
    torch.save(weight, tmp_path / "proj.pt")
    same(read_checkpoint(tmp_path / "proj.pt").tensors, {"proj": weight})


def test_tied_weights_are_read_once(tmp_path):
    weight, other = torch.randn(4, 4), torch.zeros(0, 3)
    tensors = {"embed": weight, "head": weight, "part": weight[:2], "t": weight.t(), "e1": other}
    tensors["e2"] = torch.zeros(0, 3)
    torch.save(tensors, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert list(checkpoint.tensors) == ["embed", "part", "t", "e1", "e2"]
    assert checkpoint.aliases == {"embed": ["head"]}


def test_what_the_kernels_do_not_take_is_counted(tmp_path):
    tensors = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2, 2, dtype=torch.complex64),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "meta": torch.empty(2, 2, device="meta"),
        "w": torch.ones(2, 2),
    }
    torch.save(tensors, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.skipped == {
        "sparse": 1,
        "complex64": 1,
        "bool": 1,
        "on the meta device": 1,
    }


def test_containers_that_hold_themselves_end(tmp_path):
    state: dict[str, object] = {"w": torch.ones(2, 2)}
    state["self"] = state
    wide: list[object] = []
    for _ in range(60):
        wide = [wide, wide]  # 2^60 paths
    state["wide"] = wide
    torch.save(state, tmp_path / "m.pt")
    assert list(read_checkpoint(tmp_path / "m.pt").tensors) == ["w"]


def test_absurd_nesting_is_refused(tmp_path):
    state: object = torch.ones(2, 2)
    for _ in range(100):
        state = [state]
    torch.save(state, tmp_path / "m.pt")
    assert "nested deeper" in refused(tmp_path / "m.pt")


# ---- nothing is executed ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "disguised", "shard"])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch, form, force):
    # torch lets this variable turn weights-only loading off for callers that do not insist.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    marker = tmp_path / "marker"
    attack = {"w": torch.ones(2, 2), "x": Shell(f"echo run > {marker}")}
    name = {"disguised": "m.safetensors", "shard": "m.bin"}.get(form, "m.pt")
    path = tmp_path / name
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=form != "legacy")
    asked = path
    if form == "shard":
        asked = tmp_path / "pytorch_model.bin.index.json"
        asked.write_text(json.dumps({"weight_map": {"w": "m.bin"}}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(asked)
    message = str(caught.value)
    assert not marker.exists()
    assert name in message
    assert "weights_only" not in message
    if form not in ("plain pickle", "disguised"):  # those are already not torch's format
        assert "system" in message
        assert "torch.save(model.state_dict(), path)" in message
    # The attack is real: the unsafe loader runs it.
    if form == "plain pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_a_whole_module_is_refused_with_the_fix(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), path)" in message


def test_torchscript_is_refused(tmp_path):
    module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2), check_trace=False)
    torch.jit.save(module, tmp_path / "m.pt")
    assert "TorchScript" in refused(tmp_path / "m.pt")


# ---- files that are no checkpoints --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["m.safetensors", "m.pt", "m.pth", "m.bin", "m.safetensors.index.json"]
)
def test_missing_and_empty_files(tmp_path, name):
    assert "no such file" in refused(tmp_path / name)
    (tmp_path / name).touch()
    refused(tmp_path / name)


@pytest.mark.parametrize("keep", [0.02, 0.4, 0.9, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_files_cut_off_are_refused(tmp_path, form, keep):
    tensors = {"a": torch.randn(40, 40), "b": torch.randn(40, 40)}
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pt")
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path)


@pytest.mark.parametrize("content", [b"<html>", b"\x80\x04.", b"PK\x03\x04", b"GGUF" + bytes(60)])
def test_other_files_are_refused(tmp_path, content):
    for name in ("m.pt", "m.safetensors", "m"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(path)


def test_the_content_decides_not_the_suffix(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "m.pt")
    assert list(read_checkpoint(tmp_path / "m.pt").tensors) == ["w"]


def test_directories(tmp_path):
    assert "holds no" in refused(tmp_path)
    torch.save({"p": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    torch.save({"o": torch.ones(2, 2)}, tmp_path / "optimizer.pt")
    assert list(read_checkpoint(tmp_path).tensors) == ["p"]
    save_file({"s": torch.ones(2, 2)}, tmp_path / "weights.safetensors")
    assert list(read_checkpoint(tmp_path).tensors) == ["s"]
    save_file({"t": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert "found 2 (other.safetensors, weights.safetensors)" in refused(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "specnorm_ext\[cli\]"'):
        read_checkpoint(tmp_path / "m.safetensors")


# ---- names --------------------------------------------------------------------------------------


def test_natural_key():
    names = ["a.2.b", "a.10.b", "a.b", "b", "a.2", "a." + "9" * 5000, ""]
    assert collections.Counter(sorted(names, key=natural_key)) == collections.Counter(names)
    assert sorted(names[:3], key=natural_key) == ["a.2.b", "a.10.b", "a.b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b", "a.b"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb", "a\\nb"),
        ("\ud800", "\\ud800"),
        ("é", "é"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
