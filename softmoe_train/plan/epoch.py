"""This file owns how much data a run sees: what its shards hold, and how often it passes over them."""

from typing import NamedTuple

from softmoe_train.data import SyntheticConfig
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.remote import Remote
from softmoe_train.data.sources import training_specs
from softmoe_train.settings import RunConfig


class Epoch(NamedTuple):
    """The training data; or, in `unknown`, why nothing is known of it."""

    shards: int | None
    images: int | None
    unknown: str | None

    def steps(self, batch_size: int) -> float | None:
        """Of one pass over the images."""
        return None if self.images is None else self.images / batch_size


def epoch_of(config: RunConfig) -> Epoch:
    """Count the images of data.train, or of all sources of data.mixture, whose tars are indexed as the run would do (read once; the index is kept)."""
    data = config.data
    if isinstance(data, SyntheticConfig):
        return Epoch(None, data.num_train, None)
    if data.train is None and data.mixture is None:
        return Epoch(None, None, "data.train is not given")
    try:
        catalog = Catalog(Remote(data.cache))
        paths = [path for key, spec in training_specs(data) for path in catalog.paths(spec, key=key)]
        return Epoch(len(paths), sum(shard.count for shard in catalog.shards(paths, fresh=True)), None)
    except ValueError as error:
        return Epoch(None, None, str(error))
