"""This file owns what a person is told when shards are made."""

import os

from softmoe_train.shards.make import CLASSES, LEFT_OUT, Made
from softmoe_train.shards.settings import MakeSettings


def told_of(settings: MakeSettings, made: Made) -> str:
    """A few lines: what is there, what was left out, and the command that trains on it."""
    assert settings.out is not None
    out = settings.out.rstrip("/") or "/"
    lines = [f"{out}: {'already there' if made.already else 'made'}"]
    for name, (shards, samples) in made.splits.items():
        lines.append(f"  {name}: {samples:,} pictures in {shards:,} {'shard' if shards == 1 else 'shards'}")
    if made.classes is not None:
        lines.append(f"  {made.classes:,} {'class' if made.classes == 1 else 'classes'}, by name in {out}/{CLASSES}")
    if made.left_out:
        lines.append(
            f"  {made.left_out:,} {'file was' if made.left_out == 1 else 'files were'} left out, each with its reason in {out}/{LEFT_OUT}"
        )
    keys = [f"data.train={_spec(out, settings.name)}"]
    if settings.held_out in made.splits:
        keys.append(f"data.test={_spec(out, settings.held_out)}")
    classes = made.classes or made.labels
    keys += [f"model.num_classes={classes}"] if classes is not None else []
    return "\n".join([*lines, f"to train on them: softmoe train {' '.join(keys)} ..."])


def _spec(out: str, name: str) -> str:
    return f"'{os.path.join(out, name)}-*.tar'"
