"""This file owns what a check can find: kinds of problems and of notices, and a tally of them that stays small however many there are."""

import json
import tempfile
from collections.abc import Iterator
from typing import IO, NamedTuple

# What training cannot use, or would use wrongly; what a quarantine leaves out is marked.
PROBLEMS = {
    "broken tar": False,
    "not what its index says": False,
    "missing picture": True,
    "missing label": True,
    "empty member": True,
    "label malformed": True,
    "label out of range": True,
    "decompression bomb": True,
    "undecodable picture": True,
    "truncated picture": True,
    "damaged picture": True,
    "changed since it was indexed": True,
    "duplicate key": False,  # both are good, and a list by key would lose both
    "layout": False,
}
NOTICES = (
    "animated picture",  # its first frame counts
    "extraneous bytes in a JPEG",
    "same key in several shards",
    "same picture in train and test",
)
EXAMPLES = 5  # of a kind, for people


class Finding(NamedTuple):
    """Something about one sample (or, without a key, one shard)."""

    kind: str
    split: str
    shard: str
    sha256: str
    key: str
    reason: str


class Tally:
    """Counts and examples of findings by kind; all of them lie in a file without a name."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}  # kind, split
        self.examples: dict[str, list[Finding]] = {}
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", prefix="softmoe-check-")  # noqa: SIM115

    def add(self, finding: Finding) -> None:
        """Count it."""
        by_split = self.counts.setdefault(finding.kind, {})
        by_split[finding.split] = by_split.get(finding.split, 0) + 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(finding)
        self._file.write(json.dumps(finding) + "\n")

    def count(self, kind: str) -> int:
        """Of all splits."""
        return sum(self.counts.get(kind, {}).values())

    @property
    def problems(self) -> int:
        """How many findings are problems."""
        return sum(self.count(kind) for kind in PROBLEMS)

    def all(self) -> Iterator[Finding]:
        """Every finding in the order of its coming."""
        self._file.seek(0)
        for line in self._file:
            yield Finding(*json.loads(line))
        self._file.seek(0, 2)

    def quarantined(self) -> Iterator[Finding]:
        """What a quarantine leaves out."""
        return (finding for finding in self.all() if PROBLEMS.get(finding.kind, False) and finding.sha256)
