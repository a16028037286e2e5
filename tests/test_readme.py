"""README.md: its code runs, what it names is there, and each of its figures is that of a file in bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import specnorm_ext

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "bench" / "README.md", *ROOT.glob("docs/*.md")])


# ---- figures ----------------------------------------------------------------------------------------------------

OURS, TORCH, COMPILED = "specnorm_ext", "torch's op sequence", "torch spectral_norm"
# Of each row of the tables: the file, the group, and the row of the JSON behind each of its cells. A cell that holds
# something else is a function of the group.


def ratio(what: str):
    return lambda group: row(group, what)["ratio"]["median"]


def seconds(what: str):
    return lambda group: row(group, what)["seconds"]["median"]


def target(what: str, text: str):
    return lambda group: next(
        t["measured"] for t in row(group, what)["targets"] if text in t["text"]
    )


def limit(what: str):
    return lambda group: row(group, what)["targets"][0]["limit"]


def step(group: str, *more) -> tuple:
    return "power_iteration", group, (ratio(TORCH), ratio(OURS), *(more or (limit(OURS),)))


PLAIN, THEIRS, OUR_LAYER = (
    "plain, no normalization",
    "torch spectral_norm",
    "specnorm_ext.spectral_norm",
)
LAYERS = "specnorm_ext layers"
SVD, NORMS = "torch.linalg.matrix_norm(W, 2)", "specnorm_ext.spectral_norms, tol=1e-3"
BARE, STACK = "three torch.mv", "specnorm_ext, all in one tensor"
MINILM = "spectral norms of all-MiniLM-L6-v2, to 1e-3"
ROWS = {
    "4096 x 4096 float32": step("4096 x 4096 float32"),
    "512 x 4608 float32": step("512 x 4608 float32"),
    "1024 x 4096 float32": step("1024 x 4096 float32"),
    "4096 x 4096 bfloat16": step("4096 x 4096 bfloat16, reads of its own bytes"),
    "4096 x 4096 float32, 4 columns": step("4096 x 4096 float32, b = 4"),
    "11 weights of an SN-GAN discriminator, one call": step(
        "11 weights of an SN-GAN discriminator, one call"
    ),
    "200 matrices of 64 x 64, one tensor": (
        "power_iteration",
        "200 of 64 x 64, one call",
        (ratio(TORCH), ratio(STACK), limit(STACK), target(STACK, BARE)),
    ),
    "the same, a list of 200 tensors": step(
        "200 of 64 x 64, one call", limit(OURS), target(OURS, TORCH), target(OURS, BARE)
    ),
    "MLP of 6 layers 256..1024, batch 64, forward + backward": (
        "layers",
        "MLP of 6 layers 256..1024, batch 64, forward + backward",
        (
            ratio(PLAIN),
            ratio(THEIRS),
            ratio(f"{THEIRS}, compiled"),
            ratio(OUR_LAYER),
            ratio(f"{OUR_LAYER}, compiled"),
        ),
    ),
    "32 x 32 layer, training forward, no_grad": (
        "layers",
        "Linear 32 x 32, batch 64, training forward, no_grad",
        (ratio(PLAIN), ratio(THEIRS), ratio(OUR_LAYER)),
    ),
    "the same, of `SpectralLinear`": (
        "layers",
        "MLP of 6 layers 256..1024, batch 64, forward + backward",
        (
            ratio(PLAIN),
            ratio(THEIRS),
            ratio(f"{THEIRS}, compiled"),
            ratio(LAYERS),
            ratio(f"{LAYERS}, compiled"),
        ),
    ),
    "one layer of 4096 x 4096 with `spectral_norm`, batch 64, forward + backward": (
        "layers",
        "Linear 4096 x 4096, batch 64, forward + backward",
        (
            ratio(PLAIN),
            ratio(THEIRS),
            ratio(f"{THEIRS}, compiled"),
            ratio(OUR_LAYER),
            ratio(f"{OUR_LAYER}, compiled"),
        ),
    ),
    "one `SpectralLinear` of 4096 x 4096, batch 64, forward + backward": (
        "layers",
        "Linear 4096 x 4096, batch 64, forward + backward",
        (
            ratio(PLAIN),
            ratio(THEIRS),
            ratio(f"{THEIRS}, compiled"),
            ratio(LAYERS),
            ratio(f"{LAYERS}, compiled"),
        ),
    ),
    "SN-GAN discriminator of `SpectralConv2d`, batch 64, forward + backward": (
        "layers",
        "SN-GAN CIFAR discriminator, batch 64, forward + backward",
        (ratio(PLAIN), ratio(THEIRS), ratio(LAYERS)),
    ),
    "norms of the 40 matrices of MiniLM to 1e-3 (largest error 2.1e-4)": (
        "report",
        MINILM,
        (lambda _: 1, seconds(SVD), seconds(NORMS)),
    ),
}
# Figures outside of cells, and the text around them.
SENTENCES = {
    r"norms of the (\d+) matrices of MiniLM": lambda g: g["facts"]["matrices"],
    r"largest error ([\d.e-]+)\)": lambda g: g["facts"]["largest relative error"],
    r"take the time of (\d+) reads together": ratio(NORMS),
    r"their SVDs that of (\d+)": ratio(SVD),
}


def row(group: dict, what: str) -> dict:
    return next(r for r in group["rows"] if r["what"] == what)


def group_of(file: str, name: str) -> dict:
    saved = json.loads((ROOT / "bench" / "results" / f"cpu_{file}.json").read_text())
    assert saved["quick"] is False
    group = next(g for g in saved["groups"] if g["name"] == name)
    assert group["disturbed"] is False
    return group


def require_rounded(text: str, value: float) -> None:
    """`text` is `value` to as many digits as it shows."""
    mantissa, _, exponent = text.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(text) - value) <= 0.5 * unit * (1 + 1e-9), f"{text}, measured {value}"


def measured() -> str:
    return README.split("## Measured")[1].split("\n## ")[0]


def table_rows() -> Iterator[tuple[str, list[str]]]:
    """Of each line of the tables its label and the numbers of its cells."""
    for line in measured().splitlines():
        cells = [c.strip().replace("**", "") for c in line.strip().strip("|").split("|")]
        if not line.startswith("|") or set(line) <= set("|- ") or not cells[0]:
            continue
        numbers = [n for c in cells[1:] for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", c)]
        if numbers:
            yield cells[0], numbers


def test_every_row_of_the_tables_is_in_a_file() -> None:
    found = dict(table_rows())
    assert found.keys() == ROWS.keys()
    for label, numbers in found.items():
        file, name, values = ROWS[label]
        group = group_of(file, name)
        if file == "report":
            numbers = ["1", *numbers]
        assert len(numbers) == len(values), f"{label}: {numbers}"
        for text, value in zip(numbers, values, strict=True):
            require_rounded(text, value(group))


def test_every_missed_target_is_said() -> None:
    for label, (file, name, _) in ROWS.items():
        if file != "power_iteration":
            continue
        what = STACK if "one tensor" in label else OURS
        met = [t["met"] for t in row(group_of(file, name), what)["targets"]]
        line = next(x for x in measured().splitlines() if x.startswith(f"| {label} |"))
        assert ("missed" in line) is (not all(met)), label


@pytest.mark.parametrize("pattern", SENTENCES)
def test_every_figure_of_the_sentences_is_in_a_file(pattern) -> None:
    (text,) = re.findall(pattern, " ".join(measured().split()))
    require_rounded(text, SENTENCES[pattern](group_of("report", MINILM)))


def test_no_other_figure_stands_in_the_section() -> None:
    prose = " ".join(x for x in measured().splitlines() if not x.startswith("|"))
    for pattern in SENTENCES:
        prose = re.sub(pattern, "", " ".join(prose.split()))
    machine = json.loads((ROOT / "bench" / "results" / "cpu_power_iteration.json").read_text())[
        "machine"
    ]
    told = f"On {machine['cpus']} cores of an {machine['cpu']}"
    assert told in prose
    assert f"{machine['threads']} threads" in prose
    torch_version = ".".join(machine["torch"].split(".")[:2])
    assert f"torch {torch_version} " in prose
    for known in (told, f"{machine['threads']} threads", f"torch {torch_version} ", "(AVX-512)"):
        prose = prose.replace(known, "")
    assert not re.findall(r"\d", prose), prose


# ---- what it names ----------------------------------------------------------------------------------------------


def test_its_python_runs(capsys) -> None:
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "reads" in out
    assert "ReLU" in out
    assert all(w.grad is not None for w in names["weights"])
    e, exact = names["e"], torch.linalg.matrix_norm(names["w"].double(), 2)
    assert e.lower <= exact <= e.upper
    assert names["curvature"] > 0


def test_its_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(p.read_text() for p in PAGES)
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) - {"sure"}
    assert {"demo", "test", "lint", "bench"} <= targets
    for name in targets:
        assert re.search(rf"^(?:.* )?{name}:", makefile, re.M), f"make {name}"
    for option in set(re.findall(r"specnorm-ext report .*?(--[a-z]+)", README)):
        assert option in (ROOT / "specnorm_ext" / "cli.py").read_text()


def test_its_files_are_there() -> None:
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`([\w./-]+\.(?:py|cpp|h|cuh|cu|md|txt|sh)|[\w/]+/)`", text):
            places = (ROOT, page.parent, *(ROOT / x for x in ("specnorm_ext", "csrc", "tests")))
            generated = path in ("bench/out/", "demo_out/")
            assert generated or any((x / path).exists() for x in places), f"{page.name}: {path}"


def test_its_names_are_public() -> None:
    for name in set(re.findall(r"specnorm_ext\.([a-z_.]+)\(", README)):
        found: object = specnorm_ext
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)
