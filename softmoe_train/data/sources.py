"""This file owns what a training set is made of: one set of shards, or several weighted sources, and the order over them."""

from typing import NamedTuple

from softmoe_train.data.catalog import Catalog
from softmoe_train.data.index import Shard, data_hash
from softmoe_train.data.mixture import MOST_PLACES, Mixture, reduced, source_seed
from softmoe_train.data.order import Order
from softmoe_train.data.records import ShardSpec, WebDatasetConfig


class NamedSpec(NamedTuple):
    """A specification of shards, and the key that holds it."""

    key: str
    spec: ShardSpec | None


class Training(NamedTuple):
    """The shards of a training set (of all sources in turn), their order, and what decides it, as JSON."""

    shards: list[Shard]
    order: Order | Mixture
    facts: dict[str, object]


def training_specs(cfg: WebDatasetConfig) -> list[NamedSpec]:
    """What names the training shards: data.train, or the sources of data.mixture by name, however the YAML lists them."""
    if cfg.mixture is None:
        return [NamedSpec("data.train", cfg.train)]
    return [NamedSpec(f"data.mixture.{name}.shards", source.shards) for name, source in sorted(cfg.mixture.items())]


def check_mixture(cfg: WebDatasetConfig) -> list[str]:
    """Why a mixture cannot be made as the configuration says; empty where there is none."""
    if cfg.mixture is None:
        return []
    problems = []
    if cfg.train is not None:
        problems.append(
            f"data.train={cfg.train} with data.mixture={{{', '.join(sorted(cfg.mixture))}}}: both name what is trained on; set one of "
            f"them to null"
        )
    weights = {name: source.weight for name, source in sorted(cfg.mixture.items())}
    places = sum(reduced(list(weights.values())))
    if places > MOST_PLACES:
        shown = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        few = ", ".join(
            f"{name}={max(1, round(100 * weight / sum(weights.values())))}" for name, weight in weights.items()
        )
        problems.append(
            f"data.mixture: the weights {shown} add up to {places} once common factors are left out, and shares are kept within so many "
            f"samples of a stream, at most {MOST_PLACES}; use smaller ones, as {few}"
        )
    return problems


def build_training(cfg: WebDatasetConfig, catalog: Catalog, seed: int) -> Training:
    """Index the training shards and lay down their order; raises ValueError where a source holds no sample."""
    sources = [indexed(spec, catalog) for spec in training_specs(cfg)]
    shards = [shard for source in sources for shard in source]
    facts: dict[str, object] = {
        "streams": cfg.streams,
        "shuffle_window": cfg.shuffle_window,
        "block": cfg.block,
        "seed": seed,
    }
    if cfg.mixture is None:
        order = _order(cfg, sources[0], seed)
        return Training(shards, order, {"data": data_hash(shards), "samples": order.total, **facts})
    named = sorted(cfg.mixture.items())
    orders = [_order(cfg, source, source_seed(seed, one.seed)) for source, (_, one) in zip(sources, named, strict=True)]
    mixture = Mixture(orders, [source.weight for _, source in named], seed=seed, names=[name for name, _ in named])
    told = {
        name: {"data": data_hash(source), "samples": order.total, "weight": int(weight), "seed": one.seed}
        for (name, one), source, order, weight in zip(named, sources, orders, mixture.weights, strict=True)
    }
    return Training(shards, mixture, {"mixture": told, **facts})


def indexed(named: NamedSpec, catalog: Catalog) -> list[Shard]:
    """The shards that a key names; raises ValueError where they hold no sample."""
    shards = list(catalog.shards(catalog.paths(named.spec, key=named.key), fresh=False))
    if not sum(shard.count for shard in shards):
        raise ValueError(
            f"{named.key}={named.spec} names {len(shards)} shards without a single sample: name shards that hold pictures."
        )
    return shards


def _order(cfg: WebDatasetConfig, shards: list[Shard], seed: int) -> Order:
    counts = [shard.count for shard in shards]
    return Order(counts, streams=cfg.streams, window=cfg.shuffle_window, block=cfg.block, seed=seed)
