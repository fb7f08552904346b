"""Nothing that we read can execute: no unpickling in the code, no pickle in what a run leaves."""

import ast
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "softmoe_train").rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "eval", "exec", "np.load", "numpy.load", "pandas.read_pickle",
}  # fmt: skip


def faults(source: str) -> list[str]:
    """Imports of what unpickles, and calls that do, by any name that an import gives them."""
    found, names = [], {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [str(node.module)] if str(node.module).split(".")[0] in MODULES else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            written = names.get(first, first) + dot + rest
            found += [written] if written in CALLS else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_of_ours_unpickles(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load\nload('x')",
        "import torch as t\nt.save(1, 'x')", "import numpy as np\nnp.load('x')", "f(x, allow_pickle=True)", "import yaml\nyaml.load(x)",
        "import torch\nread = torch.load",
    ],
)  # fmt: skip
def test_code_that_unpickles_is_found(source: str) -> None:
    assert faults(source)


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later, or is an archive as torch.save writes it."""
    head = path.read_bytes()[:2]
    return zipfile.is_zipfile(path) or (head[:1] == b"\x80" and head[1:] in {b"\x02", b"\x03", b"\x04", b"\x05"})


def test_a_pickle_is_recognised(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "saved")
    (tmp_path / "dumped").write_bytes(pickle.dumps([1]))
    assert is_pickle(tmp_path / "saved")
    assert is_pickle(tmp_path / "dumped")


def test_a_run_folder_holds_no_pickle(tmp_path: Path) -> None:
    overrides = [
        "recipe=debug",
        f"run_dir={tmp_path}/run",
        "observe.wandb.mode=disabled",
        "average=ema",
        "average.decay=0.9",
    ]
    config = compose(RunConfig, [*overrides, "steps=2", "schedule.warmup_steps=1"], lambda _: [])
    train(config, World(0, 1, 0, 1))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".yaml", ""}
    assert [path for path in files if is_pickle(path)] == []
    assert {path.name for path in files if not path.suffix} <= {".lock"}
