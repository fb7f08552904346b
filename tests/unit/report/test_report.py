"""`softmoe report` over run folders that the real log wrote, and over what hostile hands may leave; the page is read with html.parser."""

import base64
import copy
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from softmoe_train.commands.main import main
from softmoe_train.config import compose
from softmoe_train.observe.figures import Picture
from softmoe_train.observe.log import build_log
from softmoe_train.plan.cost import cost_of
from softmoe_train.report.closing import closing_lines
from softmoe_train.report.draw import shades
from softmoe_train.report.pareto import pareto_front
from softmoe_train.report.read import Curve, read_run
from softmoe_train.report.rows import POINTS, mean_of_curves, rows_of, thinned
from softmoe_train.settings import RunConfig
from tests.pareto import pareto_rows
from tests.unit.observe.test_log import config as observe

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script> $\\frac{ {{ 7*7 }}'
BASE = compose(RunConfig, ["recipe=debug", "steps=100"], lambda _: [])
VOID = {"meta", "img", "line", "br"}


def quality(experts: int, slots: int, seed: int, step: int) -> float:
    return 0.5 + 0.01 * experts + 0.02 * slots + 0.004 * seed + 0.0001 * step


def write_run(folder: Path, experts: int, slots: int, seed: int, last: int = 100, ended: str = "complete") -> None:
    tree = copy.deepcopy(BASE.as_saved())
    tree["seed"], tree["run_dir"] = seed, str(folder)
    tree["model"]["moe"] |= {"num_experts": experts, "slots_per_expert": slots}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    log = build_log(
        observe(progress="off"),
        folder,
        name="x",
        run_config=tree,
        total_steps=100,
        main=True,
        wandb_id=None,
        resume_step=0,
    )
    for step in range(10, last + 1, 10):
        log.report(
            step,
            16 * step,
            {"train/loss": 3 / step, "perf/images_per_second": 100.0 + step, f"router/1/{HOSTILE}": 1.0},
        )
        if step % 50 == 0:
            log.report(
                step, 16 * step, {"upstream/test/top1": quality(experts, slots, seed, step), "upstream/test/loss": 1.0}
            )
            log.report(
                step,
                16 * step,
                {"fewshot/a/10shot": 0.2, "fewshot/b/10shot": 0.4 + seed / 10, "fewshot/a/10shot_l2": 9.0},
            )
    log.show(last, {"routing/slots": Picture((folder.parent.parent / "some.png").read_bytes(), "slots")})
    log.close(ended, failed=ended.startswith("failed"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two by two, two seeds each, one of them cut off; beside it folders that are no runs of ours."""
    root = tmp_path_factory.mktemp("report")
    PIL.Image.new("RGB", (2000, 1000), "red").save(root / "some.png")
    for experts in (2, 4):
        for slots in (1, 2):
            for seed in (0, 1):
                write_run(root / "sweep" / f"e{experts}_s{slots}_{seed}", experts, slots, seed)
    write_run(root / "sweep" / "e4_s2_2", 4, 2, seed=2, last=50, ended=f"failed: ValueError: {HOSTILE}")
    hostile = root / "sweep" / HOSTILE.replace("/", "_")
    write_run(hostile, 8, 1, seed=0)
    tree = yaml.safe_load((hostile / "config.yaml").read_text())
    (hostile / "config.yaml").write_text(
        yaml.safe_dump({**tree, "name": HOSTILE, "batch_size": HOSTILE, "model": {"depth": HOSTILE}})
    )
    torn = root / "sweep" / "torn"
    torn.mkdir()
    bad = [
        '{"step": 1',
        "[1, 2]",
        '{"step": 1, "images_seen": "x"}',
        "[" * 100_000,
        f'{{"step": {10**400}, "images_seen": 1, "a/b/c": 1}}',
    ]
    good = (
        f'{{"step": 1, "images_seen": 16, "train/loss": NaN, "a/b/c": {10**400}, "d/e/f": "text", "g/h/i": {{"j": 1}}}}'
    )
    (torn / "metrics.jsonl").write_text("\n".join([*bad, good, '{"step": 2, "images']))
    (torn / "summary.json").write_text(
        '{"ended": 7, "wall_seconds": "long", "steps": NaN, "history": {"starts": "many"}}'
    )
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(12)
    )
    (torn / "config.yaml").write_text(bomb)
    (torn / "pictures" / "x").mkdir(parents=True)
    (torn / "pictures" / "x" / "step_00000001.png").write_text("no picture")
    (root / "empty").mkdir()
    return root


class Strict(HTMLParser):
    """Every tag closed in order; what would run, fetch or style from elsewhere is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "iframe", "object", "embed", "link", "form", "base"):
            self.wrong.append(tag)
        self.wrong += [f"{tag} {name}" for name in values if name.startswith("on") or name == "style"]
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            if name in values and not re.match(r"(data:image/|#)", values[name] or ""):
                self.wrong.append(f"{tag} {name}={values[name]}")
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "img":
            self.images.append(values)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def read(made: Path) -> tuple[Strict, dict, str]:
    """The page and the JSON of the whole sweep, through the command."""
    html, out = made / "report.html", made / "report.json"
    assert (
        main(
            [
                "report",
                str(made / "sweep"),
                str(made / "empty"),
                str(made / "nowhere"),
                f"out={html}",
                f"json_out={out}",
            ]
        )
        == 0
    )
    parser = Strict()
    parser.feed(html.read_text())
    parser.close()
    return parser, json.loads(out.read_text()), html.read_text()


def row_of(document: dict, label: str) -> dict:
    (row,) = (row for row in document["rows"] if row["label"] == label)
    return row


def test_the_page_is_whole_and_neither_runs_nor_fetches_anything(read: tuple[Strict, dict, str]) -> None:
    parser, _, html = read
    assert parser.wrong == [] and parser.open == []
    assert html.startswith("<!doctype html>") and "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(image["alt"] and image["width"] and image["height"] for image in parser.images)
    assert html.count("<h1") == 1 and "http" not in re.sub(r"base64,[^\"]*", "", html).replace("http-equiv", "")
    plots = [image["src"] or "" for image in parser.images if "svg" in (image["src"] or "")[:20]]
    for plot in plots:
        svg = base64.b64decode(plot.partition(",")[2]).decode()
        assert "<script" not in svg and not re.search(r"href=\"(?!#)", svg)


def test_names_from_outside_are_text(read: tuple[Strict, dict, str]) -> None:
    parser, _, html = read
    assert "<img src=x" not in html and "<script" not in html and "{{ 7*7 }}" in html
    assert any("onerror=alert(1)><script>" in text for text in parser.texts)


def test_rows_are_means_over_seeds_of_the_runs_that_came_as_far(read: tuple[Strict, dict, str]) -> None:
    _, document, _ = read
    # What is hostile has settings of its own; the label of a row is then its runs.
    row = next(
        row
        for row in document["rows"]
        if {run["folder"].rpartition("/")[2] for run in row["runs"]} >= {"e4_s2_0", "e4_s2_2"}
    )
    values = [quality(4, 2, seed, 100) for seed in (0, 1)]
    assert row["numbers"]["upstream"] == pytest.approx(
        {"mean": statistics.mean(values), "deviation": statistics.stdev(values), "count": 2}
    )
    assert row["numbers"]["fewshot"]["mean"] == pytest.approx(statistics.mean([0.3, 0.35]))
    assert row["numbers"]["finetune"] is None
    assert [(run["seed"], run["counted"]) for run in row["runs"]] == [(0, True), (1, True), (2, False)]
    tree = copy.deepcopy(BASE.model_dump()["model"])
    tree["moe"] |= {"num_experts": 4, "slots_per_expert": 2}
    cost = cost_of(type(BASE.model).model_validate(tree))
    assert row["costs"]["parameters"]["mean"] == cost.parameters
    assert row["costs"]["train_exaflop"]["mean"] == pytest.approx(cost.paper_training_flops * 1600 / 1e18)
    assert row["costs"]["images_per_second"]["mean"] == 155.0


def test_the_table_says_so(read: tuple[Strict, dict, str]) -> None:
    parser, _, _ = read
    results = parser.tables[0]
    assert results[0][1:4] == ["held-out top-1 (%)", "few-shot 10 (%)", "fine-tune top-1 (%)"]
    (row,) = (row for row in results if "e4_s2_0" in row[0])
    assert row[1:4] == ["59.20 ± 0.28", "32.50 ± 3.54", "-"] and row[4].startswith("2 of 3")
    (state,) = (row for row in parser.tables[-2] if row[0].startswith("e4_s2_2"))
    assert state[1].startswith("failedfailed: ValueError: ") and state[2] == "50of 100"


def test_a_heat_map_does_not_make_noise_look_like_a_finding() -> None:
    assert shades(np.array([0.1, math.nan, 0.3, 0.5]), 0.02) == pytest.approx([0, math.nan, 0.5, 1], nan_ok=True)
    assert shades(np.array([0.441, 0.447]), 0.02) == pytest.approx([0.35, 0.65])
    assert shades(np.array([0.0, 0.0]), 0.0) == pytest.approx([0.5, 0.5])


def test_what_cannot_be_read_is_named_and_harms_nothing(read: tuple[Strict, dict, str], made: Path) -> None:
    parser, document, _ = read
    (torn,) = (run for row in document["rows"] for run in row["runs"] if run["folder"].endswith("torn"))
    notes = " ".join(torn["notes"])
    assert "config.yaml cannot be read" in notes and "6 torn or foreign lines" in notes and "history" in notes
    assert (torn["state"], torn["step"]) == ("killed", 1)
    left_out = {row[0]: row[1] for row in parser.tables[-1][1:]}
    assert "no run in it" in left_out[str(made / "empty")] and "no such folder" in left_out[str(made / "nowhere")]
    assert any("torn: x is no picture that can be shown" in text for text in parser.texts)


def test_pictures_are_the_newest_and_small(read: tuple[Strict, dict, str]) -> None:
    pictures = [image for image in read[0].images if "png" in (image["src"] or "")[:20]]
    assert len(pictures) == 5  # one of each kind of run that has some
    assert {(image["width"], image["height"]) for image in pictures} == {("900", "450")}


def test_a_sweep_over_two_numbers_is_a_heat_map_and_has_a_front(made: Path, tmp_path: Path) -> None:
    folders = [str(path) for path in sorted((made / "sweep").glob("e*_[01]"))]
    assert main(["report", *folders, f"out={tmp_path / 'r.html'}", f"json_out={tmp_path / 'r.json'}"]) == 0
    parser = Strict()
    parser.feed((tmp_path / "r.html").read_text())
    maps = [image["alt"] or "" for image in parser.images if image["class"] == "map"]
    assert "num_experts=4, slots_per_expert=1: 57.20 ± 0.28" in maps[0]
    document = json.loads((tmp_path / "r.json").read_text())
    assert [row["label"] for row in document["rows"]] == [
        f"num_experts={e}, slots_per_expert={s}" for e in (2, 4) for s in (1, 2)
    ]
    assert row_of(document, "num_experts=2, slots_per_expert=1")["settings"] == {
        "model.moe.num_experts": 2,
        "model.moe.slots_per_expert": 1,
    }
    (front,) = (
        image["alt"] or ""
        for image in parser.images
        if (image["alt"] or "").startswith("held-out top-1 (%) against training")
    )
    points = [(row["costs"]["train_exaflop"]["mean"], row["numbers"]["upstream"]["mean"]) for row in document["rows"]]
    for place, row in enumerate(document["rows"]):
        assert (row["label"] in front) == (place in brute_front(points))
    settings = next(table for table in parser.tables if table[0][0] == "setting")
    assert {row[0] for row in settings[1:]} == {"seed", "model.moe.num_experts", "model.moe.slots_per_expert"}


def brute_front(points: list[tuple[float, float]]) -> set[int]:
    """Who is beaten by nobody, by the definition."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    return {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}


def test_the_front_is_who_is_beaten_by_nobody() -> None:
    rows = pareto_rows()
    points = [(row.train_exaflop, row.imagenet_10shot) for row in rows]
    front = pareto_front(points)
    assert set(front) == brute_front(points) and [points[i][0] for i in front] == sorted(points[i][0] for i in front)
    # The paper's claim of its Table 9: Soft MoE is on the front, and all but alone there (its Figure 3).
    assert statistics.mean(rows[i].kind == "soft" for i in front) > 0.8
    draw = np.random.default_rng(0)
    for _ in range(50):  # with many ties
        some = [(float(x), float(y)) for x, y in draw.integers(0, 6, (20, 2))]
        assert set(pareto_front(some)) == brute_front(some)


def test_no_run_at_all_is_a_mistake(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(made / "empty"), f"out={tmp_path / 'r.html'}"]) == 2
    assert "no run in it" in capsys.readouterr().err
    assert main(["report", f"out={tmp_path / 'r.html'}"]) == 2
    assert "no run is named" in capsys.readouterr().err
    assert main(["report", str(made / "sweep"), "out=report.pdf", "sweeep=x"]) == 2
    told = capsys.readouterr().err
    assert "2 mistakes" in told and "there is no key sweeep" in told
    assert not (tmp_path / "r.html").exists()


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    steps = np.arange(10_000, dtype=float)
    values = np.sin(steps / 500)
    values[[1234, 7777]] = [50.0, -50.0]
    values[5000] = np.nan
    small = thinned(Curve(steps, steps, values))
    assert len(small.steps) <= POINTS + 3 and (small.steps[0], small.steps[-1]) == (0, 9999)
    assert (np.nanmax(small.values), np.nanmin(small.values)) == (50, -50) and np.isnan(small.values).sum() == 1


def test_curves_of_seeds_are_averaged_where_all_are() -> None:
    one, two = (np.array(v, dtype=float) for v in ([0, 10, 20, 30], [10, 15, 20]))
    mean, deviation = mean_of_curves([Curve(one, one, 2 * one), Curve(two, two, 4 * two)]) or (None, None)
    assert mean is not None and deviation is not None
    assert (mean.steps.tolist(), mean.values.tolist()) == ([10, 20], [30, 60])
    assert deviation == pytest.approx([200**0.5, 800**0.5])


def test_a_run_closes_with_the_numbers_that_it_has(made: Path) -> None:
    lines = closing_lines(made / "sweep" / "e4_s2_1")
    assert lines[0] == "held-out top-1  0.5940   (best 0.5940 at step 100)"
    assert lines[1] == "few-shot 10     0.3500   (best 0.3500 at step 50; mean of 2 sets: a 0.2000, b 0.5000)"
    assert lines[2] == "images/s        155" and lines[3].startswith("wall time       0:00:0")
    assert read_run(made / "sweep" / "torn", "torn").curves["train/loss"].best("min")[1] == 1


def test_seeds_from_before_and_after_a_setting_are_one_row_and_a_copy_is_no_seed(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (20, 10), "red").save(tmp_path / "some.png")
    for name, seed in (("0", 0), ("1", 1), ("2", 1)):
        write_run(tmp_path / "runs" / name, 4, 2, seed)
    path = tmp_path / "runs" / "0" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["optim"]["frozen"], tree["optim"]["layer_decay"], tree["data"]["holdout"]
    path.write_text(yaml.safe_dump(tree))
    (row,) = rows_of([read_run(tmp_path / "runs" / name, name) for name in ("0", "1", "2")])
    assert [run.folder.name for run in row.counted] == ["0", "1"]
