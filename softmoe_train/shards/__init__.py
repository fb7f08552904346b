"""Making shards from pictures, looking through them, and indexing them: what `softmoe shards` does before training reads."""

from softmoe_train.shards.make import make_shards
from softmoe_train.shards.settings import MakeSettings, ShardsError
from softmoe_train.shards.source import Item, LeftOut, Source, Stored

__all__ = ["Item", "LeftOut", "MakeSettings", "ShardsError", "Source", "Stored", "make_shards"]
