"""This file owns configuration: the record base class, composing YAML and overrides into records, saving and loading a run.

Every mistake is found before it is reported: all of them go into one message.
"""

import difflib
import itertools
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class Record(BaseModel):
    """A frozen, strictly typed record: no defaults, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=Record)
NO_FILE = "no such file under conf/"
SEVERAL = "several values are a sweep, `softmoe train -m ...`; give one, or write a list as [2,4]"
# Mappings whose keys are a user's own names.
OPEN = re.compile(r"(evals\.\w+\.sets|finetune)[.=]")
HYDRA = re.compile(r"[+~]*hydra[./=]")
Tree = dict[str, Any]


class ConfigError(ValueError):
    """What is wrong with a configuration: one entry in `problems` per mistake."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems = list(dict.fromkeys(problems))  # two checks may read the same file
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(
            f"{count} in the configuration, nothing was started:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def config_folder() -> Path:
    """The YAML files: `conf/` of the checkout, or the copy inside an installed package."""
    checkout = Path(__file__).resolve().parent.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else Path(__file__).resolve().parent / "_conf"


def compose(
    record: type[R],
    overrides: list[str],
    check: Callable[[R], list[str]],
    change: Callable[[Tree], object] = lambda _: None,
) -> R:
    """The resolved configuration: YAML of `config_folder()`, then `overrides`, then `change`, as a record that passes its rules and `check`.

    Raises ConfigError with every mistake: misspelt keys, wrong types, broken rules of one record, and what `check` says of
    their combination.
    """
    tree, problems = _compose_tree([_quoted(override) for override in overrides])
    if tree is None:
        raise ConfigError(problems)
    change(tree)
    return _checked(record, tree, problems, check)


def compose_onto(record: type[R], saved: Tree, overrides: list[str], check: Callable[[R], list[str]]) -> R:
    """The configuration of a saved run with `overrides` on top, as a record that passes its rules and `check`.

    A group's override replaces what was saved; what an earlier version did not save is as the YAML says. Raises ConfigError as `compose`.
    """
    composed, problems = _compose_tree(_kinds_of(saved))
    assert composed is not None, problems
    tree = filled(saved, composed)
    for override in sorted(map(_quoted, overrides), key=lambda o: not _chooses_group(o)):
        problems += _laid_onto(tree, override)
    return _checked(record, tree, problems, check)


def _checked(record: type[R], tree: Tree, problems: list[str], check: Callable[[R], list[str]]) -> R:
    """The tree as a record that passes its rules and `check`; raises ConfigError with these `problems` and all others."""
    config, found = parse(record, tree)
    problems = problems + found
    if config is not None and not any(NO_FILE in problem for problem in problems):  # else it would judge another choice
        problems += check(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def split_overrides(own: type[Record], run: type[Record], overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of a verb that has keys of its own beside those of a run: its own (misspelt ones too), and the run's."""
    mine, others = [], []
    for override in overrides:
        key = override.partition("=")[0]
        misspelt = "." not in key and key not in run.model_fields and difflib.get_close_matches(key, own.model_fields)
        (mine if key in own.model_fields or misspelt else others).append(override)
    return mine, others


def compose_own(record: type[R], file: str, overrides: list[str]) -> tuple[R | None, list[str]]:
    """The keys that one verb has beside a run's: the YAML `file` under conf/, then `overrides`, and all that is wrong.

    A value with commas (`images=8,32`) is a list, as is one in brackets.
    """
    tree, problems = load_yaml(config_folder() / file), []
    for override in overrides:
        parsed = _parsed(override := _quoted(override))
        key = override.partition("=")[0]
        if key not in tree:
            problems.append(_no_such_key(override, key, list(tree), f"it has {', '.join(tree)}"))
        elif parsed is None:
            problems.append(_override_wording(override, ValueError(), []))
        else:
            tree[key] = list(parsed.sweep_iterator()) if parsed.is_choice_sweep() else parsed.value()
    settings, found = parse(record, tree)
    return settings, problems + found


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """Every combination of a sweep in Hydra's own syntax (`seed=1,2`, `steps=range(10,30,10)`), the last key fastest."""
    choices = []
    for override in overrides:
        parsed = _parsed(override)
        if parsed is None or not parsed.is_sweep_override():
            choices.append([override])
        else:
            choices.append([f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()])
    return [list(point) for point in itertools.product(*choices)]


def parse(record: type[R], tree: Tree) -> tuple[R | None, list[str]]:
    """A tree as a record, with everything that is wrong in it. Unknown keys do not hide what else is wrong."""
    problems: list[str] = []
    try:
        return record.model_validate(tree), problems
    except ValidationError as error:
        details = error.errors()
    unknown = [d for d in details if d["type"] == "extra_forbidden"]
    problems += [_unknown_key(d["loc"], tree) for d in unknown]
    if not unknown:
        return None, [_wording(d, tree) for d in details]
    config, others = parse(record, _without(tree, [_path_in(d["loc"], tree) for d in unknown]))
    return config, problems + others


def save_yaml(tree: Tree, path: Path) -> None:
    """Write a resolved configuration as plain YAML."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def load_yaml(path: Path) -> Tree:
    """Read what `save_yaml` wrote: plain YAML, no interpolation, no objects. Raises ValueError for anything but a mapping."""
    tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no configuration: expected a mapping, found {type(tree).__name__}")
    return tree


def as_yaml(config: Record) -> str:
    """The whole configuration as people read it."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def flat(tree: Tree, prefix: str = "") -> Tree:
    """Every value of a tree by its dotted key."""
    leaves: Tree = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return leaves


def out_problems(key: str, path: str | None, suffix: str) -> list[str]:
    """Why we could not write this file."""
    if path is None:
        return []
    if not path.endswith(suffix):
        return [f"{key}={path} is not a {suffix} file; end it in {suffix}"]
    if Path(path).is_dir():
        return [f"{key}={path} is a folder; name a file"]
    folder = Path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return [f"{key}={path}: {folder} is not a folder that we may write to; make it, or give another path"]
    return []


def _json_out(path: str | None) -> str | None:
    problems = out_problems("out", path, ".json")
    if problems:
        raise ValueError(problems[0])
    return path


JsonOut = Annotated[str | None, AfterValidator(_json_out)]  # the key `out` of a verb: a JSON file for programs


def _compose_tree(overrides: list[str]) -> tuple[Tree | None, list[str]]:
    """The composed tree without the overrides that are wrong, and what is wrong with those.

    Hydra stops at its first mistake. So on any mistake each override is tried by itself on top of the chosen groups.
    """
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        problems = [f"{o}: Hydra's own settings do nothing here; leave it out" for o in overrides if HYDRA.match(o)]
        overrides = [o for o in overrides if not HYDRA.match(o)]
        with suppress(HydraException, OmegaConfBaseException):
            return _resolved(overrides), problems
        good: list[str] = []
        for override in sorted(overrides, key=lambda o: not _chooses_group(o)):
            chosen = [o for o in good if _chooses_group(o)]
            error = _error([*chosen, override])
            # What an override before it has made (`data.mixture={a: ...}` `data.mixture.a.weight=2`) is there with it alone.
            if error is None or _error([*good, override]) is None:
                good.append(override)
            else:
                problems.append(_override_wording(override, error, chosen))
        error = _error(good)
        if error is not None:
            return None, [*problems, _first_line(error)]
        return _resolved(good), problems


def _laid_onto(tree: Tree, override: str) -> list[str]:
    """Put one override into a tree; returns what is wrong with it."""
    parsed = _parsed(override)
    if parsed is None:
        return [_override_wording(override, ValueError(), [])]
    if parsed.is_sweep_override():
        return [f"{override}: {SEVERAL}"]
    *above, last = path = (parsed.package or parsed.key_or_group).split(".")
    if _chooses_group(override):
        composed, problems = _compose_tree([override])
        if problems or composed is None:
            return problems
        value: Any = composed
        for part in path:
            value = value[part]
    else:
        value = parsed.value()
    here: Any = tree
    is_open = OPEN.match(f"{'.'.join(path)}.") is not None
    for part in above:
        if is_open and isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here.get(part) if isinstance(here, dict) else None
    if not isinstance(here, dict) or (last not in here and not is_open):
        return [_no_such_key(override, ".".join(path), _leaves(tree))]
    here[last] = value
    return []


def _kinds_of(saved: Tree) -> list[str]:
    """The choices of groups that make a composed tree of the same kinds as a saved one (of data, of an optimizer, of transforms)."""
    data, groups = saved.get("data"), {group: saved.get(group) for group in ("data", "optim", "schedule", "engine")}
    transforms = ("train_transform", "test_transform") if isinstance(data, dict) else ()
    groups |= {f"transform@data.{key}": data.get(key) for key in transforms}  # pyright: ignore[reportOptionalMemberAccess]
    kinds = [(group, tree.get("kind")) for group, tree in groups.items() if isinstance(tree, dict)]
    return [f"{g}={kind}" for g, kind in kinds if (config_folder() / g.partition("@")[0] / f"{kind}.yaml").is_file()]


def filled(saved: Tree, composed: Tree) -> Tree:
    """What was saved, and below it what it lacks of the composed tree, where both are of one kind."""
    if saved.get("kind") != composed.get("kind"):
        return saved
    both = {**composed, **saved}
    return {
        key: filled(value, composed[key]) if isinstance(value, dict) and isinstance(composed.get(key), dict) else value
        for key, value in both.items()
    }


def _resolved(overrides: list[str]) -> Tree:
    composed = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    assert isinstance(composed, dict), type(composed)
    tree = {str(key): value for key, value in composed.items()}
    for parsed in filter(None, map(_parsed, overrides)):
        chosen = parsed.value() if parsed.key_or_group in tree else None
        if isinstance(chosen, list) and isinstance(tree[parsed.key_or_group], dict):
            # A list of a group's files is exact: what a recipe sets for others does not bring them back.
            tree[parsed.key_or_group] = {k: v if k in chosen else None for k, v in tree[parsed.key_or_group].items()}
    return tree


def _error(overrides: list[str]) -> Exception | None:
    try:
        _resolved(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return error
    return None


def _parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _quoted(override: str) -> str:
    """A value that Hydra's grammar cannot read, such as a brace pattern of shards, taken as the string that it is; a key below `OPEN` as new."""
    if OPEN.match(override):
        override = f"++{override}"
    key, equals, value = override.partition("=")
    if _parsed(override) is not None or not equals or not value or {"'", "\\"} & set(value):
        return override
    quoted = f"{key}='{value}'"
    return quoted if _parsed(quoted) is not None else override


def _chooses_group(override: str) -> bool:
    parsed = _parsed(override)
    return parsed is not None and (config_folder() / parsed.key_or_group).is_dir()


def _override_wording(override: str, error: Exception, chosen: list[str]) -> str:
    parsed = _parsed(override)
    if parsed is None:
        return f"{override.removeprefix('++')}: not an override; write key=value (quote values with spaces or commas)"
    if _chooses_group(override):
        folder = config_folder() / parsed.key_or_group
        nested = Path(str(parsed.value())).parent  # finetune, of recipe=finetune/imagenet
        files = [*folder.glob("*.yaml"), *(folder.glob(f"{nested}/*.yaml") if nested.name else [])]
        names = [file.relative_to(folder).with_suffix("") for file in files if not file.stem.startswith("_")]
        options = sorted(map(str, names))
        return f"{override}: {NO_FILE}{parsed.key_or_group}; use one of {', '.join(options)}"
    told = f"{error}\n{error.__cause__}"
    if "not in struct" in told or "Could not override" in told:
        named = re.search(r"full_key: (\S+)", told)  # inside the value, where that is a mapping
        key = max(parsed.key_or_group, named.group(1) if named else "", key=len)
        groups = [folder.name for folder in config_folder().iterdir() if folder.is_dir()]
        return _no_such_key(override, key, [*groups, *_leaves(_resolved(chosen))])
    return f"{override}: {SEVERAL if parsed.is_sweep_override() else _first_line(error)}"


def _no_such_key(
    shown: str, key: str, known: list[str], otherwise: str = "`softmoe train --cfg job` prints every key"
) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    remedy = f"did you mean {' or '.join(close)}?" if close else otherwise
    return f"{shown}: there is no key {key}; {remedy}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _leaves(tree: Tree, prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
    return found


def _path_in(location: tuple[int | str, ...], tree: Tree) -> tuple[int | str, ...]:
    """The keys of `location` that are in the tree: pydantic adds the names of union members on the way."""
    path: list[int | str] = []
    here: Any = tree
    for part in location[:-1]:
        if isinstance(here, list | dict) and (isinstance(here, list) or part in here):
            here = here[part]  # pyright: ignore[reportCallIssue, reportArgumentType]
            path.append(part)
    return (*path, *location[-1:])  # a rule of a whole record has no place


def _unknown_key(location: tuple[int | str, ...], tree: Tree) -> str:
    key = ".".join(map(str, _path_in(location, tree)))
    return f"{key}: there is no such key; remove it (`softmoe train --cfg job` prints every key)"


def _without(tree: Tree, paths: list[tuple[int | str, ...]]) -> Tree:
    pruned = OmegaConf.to_container(OmegaConf.create(tree))
    assert isinstance(pruned, dict)
    for path in paths:
        here: Any = pruned
        for part in path[:-1]:
            here = here[part]
        here.pop(path[-1], None)
    return {str(key): value for key, value in pruned.items()}


def _wording(detail: ErrorDetails, tree: Tree) -> str:
    key = ".".join(map(str, _path_in(detail["loc"], tree)))
    if detail["type"] == "value_error":
        # A rule of our own, which names its keys itself.
        return str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
    if detail["type"] == "missing":
        return f"{key}: no value; give one"
    given = "" if isinstance(detail["input"], dict) else f"={detail['input']!r}"
    return f"{key}{given}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
