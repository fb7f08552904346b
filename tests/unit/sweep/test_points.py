"""The points of a sweep: what each is called, what follows from its values, and what is refused before one starts."""

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.config import ConfigError, compose, save_yaml
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.couple import CoupleError, value_of
from softmoe_train.sweep.drive import Sweep, make_sweep
from softmoe_train.sweep.naming import label_of, word_of
from softmoe_train.sweep.points import Kind
from tests.unit.sweep.holding import held_by_another

EXPERTS, SLOTS = "model.moe.num_experts", "model.moe.slots_per_expert"
TRAIN = Kind("train", compose_train, check_train)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swept(*words: str) -> Sweep:
    return make_sweep(TRAIN, ["recipe=debug", *words])


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        swept(*words)
    assert list(Path().iterdir()) == [], "something was written"
    return caught.value.problems


@pytest.mark.parametrize(
    ("words", "keys", "label"),
    [
        ([f"{EXPERTS}=8", f"{SLOTS}=2", "seed=1"], [EXPERTS, SLOTS], "num_experts=8_slots_per_expert=2"),
        (["data.train_transform.size=8", "data.test_transform.size=9"], ["data.train_transform.size", "data.test_transform.size"],
         "train_transform.size=8_test_transform.size=9"),
        (["model.moe.blocks='last 2'", "schedule.peak=-0.1"], ["model.moe.blocks", "schedule.peak"], "blocks=last-2_peak=-0.1"),
        (["ckpt=../a b/$(c);d"], ["ckpt"], "ckpt=..-a-b-c-d"),
    ],
)  # fmt: skip
def test_a_label_is_the_swept_values_and_the_name_of_a_folder(words: list[str], keys: list[str], label: str) -> None:
    assert label_of(words, keys) == label


def test_two_long_labels_stay_apart_and_short() -> None:
    one, two = (label_of([f"data.train={'x' * 300}{end}"], ["data.train"]) for end in "ab")
    assert one != two and len(one) < 140


@pytest.mark.parametrize("text", ["2024", "true", "runs/a,b", 'a b\'s "c"', "runs/num_experts=8_seed=1"])
def test_an_override_keeps_any_text(text: str) -> None:
    assert (
        compose(RunConfig, ["recipe=debug", word_of("observe.wandb.group", text)], lambda _: []).observe.wandb.group
        == text
    )


@pytest.mark.parametrize(
    "text",
    ["a\\b", "a\\", "\\\\", 'a\\"b', 'a\\\\"', '\\"', '"', "é", "日本", "¹", "a\\,b", ".5", "..", "./x", "NULL", "inf", "1_0", "", " a ", "[1]",
     "{a: 1}", "a,b", "$(rm)", "choice(1,2)", "C:\\runs\\new"],
)  # fmt: skip
def test_hydra_reads_back_any_text(text: str) -> None:
    parsed = OverridesParser.create().parse_override(word_of("name", text))
    value = parsed.value()
    assert (value.text if isinstance(value, QuotedString) else value) == text and not parsed.is_sweep_override()


@pytest.mark.parametrize("text", ["${seed}", "\\${seed}", "a\\\\${oc.env:HOME}\\b"])
def test_what_looks_like_a_reference_is_text(text: str) -> None:
    value = OverridesParser.create().parse_override(word_of("name", text)).value()
    assert OmegaConf.create({"name": value.text if isinstance(value, QuotedString) else value, "seed": 3}).name == text


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "\x1b[2J", "\x00", "\x7f", "\x85"])
def test_a_control_character_is_refused_in_any_text(text: str) -> None:
    with pytest.raises(ConfigError, match="control character"):
        word_of("run_dir", text)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("256 / a", 32), ("a // 3", 2), ("-a + 2 * (a - 1)", 6), ("b.c * 3", Fraction(3, 10)), ("a / 3", Fraction(8, 3))],
)
def test_a_coupling_is_exact_arithmetic(expression: str, value: Fraction) -> None:
    assert value_of(expression, {"a": 8, "b.c": 0.1}) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').getcwd()", "a ** 9", "a if a else 1", "[a][0]", "'a' * 3", "a; a", "", "1e999", "a.b()", "True",
     "(" * 99 + "a" + ")" * 99 + "+", "1e300 * 1e300", "9" * 19, "a * 1e17", "1e-80 * 1e-80", "long * 1", "inf", "nan", "1 / (a - 80)", "lambda: 1", "name", "nothing"],
)  # fmt: skip
def test_what_is_no_arithmetic_of_numbers_is_refused_and_never_run(expression: str) -> None:
    with pytest.raises(CoupleError):
        value_of(expression, {"a": 80, "name": "debug", "long": 10**5000, "inf": math.inf, "nan": math.nan})


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("matched")
    os.chdir(folder)
    try:
        yield swept(f"{EXPERTS}=2,8", "seed=3", "sweep.fixed_slots=true", "checkpoint.folder=far",
                    'sweep.couple={schedule.peak: "0.002 / seed * 3", steps: "10 * model.moe.num_experts", batch_size: "8 * model.moe.slots_per_expert"}')  # fmt: skip
    finally:
        os.chdir(before)


def test_slots_follow_from_each_number_of_experts(matched: Sweep) -> None:
    """4 x 2 without the sweep."""
    moes = [point.config.model.moe for point in matched.points]
    assert [(moe.num_experts, moe.slots_per_expert) for moe in moes] == [(2, 4), (8, 1)]
    assert [(point.config.schedule.peak, point.config.steps) for point in matched.points] == [(0.002, 20), (0.002, 80)]
    assert matched.points[0].coupled == {SLOTS: "4", "schedule.peak": "0.002", "steps": "20", "batch_size": "32"}


