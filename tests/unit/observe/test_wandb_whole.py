"""What W&B holds of a run besides its rows, read back from the offline pieces with wandb's own record types."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import PIL.Image
import pytest

from softmoe_train.observe.code_version import checkout, code_version
from softmoe_train.observe.figures import Histogram, Picture
from softmoe_train.observe.log import ObserveConfig, SilentLog, build_log
from tests.runs import command, environment, softmoe
from tests.unit.observe.test_log import config, lines_of
from tests.unit.observe.test_wandb_run import _logged_out, history_of, whole_records  # noqa: F401

pytest.importorskip("wandb")


def open_whole(run_dir: Path, resume_step: int = 0, wandb_id: str | None = None) -> SilentLog:
    """A log whose W&B settings are all given."""
    values = config("offline").model_dump()
    values["wandb"] |= {
        "group": "sweep_7",
        "job_type": "finetune",
        "tags": ["digits", "seeds"],
        "checkpoints": "reference",
    }
    return build_log(
        ObserveConfig.model_validate(values), run_dir, name="digits", run_config={"seed": 1, "model": {"width": 64}}, total_steps=9, main=True,
        wandb_id=wandb_id, resume_step=resume_step,
    )  # fmt: skip


def records_of_kind(run_dir: Path, kind: str) -> list:
    from wandb.proto import wandb_internal_pb2

    paths = sorted((run_dir / "wandb").glob("*run-*-*/run-*.wandb"), key=lambda path: path.parent.name)
    found = [wandb_internal_pb2.Record.FromString(raw) for path in paths for raw in whole_records(path)]
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def summary_of(run_dir: Path) -> dict[str, object]:
    """What the pieces have set in the summary by hand, the newest last."""
    items = [item for record in records_of_kind(run_dir, "summary") for item in record.update]
    return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}


def picture(colour: int) -> Picture:
    file = io.BytesIO()
    PIL.Image.new("L", (6, 4), colour).save(file, "PNG")
    return Picture(file.getvalue(), "slots of block 1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, stopped after the fourth and gone on with from the second: its best value lies before that."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("WANDB_")]:
            patch.delenv(key)
        patch.setenv("NETRC", str(folder / "no_netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
        log = open_whole(folder)
        wandb_id = log.wandb_id
        for first, last in ((1, 4), (3, 6)):
            for step in range(first, last + 1):
                quality = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6, 5: 0.65, 6: 0.8}[step]
                log.report(step, 8 * step, {"train/loss": 1 / step})
                log.report(step, 8 * step, {"upstream/test/top1": quality, "upstream/test/loss": 1 - quality})
                log.show(
                    step, {"router/1/slots": picture(step), "router/1/mass": Histogram([1, step], [0.0, 0.5, 1.0])}
                )
                checkpoint = folder / f"checkpoints/step_{step:08d}"
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / "rank_00000.safetensors").write_bytes(b"weights, say")
                log.saved(step, checkpoint.as_uri())
            log.close("stopped", failed=False)
            log = open_whole(folder, resume_step=2, wandb_id=wandb_id) if first == 1 else log
    return folder


def test_rows_are_in_order_with_both_axes_and_their_figures_once(whole: Path) -> None:
    rows = history_of(whole)
    assert [(row["step"], row["images_seen"]) for row in rows] == [(step, 8 * step) for step in range(1, 7)]
    shown = {(row["router/1/slots/_type"], row["router/1/mass/_type"]) for row in rows}
    assert shown == {("image-file", "histogram")}
    assert [row["router/1/mass/values"] for row in rows] == [[1, step] for step in range(1, 7)]
    for row in rows:
        kept = list((whole / "wandb").glob(f"offline-run-*/files/{row['router/1/slots/path']}"))
        assert [PIL.Image.open(path).getpixel((0, 0)) for path in kept] == [row["step"]]
        assert (row["router/1/slots/caption"], row["router/1/slots/width"]) == ("slots of block 1", 6)


def test_the_axis_and_the_best_of_each_measure_are_defined(whole: Path) -> None:
    metrics = {record.name or record.glob_name: record for record in records_of_kind(whole, "metric")}
    assert metrics["*"].step_metric == "step"
    wanted = {"upstream/test/top1": (True, False), "upstream/test/loss": (False, True), "train/loss": (False, True)}
    for name, (highest, lowest) in wanted.items():
        record = metrics[name]
        assert (record.step_metric, record.summary.max, record.summary.min, record.summary.last) == (
            "step",
            highest,
            lowest,
            True,
        )
    assert "images_seen" in metrics


def test_a_best_value_from_before_a_resume_is_in_the_summary(whole: Path) -> None:
    said = summary_of(whole)
    assert said["upstream/test/top1"] == {"max": 0.9, "last": 0.8}
    assert said["upstream/test/loss"] == {"min": pytest.approx(0.1), "last": pytest.approx(0.2)}
    assert said["train/loss"] == {"min": 1 / 6, "last": 1 / 6}


def test_the_run_says_what_it_is_and_by_which_code(whole: Path) -> None:
    for run in records_of_kind(whole, "run"):
        assert (run.run_group, run.job_type, list(run.tags)) == ("sweep_7", "finetune", ["digits", "seeds"])
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["seed"] == 1 and settings["model"] == {"width": 64}
        assert settings["code"] == code_version()
        if checkout() is not None:
            assert run.git.commit == (code_version()["commit"] or "").removesuffix("-dirty")
            assert "@" not in run.git.remote_url
    names = {path.name for path in (whole / "wandb").rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith((".patch", ".py", ".ipynb")) or name == "output.log"}


def test_checkpoints_are_references_and_nothing_is_copied(whole: Path) -> None:
    told = [record for record in records_of_kind(whole, "artifact") if record.type == "checkpoint"]
    (entry,) = told[-1].manifest.contents
    assert entry.ref == (whole / "checkpoints/step_00000006/rank_00000.safetensors").as_uri()
    assert [json.loads(record.metadata)["step"] for record in told] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert "step_6" in told[-1].aliases


@pytest.mark.full
def test_a_killed_and_resumed_run_is_in_wandb_as_in_its_metrics_file(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "debug"
    line = [
        "recipe=debug", "steps=40", "observe.every=1", "checkpoint.every=10", "evals.upstream.every=5", "observe.wandb.mode=offline",
        "observe.wandb.checkpoints=reference",
    ]  # fmt: skip
    clean = {"WANDB_CONFIG_DIR": str(tmp_path / "config"), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    killed = subprocess.Popen(command(*line), cwd=tmp_path, env=environment(**clean), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() or max((one["step"] for one in lines_of_torn(run)), default=0) < 17:
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    last_before = lines_of_torn(run)[-1]["step"]
    assert last_before < 40
    said = softmoe(*line, folder=tmp_path, **clean).stdout
    assert "resumed from" in said
    written: dict[int, dict] = {}
    for one in lines_of(run):
        written.setdefault(one["step"], {}).update(one)
    rows = history_of(tmp_path / "runs" / "debug")
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row in rows:
        ours = written[row["step"]]
        assert row.keys() - {"_step"} == ours.keys()
        same = {
            name for name in ours if not name.startswith("perf/")
        }  # timings of steps done twice are those of either time
        assert {name: row[name] for name in same} == pytest.approx({name: ours[name] for name in same}, rel=1e-12)


def lines_of_torn(run: Path) -> list[dict]:
    """The whole lines of a file that is being written."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
