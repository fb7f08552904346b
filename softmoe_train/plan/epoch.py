"""This file owns how much data a run sees: what its shards hold, and how often it passes over them."""

from typing import NamedTuple

from softmoe_train.data import SyntheticConfig
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.remote import Remote
from softmoe_train.data.select import build_rules
from softmoe_train.data.sources import indexed, training_specs
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
    """Count the images that the run would read of data.train, or of all sources of data.mixture; tars are indexed once, and the index is kept."""
    data = config.data
    if isinstance(data, SyntheticConfig):
        return Epoch(None, data.num_train, None)
    if data.train is None and data.mixture is None:
        return Epoch(None, None, "data.train is not given")
    try:
        catalog = Catalog(Remote(data.cache))
        rules = build_rules(data)
        sources = [indexed(spec, rules, catalog) for spec in training_specs(data)]
        images = sum(one.count(shard) for source in sources for shard, one in zip(*source, strict=True))
        return Epoch(sum(len(source.shards) for source in sources), images, None)
    except ValueError as error:
        return Epoch(None, None, str(error))