def test_a_coupling_reads_the_slots_that_follow_from_the_experts(matched: Sweep) -> None:
    assert [point.config.batch_size for point in matched.points] == [8 * 4, 8 * 1]


def test_a_coupling_reads_what_every_point_is_given_beside_its_line_and_changes_none_of_it() -> None:
    kind = Kind("train", compose_train, lambda *_: [], ("processes=2",))
    made = make_sweep(kind, ["recipe=debug", "seed=1,2", 'sweep.couple={batch_size: "8 * processes"}'])
    assert [point.config.batch_size for point in made.points] == [16, 16]
    with pytest.raises(ConfigError, match="every point of this sweep has processes=2"):
        make_sweep(kind, ["recipe=debug", "seed=1,2", 'sweep.couple={processes: "seed"}'])


def test_each_point_has_folders_and_a_name_of_its_own_and_the_group_of_the_sweep(matched: Sweep) -> None:
    for point, label in zip(matched.points, ["num_experts=2", "num_experts=8"], strict=True):
        config = point.config
        assert (config.run_dir, config.name, str(config.checkpoints)) == (
            f"runs/debug-sweep/{label}",
            label,
            f"far/{label}",
        )
        assert config.observe.wandb.group == "debug-sweep"
        assert compose_train(point.overrides, lambda _: []) == config  # what its process is given
    assert matched.folder == Path("runs/debug-sweep") and matched.measure == "highest upstream/test/top1"


def test_a_total_of_slots_may_be_named_and_is_kept_by_every_point() -> None:
    points = swept(f"{EXPERTS}=4,16", "sweep.fixed_slots=16", "run_dir=here", "observe.wandb.group=mine").points
    assert [point.config.model.moe.slots_per_expert for point in points] == [4, 1]
    assert [(str(p.folder), p.config.observe.wandb.group) for p in points] == [
        ("here/num_experts=4", "mine"),
        ("here/num_experts=16", "mine"),
    ]


def test_every_illegal_point_is_named_with_its_reason_in_one_message() -> None:
    problems = refused(
        f"{EXPERTS}=3,4", "batch_size=16,17", "processes=2", "parallel.expert_axis=2", "sweep.retries=-1"
    )
    assert sum("sweep.retries=-1" in problem for problem in problems) == 1
    assert any("num_experts=3_batch_size=16" in p and f"{EXPERTS}=3" in p for p in problems)
    assert any("num_experts=4_batch_size=17" in p and "batch_size=17" in p for p in problems)
    assert not any("num_experts=4_batch_size=16" in p for p in problems)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "no override has several values"),
        (["seed=1,1"], "the same folder"),
        (["run_dir=a,b"], "run_dir: it is that of the whole sweep"),
        (["name=a,b"], "give it as run_dir="),
        ([f"{EXPERTS}=4,8", f"{SLOTS}=1,2", "sweep.fixed_slots=true"], "is swept too"),
        ([f"{EXPERTS}=4,8", f"{SLOTS}=2", "sweep.fixed_slots=16"], "is given too"),
        (["seed=1,2", "sweep.fixed_slots=true"], "to be swept"),
        ([f"{EXPERTS}=4,6", "sweep.fixed_slots=true"], f"num_experts=6: {EXPERTS}=6 does not divide"),
        ([f"{EXPERTS}=4,8", "model.moe.router=experts_choice", "sweep.fixed_slots=8"], "does not read it"),
        (["seed=1,2", 'sweep.couple={steps: "seed / 2"}'], "seed=1: sweep.couple={steps: 'seed / 2'} gives 0.5"),
        (["seed=1,2", 'sweep.couple={name: "seed"}'], "is no number"),
        (["seed=1,2", 'sweep.couple={seed: "steps"}'], "seed is given on the line too"),
        (["seed=1,2", 'sweep.couple={steps: "batch_size", batch_size: "16"}'], "batch_size is coupled itself"),
        (["seed=1,2", "sweep.fixed_slot=true"], "did you mean fixed_slots?"),
        (["seed=1,2", "sweep.measure=upstream/test/top1"], "write highest or lowest"),
        (["seed=1,2", "sweep.measure=highest fewshot/pets/10shot"], "would not measure fewshot/pets/10shot"),
        (["seed=1,2", "hydra/launcher=joblib"], "hydra/launcher=joblib"),
        (["seed=1,2", "hydra.sweep.dir=x"], "is run_dir="),
        (["processes=1,2", "sweep.processes=1"], "processes=2: processes=2 is more than sweep.processes=1"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)  # fmt: skip
def test_a_sweep_that_is_wrong_is_refused(words: list[str], said: str) -> None:
    assert any(said in problem for problem in refused(*words)), refused(*words)


def test_a_point_that_is_complete_or_runs_elsewhere_is_no_mistake() -> None:
    done, used = swept("seed=1,2").points
    done.folder.mkdir(parents=True)
    save_yaml(done.config.as_saved(), done.folder / "config.yaml")
    (done.folder / "summary.json").write_text('{"ended": "complete", "steps": 20}')
    with held_by_another(used.folder):
        assert [point.label for point in swept("seed=1,2").points] == ["seed=1", "seed=2"]
