"""A manifest that could mislead the reader is refused, whatever its hash."""

import copy
import json
from typing import Any

import pytest
from pydantic import ValidationError

from softmoe_train.checkpoint.manifest import Manifest, Mark

NAME = "model.moe.experts.w1"
SHA, HASH = "0" * 64, "0" * 32
SOUND: dict[str, Any] = {
    "version": 2,
    "files": {"rank_00000.safetensors": 100, "rank_00001.safetensors": 100},
    "tensors": {
        NAME: {
            "shape": [4, 2],
            "dtype": "float32",
            "chunks": [
                {"offsets": [0, 0], "sizes": [2, 2], "file": "rank_00000.safetensors", "start": 80, "xxh128": HASH,
                 "experts": [0, 2]},
                {"offsets": [2, 0], "sizes": [2, 2], "file": "rank_00001.safetensors", "start": 80, "xxh128": HASH,
                 "experts": [2, 4]},
            ],
        }
    },
}  # fmt: skip


def changed(path: tuple[Any, ...], value: object) -> str:
    data = copy.deepcopy(SOUND)
    spot = data
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return json.dumps(data)


def test_a_sound_manifest_comes_back_as_it_was() -> None:
    manifest = Manifest.model_validate_json(json.dumps(SOUND))
    assert json.loads(manifest.model_dump_json()) == SOUND


@pytest.mark.parametrize(
    "file",
    ["../rank_00000.safetensors", "/etc/rank.safetensors", "a/b.safetensors", "..", ".safetensors", "a\\b.safetensors",
     "rank_00000.pt", "rank_00000.safetensors\n", "a.safetensors/../x",
     "%2e%2e%2fx.safetensors", "", "a\0.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["files", "chunk"])
def test_a_file_name_that_is_no_plain_base_name_is_refused(file: str, place: str) -> None:
    if place == "files":
        text = changed(("files",), {**SOUND["files"], file: 100})
    else:
        text = changed(("tensors", NAME, "chunks", 0, "file"), file)
    with pytest.raises(ValidationError, match="pattern"):
        Manifest.model_validate_json(text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 1, "literal_error"),
        (("files",), {**SOUND["files"], "rank_00002.safetensors": 8}, "rank_00002.safetensors holds no chunk"),
        (("extra",), 1, "extra_forbidden"),
        (("tensors", NAME, "dtype"), "object", "literal_error"),
        (("tensors", NAME, "shape"), [5, 2], "hold 8 of 10 elements"),
        (("tensors", NAME, "shape"), [-4, -2], "greater_than_equal"),
        (("tensors", NAME, "shape"), [4.0, 2], "int_type"),
        (("tensors", NAME, "chunks", 1, "offsets"), [1, 0], "overlap"),
        (("tensors", NAME, "chunks", 1, "sizes"), [3, 2], "outside the shape"),
        (("tensors", NAME, "chunks", 1, "experts"), [0, 2], "claims experts"),
        (("tensors", NAME, "chunks", 1, "file"), "rank_00007.safetensors", "not among the files"),
        (("tensors", NAME, "chunks", 1, "file"), "rank_00000.safetensors", "not its own"),
        (("tensors", NAME, "chunks", 1, "start"), 90, "its chunks need 106"),
        (("tensors", NAME, "chunks", 1, "start"), 4, "not its own"),
        (("tensors", NAME, "chunks", 1, "xxh128"), "abc", "pattern"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(path: tuple[Any, ...], value: object, words: str) -> None:
    with pytest.raises(ValidationError) as error:
        Manifest.model_validate_json(changed(path, value))
    assert any(words in f"{fault['type']} {fault['msg']}" for fault in error.value.errors()), error.value


@pytest.mark.parametrize("name", ["../config", "a/b", "Config", "", "con fig"])
def test_a_mark_cannot_name_a_document_outside_the_folder(name: str) -> None:
    mark = {"version": 2, "step": 1, "world": 1, "manifest": SHA, "documents": {name: SHA}, "own": SHA}
    with pytest.raises(ValidationError, match="pattern"):
        Mark.model_validate_json(json.dumps(mark))
