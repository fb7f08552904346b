"""An installed wheel finds its configuration and works outside the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runs import ROOT, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, unpacked as an installation without the dependencies (they are this interpreter's)."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; print(build_wheel(__import__('sys').argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_trains_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "softmoe_train", "train", "recipe=debug", "observe.wandb.mode=disabled", "steps=6"]
    done = subprocess.run(
        program,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "complete at step 6 of 6" in done.stdout
    assert (tmp_path / "runs" / "debug" / "checkpoints" / "step_00000006" / "COMPLETE.json").is_file()


def test_a_wheel_holds_the_package_and_its_yaml_and_nothing_else(installed: Path) -> None:
    top = {path.relative_to(installed).parts[0] for path in installed.rglob("*") if path.is_file()}
    assert {name.split("-")[0] for name in top} == {"softmoe_train"}
    shipped = {
        str(f.relative_to(installed / "softmoe_train/_conf"))
        for f in (installed / "softmoe_train/_conf").rglob("*.yaml")
    }
    assert shipped == {str(f.relative_to(ROOT / "conf")) for f in (ROOT / "conf").rglob("*.yaml")}
    assert not list(installed.rglob("*.tar"))
