"""This file owns who saves into a folder of an object store, where no lock is held: the run that started last, and the others are told."""

import json
import os
import socket
import uuid

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.remote import Place, RemotePath

OWNER = "OWNER.json"


class Owner:
    """The claim of one run on `folder`; a folder on a disk has none, for there it is locked."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._claim = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._made = False

    def hold(self) -> None:
        """Claim the folder, which proves that we may write; from then on raise CheckpointError once another run has claimed it.

        Raises OSError where the store does not answer.
        """
        if not isinstance(self._folder, RemotePath):
            return
        there = self._read() if self._made else None
        if there is None:
            (self._folder / OWNER).write_bytes(json.dumps(self._claim).encode())
            self._made = True
        elif there.get("id") != self._claim["id"]:
            other = f"process {there.get('process')} on {there.get('host')}"
            rule = f"{self._folder} has been another run's since {other} started; give one of the two another checkpoint.folder"
            raise CheckpointError("not ours", [rule])

    def _read(self) -> dict[str, object] | None:
        assert isinstance(self._folder, RemotePath)
        try:
            there = json.loads((self._folder / OWNER).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return there if isinstance(there, dict) else None
