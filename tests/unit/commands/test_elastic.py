"""What one worker of torchrun does with a world that its settings refuse; the store is real, the other ranks are elsewhere."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from softmoe_train.at_end import children_of
from softmoe_train.commands import elastic
from softmoe_train.commands.elastic import check_train, in_legal_world
from softmoe_train.config import ConfigError, compose
from softmoe_train.dist import World
from softmoe_train.launching.meeting import End
from softmoe_train.settings import RunConfig
from softmoe_train.worlds import legal_worlds, told
from tests.runs import environment

ALONE = World(0, 1, 0, 1)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The environment of a worker that torchrun may start again, and the store of its agent."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    changes = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "2",
    }  # fmt: skip
    monkeypatch.delenv("SOFTMOE_LAUNCHER_PID", raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    return store


def composed(folder: Path, *overrides: str, world: World = ALONE) -> RunConfig:
    run = ["recipe=debug", f"run_dir={folder}/run", *overrides]
    return compose(RunConfig, run, lambda config: check_train(config, world))


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("elastic=false", {}),
        ("elastic=true", {"TORCHELASTIC_MAX_RESTARTS": "0"}),
        ("elastic=true", {"SOFTMOE_LAUNCHER_PID": "7"}),
    ],
)
def test_an_illegal_world_is_refused_where_nobody_asked_for_another(
    torchrun: dist.TCPStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    changes: dict[str, str],
) -> None:
    three = World(0, 3, 0, 3)
    composed(tmp_path, world=three)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="does not divide into 3 ranks"):
        composed(tmp_path, override, world=three)


def test_ranks_that_are_too_few_wait_for_more_and_then_say_why(
    torchrun: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(elastic, "NODES_SECONDS", 0.3)
    config = composed(tmp_path, "parallel.expert_axis=2")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"parallel\.expert_axis=2 does not divide the 1 rank of this run"):
        in_legal_world(config, ALONE, lambda world: pytest.fail(f"{world} trains"))
    assert time.monotonic() - began > 0.3
    said = capsys.readouterr().out
    assert "the legal worlds are 2, 4, 8: too few ranks, waiting up to 0 minutes for more nodes" in said


def test_a_legal_world_trains_at_once_and_a_restart_is_told(
    torchrun: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    worlds: list[World] = []

    def work(world: World) -> End:
        worlds.append(world)
        return End(0, for_good=False)

    assert in_legal_world(composed(tmp_path), ALONE, work) == 0
    assert worlds[0][:4] == (0, 1, 0, 1)
    assert worlds[0].store is not None
    assert capsys.readouterr().out == "started again by torchrun: 1 of 2 restarts are used\n"


def test_a_worker_waits_for_the_one_before_it_to_leave_the_run_folder(
    torchrun: dist.TCPStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold = "import sys, time, pathlib as p; from softmoe_train.faults.claim import claim\nwith claim(p.Path(sys.argv[1])): "
    hold += "print(flush=True); time.sleep(2)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], env=environment(), stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline()
    composed(tmp_path)
    assert f"run is in use by process {holder.pid} on " in capsys.readouterr().out
    assert holder.wait() == 0


def test_a_world_is_legal_where_the_run_and_its_fine_tunings_allow_it(
    torchrun: dist.TCPStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(streams: int) -> list[str]:
        own = ["recipe=debug", "batch_size=24", "data.streams=24", "elastic=true", f"run_dir={tmp_path}/run"]
        child = f'["shrink=laptop", "data=synthetic", "batch_size=64", "data.streams={streams}"]'
        return [*own, "finetune.pets.recipe=finetune/pets", f"finetune.pets.overrides={child}"]

    def checked(streams: int) -> RunConfig:
        return compose(RunConfig, words(streams), lambda c: check_train(c, World(0, 6, 0, 6)))

    config = checked(8)  # 6 ranks are the run's, and not the fine-tuning's
    sizes = legal_worlds(config, [6]), legal_worlds(config, [6], children_of(config))
    assert sizes == ([1, 2, 3, 4, 6], [1, 2, 4])
    said = told(config, [6], sizes[1], children_of(config))
    assert (
        "finetune.pets: the global batch of 64 images does not divide into 6 ranks" in said and "training on 4" in said
    )
    with pytest.raises(ConfigError, match=r"finetune\.pets: parallel\.expert_axis=5"):
        compose(
            RunConfig,
            [*words(8)[:-1], words(8)[-1][:-1] + ', "parallel.expert_axis=5"]'],
            lambda c: check_train(c, World(0, 6, 0, 6)),
        )
