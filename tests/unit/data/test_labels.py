"""Labels come from .cls or JSON, as integers or names, and whatever is no label says so."""

import itertools
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from softmoe_train.data import check_data, check_labels
from softmoe_train.data.decode import UnreadableSampleError
from softmoe_train.data.fields import MAX_TEXT_BYTES, field_of, text_of
from softmoe_train.data.labels import build_labels, read_classes
from tests.unit.data.conftest import settings

NAMES = ["daisy", "caf\u00e9 au lait", "tulip", "rose garden"]


@pytest.fixture
def classes(tmp_path: Path) -> str:
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(NAMES) + "\n", "utf-8")
    return str(file)


def read(member: bytes, num_classes: int = 10, **changes: object) -> list[int]:
    labels = build_labels(settings(**changes), num_classes)
    assert labels is not None
    return labels.classes_of(member)


@pytest.mark.parametrize(
    ("member", "changes", "classes"),
    [
        (b" 7\n", {}, [7]),
        (b"1 2\t3\n", {"labels": "multi_hot"}, [1, 2, 3]),
        (b'{"a": {"b": 4}}', {"label": "json:a.b"}, [4]),
        (b'{"a": "4"}', {"label": "json:a"}, [4]),
        (b'{"a": [4]}', {"label": "json:a"}, [4]),
        (b'{"a": [4, "5"]}', {"label": "json:a", "labels": "multi_hot"}, [4, 5]),
        (b'{"a": [{"n": 1}, {"n": 2}]}', {"label": "json:a.1.n"}, [2]),
    ],
)
def test_integers_are_read_from_cls_and_from_json(member: bytes, changes, classes: list[int]) -> None:
    assert read(member, **changes) == classes


@pytest.mark.parametrize(
    ("member", "changes", "numbers"),
    [
        (b"tulip\n", {}, [2]),
        (b"  rose garden \r\n", {}, [3]),
        ("cafe\u0301 au lait".encode(), {}, [1]),  # the accent as a character of its own
        (b"tulip\nrose garden\n\n", {"labels": "multi_hot"}, [2, 3]),
        (b'{"kind": "daisy"}', {"label": "json:kind"}, [0]),
        (b'{"kinds": ["daisy", "cafe\\u0301 au lait"]}', {"label": "json:kinds", "labels": "multi_hot"}, [0, 1]),
    ],
)
def test_names_are_the_numbers_of_their_lines(member: bytes, changes, numbers: list[int], classes: str) -> None:
    assert read(member, classes=classes, **changes) == numbers


@pytest.mark.parametrize(
    ("member", "changes", "reason"),
    [
        (b"tulpi", {"classes": ""}, "label 'tulpi' is no name of data.classes; the nearest are tulip"),
        (b"3", {"classes": ""}, "label '3' is no name of data.classes; names are like daisy"),
        (b"tulip\ndaisy", {"classes": ""}, "is not one name (data.labels=hard)"),
        (b"\xff\xfe", {"classes": ""}, "its label is not UTF-8 (byte 0)"),
        (b'{"a": 3}', {"classes": "", "label": "json:a"}, "label 3 is no name, and data.classes makes labels names"),
        (b"tulip " * 100_000, {"classes": ""}, "is no name of data.classes"),
        (b'{"a": 3.0}', {"label": "json:a"}, "label 3.0 is not one integer"),
        (b'{"a": true}', {"label": "json:a"}, "label True is not one integer"),
        (b'{"a": null}', {"label": "json:a"}, "label None is not one integer"),
        (b'{"a": [1, 2]}', {"label": "json:a"}, "label [1, 2] is not one integer"),
        (b'{"a": []}', {"label": "json:a", "labels": "multi_hot"}, "label [] is not integers"),
        (b'{"a": [[1]]}', {"label": "json:a", "labels": "multi_hot"}, "is not integers"),
        (b'{"a": {"b": 1}}', {"label": "json:a"}, "is not one integer"),
        (b'{"a": 1}', {"label": "json:b"}, "its .json has no field b"),
        (b'{"a": [1]}', {"label": "json:a.1"}, "its .json has no field a.1"),
        (b'{"a": [1]}', {"label": "json:a.-1"}, "its .json has no field a.-1"),
        (b'{"a": [1]}', {"label": "json:a.\u00b2"}, "its .json has no field"),
        (b'{"a": [1]}', {"label": "json:a." + "9" * 50}, "its .json has no field"),
        (b'{"a": 10}', {"label": "json:a"}, "label 10 is outside 0 to 9 (model.num_classes=10)"),
        (b'{"a": -1}', {"label": "json:a"}, "label -1 is outside 0 to 9"),
        (b'{"a": NaN}', {"label": "json:a"}, "NaN is no number"),
        (b'{"a": 1, "a": 2}', {"label": "json:a"}, "the key 'a' is there twice"),
        (b'{"a": ' + b"9" * 100_000 + b"}", {"label": "json:a"}, "a number of 100000 digits"),
        (b'{"a": ' + b"[" * 400_000 + b"}", {"label": "json:a"}, "nested too deeply"),
        (b'{"a": 1', {"label": "json:a"}, "its .json cannot be read"),
        (b'\xef\xbb\xbf{"a": 1}', {"label": "json:a"}, "its .json cannot be read"),
        (b"", {"label": "json:a"}, "its .json cannot be read"),
        ('{"a": 1}'.encode("utf-16"), {"label": "json:a"}, "its .json is not UTF-8"),
    ],
    ids=map(str, itertools.count()),  # some members are megabytes
)
def test_what_is_no_label_says_why(member: bytes, changes: dict, reason: str, classes: str) -> None:
    changes = {key: classes if key == "classes" else value for key, value in changes.items()}
    with pytest.raises(UnreadableSampleError) as caught:
        read(member, **changes)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def test_renumbered_classes_are_places_in_the_list(classes: str) -> None:
    keep = {"labels": ["tulip", 0], "keys": None, "renumber": True}
    assert read(b"tulip", 2, classes=classes, keep=keep) == [0]
    assert read(b"daisy", 2, classes=classes, keep=keep) == [1]
    assert read(b"rose garden\ndaisy", 2, classes=classes, keep=keep, labels="multi_hot") == [1]
    assert read(b"2", keep={**keep, "labels": [0, 2], "renumber": False}) == [2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\na\n", "has 'a' on lines 1 and 3"),
        ("a\nb\n a\r\n", "has 'a' on lines 1 and 3"),
        ("caf\u00e9\ncafe\u0301\n", "on lines 1 and 2"),
        ("a\n\nb\n", "line 2 is empty"),
        ("", "line 1 is empty"),
    ],
)
def test_a_file_of_names_that_numbers_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text, "utf-8", newline="")
    for refused in (lambda: read_classes(str(file)), lambda: read(b"a", classes=str(file))):
        with pytest.raises(ValueError, match=r"data\.classes=") as caught:
            refused()
        assert said in str(caught.value)


