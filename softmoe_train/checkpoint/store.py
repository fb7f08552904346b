"""This file owns the checkpoints of a run: save, latest, load, and which of them are kept.

A kill at any instant leaves a step folder with its completion mark and everything the mark speaks for, or without the
mark; without it the folder does not exist for `latest` and `load`. The order of a save makes it so: every rank's file
is written and flushed, then the documents and the manifest, then the mark; only then is an older checkpoint deleted.

The training waits for a copy into host memory and for the save before; all that touches the disk is in the background.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

import torch.distributed as dist
from pydantic import Field, model_validator

from softmoe_train.checkpoint.agreement import CheckpointError, agree, from_rank_0
from softmoe_train.checkpoint.background import Background
from softmoe_train.checkpoint.best import RULE
from softmoe_train.checkpoint.folder import (
    delete,
    delete_or_warn,
    flush_folder,
    folder_bytes,
    folders_set_aside,
    has_room,
    room_fault,
    set_aside,
    step_folder,
    step_folders,
    step_of,
    write_flushed,
    write_whole,
)
from softmoe_train.checkpoint.layout import local_box
from softmoe_train.checkpoint.manifest import (
    DOCUMENT_NAME,
    DTYPES,
    JSON,
    MANIFEST,
    MARK,
    Documents,
    Manifest,
    mark_of,
    read_hashed,
    read_manifest,
    read_mark,
    to_json,
)
from softmoe_train.checkpoint.owner import Owner
from softmoe_train.checkpoint.plan import Tensors, WritePlan, held_of, plan_writes
from softmoe_train.checkpoint.reader import Loaded, check_hashes, copy_reads, file_faults, loaded, plan_reads
from softmoe_train.checkpoint.remote import Place, RemotePath, place_problem
from softmoe_train.checkpoint.staging import Staging
from softmoe_train.checkpoint.writer import write_tensors
from softmoe_train.config import Record
from softmoe_train.dist import PendingMax
from softmoe_train.redact import without_secrets

T = TypeVar("T")
Kept = tuple[int | None, int | None]  # the best step, and the step before which the newest is kept too
logger = logging.getLogger(__name__)


class CheckpointConfig(Record):
    """When to save and how much to keep."""

    folder: str | None  # a folder, or a URL of an object store; None: `checkpoints` in the run folder
    every: Annotated[int, Field(ge=0)]  # steps; 0 saves only where a run ends
    keep_last: Annotated[int, Field(ge=1)]  # complete checkpoints
    keep_every: Annotated[int, Field(ge=1)] | None  # steps; checkpoints at its multiples are kept for ever
    best: str | None  # "highest METRIC" or "lowest METRIC": the best checkpoint is kept too
    max_failures: Annotated[int, Field(ge=1)]  # saves in a row that may fail before the run stops
    grace: Annotated[int, Field(ge=1)]  # seconds from a signal to the end of the save that it asks for

    @model_validator(mode="after")
    def _is_clear(self) -> "CheckpointConfig":
        problems = []
        wrong = place_problem(self.folder) if self.folder is not None else None
        if wrong is not None:
            problems.append(f"checkpoint.folder={without_secrets(self.folder)}: {wrong}")
        if self.keep_every is not None and not self.every:
            problems.append(
                f"checkpoint.keep_every={self.keep_every} with checkpoint.every=0, which saves only at the end; use null, or save "
                f"every {self.keep_every} steps"
            )
        elif self.keep_every is not None and self.keep_every % self.every:
            near = -(-self.keep_every // self.every) * self.every
            problems.append(
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.every={self.every}, so most of its steps "
                f"have no checkpoint; use {near}"
            )
        if self.best is not None and not RULE.fullmatch(self.best):
            problems.append(
                f"checkpoint.best={self.best!r} says not which end is good; write it as 'highest upstream/test/top1' or 'lowest "
                f"upstream/test/loss'"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class CheckpointStore:
    """The checkpoints under one folder; every method is called by every rank and raises CheckpointError on all alike.

    `group` is a Gloo group of all `world` ranks that nothing else uses meanwhile; None where there is one process.
    """

    def __init__(
        self,
        folder: Place,
        *,
        keep_last: int,
        keep_every: int | None = None,
        rank: int,
        world: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        assert keep_last >= 1, keep_last
        assert world == (1 if group is None else dist.get_world_size(group)), (world, group)
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.rank = rank
        self.world = world
        self.group = group
        self._owner = Owner(folder)  # rank 0's counts
        self._planned: tuple[WritePlan, Staging] | None = None
        self._background: Background[Place] = Background("checkpoint")

    def prepare(self, tensors: Tensors) -> None:
        """Plan the saves of `tensors` and take the host memory for them, so that the first waits no longer than those after it."""
        what = "no checkpoint can be saved"
        self._agree(what, lambda: _refuse_unfit(tensors))
        self._from_rank_0(what, self._owner.hold)
        self._plan(tensors)

    @property
    def staged_bytes(self) -> int:
        """The host memory of this rank that `prepare` took."""
        return 0 if self._planned is None else self._planned[0].shard.num_bytes

    def shortage(self, best: int | None) -> str | None:
        """On rank 0, that the disk has no room for the next save, in words; None where it has, or where nobody can tell."""
        if self.rank != 0 or self._planned is None or isinstance(self.folder, RemotePath):
            return None
        needed = self._planned[0].bytes_of_all
        try:
            complete = step_folders(self.folder, complete=True)
            following = step_folder(self.folder, step_of(complete[-1]) + 1 if complete else 0)
            spare = sum(folder_bytes(old) for old in self._early(following, complete, (best, None)))
        except OSError:  # a warning is not worth a rank: the next save will tell
            return None
        return None if has_room(self.folder, needed - spare) else room_fault(self.folder, needed)

    def save(self, step: int, tensors: Tensors, documents: Documents, **kept: int | None) -> Place:
        """Save the state of `step` and return its folder: `begin`, which says what may be kept, and `settle`."""
        self.begin(step, tensors, documents, **kept)
        return self.settle() or step_folder(self.folder, step)

    def begin(
        self,
        step: int,
        tensors: Tensors,
        documents: Documents,
        *,
        best: int | None = None,
        before: int | None = None,
    ) -> None:
        """Begin to save the state of `step`; when it returns, the tensors may change. The save before must have been settled.

        `documents` (rank 0's) become `<name>.json`. In the end older checkpoints are deleted, but for the last ones, those of
        every n-th step, that of step `best`, and the newest from before step `before`. A plain tensor is the same on every
        rank. A step that is complete already is left as it is: the state at a step is a function of the run, and replacing it
        would leave an instant without it.
        """
        path = step_folder(self.folder, step)
        texts = self._agree(f"{path} was not saved", lambda: _checked(tensors, documents))
        plan, staging = self._plan(tensors)
        staging.fill(tensors)
        self._background.start(lambda: self._write(path, texts, plan, staging, (best, before)))

    def settle(self) -> Place | None:
        """Wait for the save that was begun and return its folder, None where there is none; raises CheckpointError where it failed."""
        return self._background.wait()

    def latest(self) -> Place | None:
        """The folder of the newest complete checkpoint, or None; what has no completion mark does not exist."""
        found = self._from_rank_0(f"listing {self.folder}", lambda: step_folders(self.folder, complete=True)[-1:])
        return found[0] if found else None

    def holds(self, step: int) -> bool:
        """Whether there is a complete checkpoint of `step`."""
        path = step_folder(self.folder, step)
        return self._from_rank_0(f"listing {self.folder}", lambda: path in step_folders(self.folder, complete=True))

    def delete_from(self, step: int) -> list[Place]:
        """Delete the checkpoints of `step` and of later ones, newest first; returns their folders."""

        def stage() -> list[Place]:
            self._owner.hold()
            gone = [path for path in reversed(step_folders(self.folder, complete=True)) if step_of(path) >= step]
            for path in gone:
                delete(path)
            return gone

        return self._from_rank_0(f"deleting checkpoints from step {step} on in {self.folder}", stage)

    def read_documents(self, path: Place) -> dict[str, JSON]:
        """The JSON documents of the checkpoint `path`, each checked against the completion mark."""
        return self._agree(f"{path} cannot be read", lambda: read_documents(path))

    def set_aside(self, path: Place, problems: Sequence[str]) -> None:
        """Put the damaged checkpoint `path` where no loader looks, and say so with its `problems`; nothing is deleted."""

        def stage() -> Place:
            self._owner.hold()
            return set_aside(path)

        place = self._from_rank_0(f"{path} is damaged and cannot be set aside", stage)
        if self.rank == 0:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            logger.warning("%s is damaged:\n%s\nit is set aside as %s", path, lines, place.name)

    def folders_set_aside(self) -> list[Place]:
        """The damaged checkpoints that were set aside, by this run of the program or an earlier one."""
        return self._from_rank_0(f"listing {self.folder}", lambda: folders_set_aside(self.folder))

    def load(self, path: Place, tensors: Tensors, *, prefix: str | tuple[str, ...] = "") -> Loaded:
        """Fill `tensors` in place from the checkpoint `path`, saved at whatever world size and layout; says what was read.

        Every stored tensor whose name begins with `prefix` (or one of them) must be asked for, and none besides. All that is
        missing or different is reported at once, and every byte that any rank needs is checked, before a tensor is touched:
        DamagedError where files are not what was saved, CheckpointError where something else was asked for.
        """
        what = f"{path} cannot be loaded"
        mark = self._agree(what, lambda: read_mark(path))
        manifest = self._agree(what, lambda: read_manifest(path, mark))
        reads = self._agree(what, lambda: plan_reads(path, manifest, tensors, prefix))
        self._agree(what, lambda: check_hashes(path, manifest, reads))
        self._agree(
            f"{path} failed while it was loaded: the state is undefined", lambda: copy_reads(path, reads, tensors)
        )
        return loaded(manifest, prefix, mark.world)

    def _plan(self, tensors: Tensors) -> tuple[WritePlan, Staging]:
        """The plan and the memory of the last save where this rank, and every other, holds the same as then."""
        same = self._planned is not None and self._planned[0].held == held_of(tensors)
        if PendingMax(int(not same), self.group).wait() or self._planned is None:
            self._planned = None  # so that two buffers never exist
            plan = plan_writes(tensors, self.rank, self.group)
            pinned = any(tensor.device.type == "cuda" for tensor in tensors.values())
            self._planned = (plan, Staging(plan.shard, pinned=pinned))
        return self._planned

    def _write(self, path: Place, texts: Mapping[str, bytes], plan: WritePlan, staging: Staging, kept: Kept) -> Place:
        """What of a save is not the copy; in the background."""
        what = f"{path} was not saved"
        if self._from_rank_0(what, lambda: self._make_way(path, plan.bytes_of_all, kept)):
            try:
                manifest = write_tensors(path, plan, staging, self.rank, self.group)
                self._from_rank_0(what, lambda: self._complete(path, manifest, texts))
            except CheckpointError:
                if self.rank == 0:  # what was written may fill the disk
                    delete_or_warn(path)
                raise
            self._from_rank_0(f"retention in {self.folder}", lambda: self._retain(kept))
        return path

    def _make_way(self, path: Place, needed: int, kept: Kept) -> bool:
        """On rank 0: make the folder of a save of `needed` bytes; False where the step is complete already."""
        self._owner.hold()
        complete = step_folders(self.folder, complete=True)
        if path in complete:
            return False
        if complete and step_of(complete[-1]) > step_of(path):
            rule = "a resume would take the newer one; delete it or save into another folder"
            raise CheckpointError("out of order", [f"{complete[-1].name} is newer than {path.name}: {rule}"])
        for stale in step_folders(self.folder, complete=False):
            (delete if stale == path else delete_or_warn)(stale)
        path.mkdir(parents=True)
        for old in self._early(path, complete, kept):
            if has_room(path, needed):
                break
            delete_or_warn(old)
        if not has_room(path, needed):
            delete(path)
            raise CheckpointError("no room", [room_fault(self.folder, needed)])
        flush_folder(self.folder)
        return True

    def _complete(self, path: Place, manifest: Manifest | None, texts: Mapping[str, bytes]) -> None:
        """On rank 0: write all that is not tensors, the mark last."""
        assert manifest is not None, "rank 0 holds the manifest"
        unseen = file_faults(path, manifest, manifest.files)
        if unseen:
            remedy = "rank 0 does not see what other ranks wrote; the folder must be on a file system that all share"
            raise CheckpointError("not shared", [*unseen.values(), remedy])
        for name, text in texts.items():
            write_flushed(path / f"{name}.json", text)
        text = manifest.model_dump_json().encode()
        write_flushed(path / MANIFEST, text)
        mark = mark_of(step_of(path), self.world, text, texts)
        self._owner.hold()  # it may have become another run's while this was written
        write_whole(path / MARK, mark.model_dump_json(indent=1).encode())

    def _retain(self, kept: Kept) -> None:
        try:
            for old in self._superfluous(step_folders(self.folder, complete=True), kept):
                delete_or_warn(old)
        except OSError as error:  # what was saved is saved
            logger.warning("older checkpoints in %s could not be looked through: %s", self.folder, error)

    def _superfluous(self, complete: list[Place], kept: Kept) -> list[Place]:
        """Which of the complete checkpoints the retention has no use for, oldest first."""
        best, before = kept
        way_back = max(
            (step_of(path) for path in complete if before is not None and step_of(path) < before), default=None
        )
        return [
            old
            for old in complete[: -self.keep_last]
            if step_of(old) not in (best, way_back)
            and not (self.keep_every is not None and step_of(old) % self.keep_every == 0)
        ]

    def _early(self, path: Place, complete: list[Place], kept: Kept) -> list[Place]:
        """The checkpoints that may go before `path` is complete, where there is no room for it beside them: those that would
        go then, but for the newest. None where `path` is to be the best, for then the best so far is among them."""
        gone = self._superfluous([*complete, path], kept)
        return [] if kept[0] == step_of(path) else [old for old in gone if old != complete[-1]]

    def _agree(self, what: str, stage: Callable[[], T]) -> T:
        assert self._background.is_ours, "a save is under way, and the group with it: settle it first"
        return agree(what, stage, self.rank, self.group)

    def _from_rank_0(self, what: str, stage: Callable[[], T]) -> T:
        assert self._background.is_ours, "a save is under way, and the group with it: settle it first"
        return from_rank_0(what, stage, self.rank, self.group)


def read_documents(path: Place) -> dict[str, JSON]:
    """The JSON documents of the checkpoint `path`, each checked against the completion mark; for one process."""
    hashes = read_mark(path).documents
    return {name: json.loads(read_hashed(path / f"{name}.json", sha256)) for name, sha256 in hashes.items()}


def _texts(documents: Documents) -> dict[str, bytes]:
    taken = (MARK.lower(), MANIFEST)
    wrong = [name for name in documents if not DOCUMENT_NAME.fullmatch(name) or f"{name}.json" in taken]
    if wrong:
        rule = f"a document's name matches {DOCUMENT_NAME.pattern} and {', '.join(taken)} are taken"
        raise CheckpointError("not a name", [f"document {name!r}: {rule}" for name in wrong])
    return {name: to_json(value, name) for name, value in documents.items()}


def _checked(tensors: Tensors, documents: Documents) -> dict[str, bytes]:
    _refuse_unfit(tensors)
    return _texts(documents)


def _refuse_unfit(tensors: Tensors) -> None:
    problems = []
    for name, tensor in tensors.items():
        if not name or name == "__metadata__":
            problems.append(f"{name!r} is no name for a tensor")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
        if tensor.is_meta:
            problems.append(f"{name} is on the meta device: it has no values")
        try:
            local_box(name, tensor)
        except CheckpointError as error:
            problems += error.problems
    if problems or not tensors:
        raise CheckpointError("unfit", problems or ["there is no tensor to save"])
