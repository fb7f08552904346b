"""The floors of the house: imports point down, never up, never sideways, never inside a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "softmoe_train"
FLOORS = {
    "config": -1, "cores": -1, "dist": -1, "redact": -1, "plain": -1, "stores": -1,
    "model": 0, "data": 0, "optim": 0, "observe": 0, "drawing": 0,
    "parallel": 1, "faults": 1, "launching": 1, "shards": 1,
    "engine": 2, "checkpoint": 2,
    "loop": 3,
    "warm": 3,  # weights from elsewhere
    "evals": 4,
    "asked": 4.5,  # what was asked for in so many words
    "changes": 4.4,  # which settings may change under a run
    "settings": 4.5,  # the records that run.py assembles, and what may not be combined
    "finetune": 4.7,  # what a fine-tuning is composed of, for run.py and its command
    "at_end": 4.8,  # the fine-tunings at the end of a run
    "run_log": 4.7,  # how run.py opens the log of a run
    "resume": 4.7,  # from which checkpoint run.py goes on
    "evaluators": 4.6,  # those that the settings ask for, for run.py and evaluate.py
    "run": 5, "worlds": 5,
    "portrait": 5.5,  # the routers of a checkpoint, over pictures
    "evaluate": 5.5,  # a checkpoint measured by the evaluators of a run
    "plan": 5.5,  # a run assembled by run.py, on shapes alone; what counts bytes serves the floor above too
    "parity": 6, "bench": 6, "report": 6,
    "sweep": 6.5,  # its table and heat map are the report's
    "commands": 7,
}  # fmt: skip
NO_DIST = ("model", "data", "optim")  # ranks and sizes arrive as arguments
OPTIONAL = {"wandb": "observe", "webdataset": "data shards bench", "pyarrow": "shards", "hydra": "config sweep", "omegaconf": "config sweep", "submitit": "sweep", "deepspeed": "engine",
    "fsspec": "stores", "matplotlib": "bench shards report drawing", "jinja2": "report", "soft_moe_pytorch": "bench", "soft_mixture_of_experts": "bench",
}  # fmt: skip
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def place_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports_of(tree: ast.AST) -> list[tuple[str, int, bool]]:
    """(module, line, inside a function) of every import statement."""
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
            found += [(name, node.lineno, id(node) in inside) for name in names]
    return found


def problems_of(path: Path, source: str) -> list[str]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    home = place_of(module)
    problems = []
    for target, line, inside in imports_of(ast.parse(source)):
        where = f"{path.relative_to(ROOT)}:{line} imports {target}"
        top = target.split(".")[0]
        if top in OPTIONAL and home not in OPTIONAL[top].split():
            problems.append(f"{where}, which only {OPTIONAL[top].replace(' ', ' and ')} may do")
        if target.startswith("torch.distributed") and home in NO_DIST:
            problems.append(f"{where}: layers, data and optimizers never import torch.distributed")
        there = place_of(target)
        if there is None or home in (None, "__init__", "__main__"):
            continue
        if inside:
            problems.append(f"{where} inside a function")
        if there == "dist" and home in NO_DIST:
            problems.append(f"{where}: ranks and sizes arrive as arguments")
        if there != home and FLOORS[there] >= FLOORS[home]:
            problems.append(f"{where}, which is not on a lower floor")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert problems_of(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("model/moe.py", "from softmoe_train.parallel.topology import Topology"),
        ("model/moe.py", "from softmoe_train import dist"),
        ("model/moe.py", "import torch.distributed as dist"),
        ("data/stream.py", "from softmoe_train.model import vit"),
        ("loop.py", "def f():\n    from softmoe_train import dist"),
        ("run.py", "import wandb"),
    ],
)
def test_a_wrong_import_is_named(place: str, line: str) -> None:
    assert problems_of(ROOT / PACKAGE / place, line)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_outgrows_its_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
