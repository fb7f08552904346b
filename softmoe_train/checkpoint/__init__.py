"""Checkpoints: one folder per step of sharded safetensors and JSON, loadable at any world size and expert axis."""

from softmoe_train.checkpoint.agreement import CheckpointError, DamagedError, NotFiniteError
from softmoe_train.checkpoint.store import CheckpointConfig, CheckpointStore, read_documents
from softmoe_train.checkpoint.verify import verify

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "DamagedError",
    "NotFiniteError",
    "read_documents",
    "verify",
]