def test_a_file_of_names_may_have_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("\ufeffa b\r\n\u00e9\r\n".encode())
    assert read_classes(str(tmp_path / "c.txt")) == ["a b", "\u00e9"]


@pytest.mark.parametrize("name", ["none.txt", "folder", "fifo"])
def test_a_file_of_names_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is not a file"):
        read_classes(str(tmp_path / name))


@pytest.mark.parametrize(
    ("num_classes", "keep", "said"),
    [
        (4, {}, None),
        (9, {}, None),
        (3, {}, "names 4 classes and model.num_classes=3: each name needs a class; set model.num_classes=4"),
        (2, {"labels": ["tulip", "daisy"], "renumber": True}, None),
        (1, {"labels": ["tulip", "daisy"], "renumber": True}, "lists 2 labels, which data.keep.renumber makes classes"),
        (9, {"labels": ["tulpi"]}, "'tulpi' is no name of data.classes"),
        (9, {"labels": ["tulip", 2]}, "lists label 2 twice"),
        (9, {"labels": [9]}, "lists 9, and model.num_classes=9"),
    ],
)
def test_more_classes_than_the_model_has_are_refused(classes: str, num_classes: int, keep, said: str | None) -> None:
    cfg = settings(classes=classes, keep={"labels": None, "keys": None, "renumber": False, **keep})
    problems = check_labels(cfg, num_classes)
    assert problems == [] if said is None else said in problems[0]


def test_settings_that_contradict_each_other_are_refused_before_a_shard_is_read(tmp_path: Path, classes: str) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar")

    def problems(**changes: object) -> list[str]:
        cfg = settings(train=str(tmp_path), **changes)
        return check_data(cfg, image_size=8, global_batch=8, world=1, needs_test=False)

    assert problems(labels="none", text="txt") == []
    keep = {"labels": [1], "keys": None, "renumber": False}
    assert len(problems(labels="none", classes=classes, keep=keep)) == 2
    assert "data.text=txt with data.mixup=0.2" in problems(text="txt", mixup=0.2)[0]
    assert "is not a file" in problems(classes="/nowhere")[0]
    assert "is not a file" in problems(quarantine="/nowhere")[0]
    assert "'a' is no name of data.classes=None" in problems(keep={**keep, "labels": ["a"]})[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "txt"}, {"label": "json:"}, {"label": "json:a..b"}, {"label": "pkl"}, {"text": "cls"}, {"text": "json:"},
        {"keep": {"labels": [], "keys": None, "renumber": False}},
        {"keep": {"labels": None, "keys": None, "renumber": True}},
        {"keep": {"labels": None, "keys": "(", "renumber": False}},
        {"keep": {"labels": [-1], "keys": None, "renumber": False}},
        {"keep": {"labels": [True], "keys": None, "renumber": False}},
    ],
)  # fmt: skip
def test_what_can_be_no_label_text_or_filter_is_refused(changes: dict) -> None:
    with pytest.raises(ValidationError):
        settings(**changes)


@pytest.mark.parametrize(
    ("member", "path", "text"),
    [
        (" two dogs\u2026 \n".encode(), None, "two dogs\u2026"),
        (b'{"captions": ["one", "two"]}', ("captions", "1"), "two"),
        (b"x" * MAX_TEXT_BYTES, None, "x" * MAX_TEXT_BYTES),
    ],
    ids=["txt", "json", "longest"],
)
def test_a_text_is_read_from_txt_and_from_json(member: bytes, path, text: str) -> None:
    assert text_of(member, path) == text


@pytest.mark.parametrize(
    ("member", "path", "reason"),
    [
        (b"\xff", None, "its text is not UTF-8 (byte 0)"),
        (b" \n", None, "its text is empty"),
        (b"x" * (MAX_TEXT_BYTES + 1), None, "more than"),
        (b'{"a": ["x"]}', ("a",), "its text is no string"),
        (b'{"a": "\\ud800"}', ("a",), "half a character"),
        (json.dumps({"a": "\u00e9" * MAX_TEXT_BYTES}).encode(), ("a",), "more than"),
    ],
    ids=["not utf-8", "empty", "too long", "a list", "half", "too long in bytes"],
)
def test_what_is_no_text_says_why(member: bytes, path, reason: str) -> None:
    with pytest.raises(UnreadableSampleError) as caught:
        text_of(member, path)
    assert reason in str(caught.value)


def test_a_field_is_found_inside_objects_and_lists() -> None:
    assert field_of(b'{"a": {"0": [5]}}', ("a", "0", "0")) == 5
