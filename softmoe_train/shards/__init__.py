"""Making shards from pictures, looking through them, and indexing them: what `softmoe shards` does before training reads."""

from softmoe_train.shards.make import make_shards
from softmoe_train.shards.settings import Making, StoppedError, making
from softmoe_train.shards.source import Item, LeftOut, Source, Stored

__all__ = ["Item", "LeftOut", "Making", "Source", "StoppedError", "Stored", "make_shards", "making"]
