"""This file owns which tar files a specification names: folders, globs, brace patterns and single files."""

import glob
import os
import re
from collections import Counter

from braceexpand import braceexpand

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


def expand_shards(spec: str | list[str] | None, *, key: str) -> list[str]:
    """The absolute paths of the tars that `spec` names: folders, globs, brace patterns or files, in a fixed order.

    `key` names the configuration value in messages. Raises ValueError where nothing is named or something is missing.
    """
    specs = [spec] if isinstance(spec, str) else spec or []
    if not specs or not all(specs):
        raise ValueError(
            f"{key} is not set: name a folder, a glob or a brace pattern of tar shards, as in {key}=FOLDER (data=synthetic needs none)."
        )
    paths = [os.path.abspath(path) for one in specs for path in _expand(one, key)]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"{key}={spec} names {twice[0]} twice: a shard is read once an epoch; name it once.")
    return paths


def _expand(spec: str, key: str) -> list[str]:
    if _SCHEME.match(spec):
        raise ValueError(
            f"{key}={spec} is not a local path: shards are read from local or mounted folders; mount or copy them."
        )
    spec = os.path.expanduser(spec)
    if os.path.isdir(spec):
        found = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not found:
            raise ValueError(f"{key}={spec} holds no *.tar file: name the folder that the shards lie in.")
        return found
    if os.path.exists(spec):
        return [spec]
    try:
        patterns = list(braceexpand(spec))
    except ValueError as error:
        raise ValueError(
            f"{key}={spec} is not a brace pattern ({error}); write it as train-{{0000..0099}}.tar."
        ) from None
    found, missing = [], []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{key}={spec}: {', '.join(missing[:3])}{rest} cannot be found: every named shard must exist; correct the "
            f"path or the pattern (relative paths start at {os.getcwd()})."
        )
    return found
