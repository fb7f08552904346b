"""This file owns what a training set is made of: one set of shards, or several weighted sources, and the order over them."""

import os
from typing import NamedTuple

from softmoe_train.data.catalog import Catalog
from softmoe_train.data.index import Shard, data_hash
from softmoe_train.data.mixture import MOST_PLACES, Mixture, reduced, source_seed
from softmoe_train.data.order import Order
from softmoe_train.data.places import is_url
from softmoe_train.data.records import ShardSpec, WebDatasetConfig
from softmoe_train.data.remote import Remote
from softmoe_train.data.select import (
    Chosen,
    Rules,
    build_rules,
    kept_facts,
    nothing_left,
    told_of_keep,
    told_of_quarantine,
)
from softmoe_train.plain import the_first


class NamedSpec(NamedTuple):
    """A specification of shards, and the key that holds it."""

    key: str
    spec: ShardSpec | None


class Source(NamedTuple):
    """The shards that one key names, and what remains of each."""

    shards: list[Shard]
    chosen: list[Chosen]


class Training(NamedTuple):
    """The shards of a training set (of all sources in turn), their order, and what decides it, as JSON."""

    shards: list[Shard]
    chosen: list[Chosen]
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
    """Index the training shards, choose among their samples and lay down their order; raises ValueError where none is left."""
    rules = build_rules(cfg)
    sources = [indexed(spec, rules, catalog) for spec in training_specs(cfg)]
    shards = [shard for source in sources for shard in source.shards]
    chosen = [one for source in sources for one in source.chosen]
    facts = {"streams": cfg.streams, "shuffle_window": cfg.shuffle_window, "block": cfg.block, "seed": seed}
    facts |= kept_facts(cfg, shards, chosen) | _label_facts(cfg, rules)
    if cfg.mixture is None:
        order = _order(cfg, sources[0], seed)
        return Training(shards, chosen, order, {"data": data_hash(shards), "samples": order.total, **facts})
    named = sorted(cfg.mixture.items())
    orders = [_order(cfg, source, source_seed(seed, one.seed)) for source, (_, one) in zip(sources, named, strict=True)]
    mixture = Mixture(orders, [source.weight for _, source in named], seed=seed, names=[name for name, _ in named])
    told = {
        name: {"data": data_hash(source.shards), "samples": order.total, "weight": int(weight), "seed": one.seed}
        for (name, one), source, order, weight in zip(named, sources, orders, mixture.weights, strict=True)
    }
    return Training(shards, chosen, mixture, {"mixture": told, **facts})


def indexed(named: NamedSpec, rules: Rules, catalog: Catalog) -> Source:
    """The shards that a key names and what remains of them; raises ValueError where that is no sample."""
    shards = list(catalog.shards(catalog.paths(named.spec, key=named.key), fresh=False))
    if not sum(shard.count for shard in shards):
        raise ValueError(
            f"{named.key}={named.spec} names {len(shards)} shards without a single sample: name shards that hold pictures."
        )
    chosen = [rules.choose(shard, catalog) for shard in shards]
    if not sum(one.count(shard) for shard, one in zip(shards, chosen, strict=True)):
        raise ValueError(nothing_left(named.key, named.spec, shards, chosen))
    return Source(shards, chosen)


def trained_and_tested(cfg: WebDatasetConfig) -> list[str]:
    """The tars on this machine that are both trained on and tested with, whatever they are called; none where the shards cannot be listed."""
    catalog = Catalog(Remote(cfg.cache))
    try:
        named = {
            key: catalog.paths(spec, key=key) for key, spec in [*training_specs(cfg), NamedSpec("data.test", cfg.test)]
        }
    except ValueError:  # told by others
        return []
    tested = {os.path.realpath(path) for path in named.pop("data.test") if not is_url(path)}
    trained = {os.path.realpath(path) for paths in named.values() for path in paths if not is_url(path)}
    return sorted(tested & trained)


def facts_of_test(cfg: WebDatasetConfig) -> list[tuple[str, int, int]]:
    """What tells the test shards of one time from those of another: the place of each and, on this machine, its bytes and when they changed.

    Raises ValueError where they cannot be listed.
    """
    facts = []
    for path in Catalog(Remote(cfg.cache)).paths(cfg.test, key="data.test"):
        about = None if is_url(path) else os.stat(path)
        facts.append((path, 0, 0) if about is None else (os.path.realpath(path), about.st_size, about.st_mtime_ns))
    return facts


def left_out(cfg: WebDatasetConfig, *, needs_test: bool) -> list[str]:
    """What a person wants to know of samples that are left out, and of tars that are both trained on and held out, a message each.

    Every shard must have been indexed and chosen from before; raises ValueError where nothing is left.
    """
    rules, catalog = build_rules(cfg), Catalog(Remote(cfg.cache))
    specs = [*training_specs(cfg), *([NamedSpec("data.test", cfg.test)] if needs_test else [])]
    sources = [indexed(spec, rules, catalog) for spec in specs[: len(specs) - needs_test]]
    sources += [indexed(spec, build_rules(cfg, "test"), catalog) for spec in specs[len(sources) :]]
    told = [
        f"{key}: {text}" for (key, _), source in zip(specs, sources, strict=True) for text in told_of_keep(cfg, *source)
    ]
    told += _told_of_both(sources[:-1], sources[-1]) if needs_test else []
    # The quarantine is one list for all of them: an entry is told as unmatched where none of them has it.
    shards = {shard.sha256: (shard, one) for source in sources for shard, one in zip(*source, strict=True)}
    return told + told_of_quarantine(cfg, *(list(column) for column in zip(*shards.values(), strict=True)))


def _told_of_both(training: list[Source], held_out: Source) -> list[str]:
    trained_on = {shard.sha256 for source in training for shard in source.shards}
    both = [os.path.basename(shard.path) for shard in held_out.shards if shard.sha256 in trained_on]
    if not both:
        return []
    return [
        f"data.test: {the_first(both, 3)} of {len(held_out.shards)} tars are trained on too: what is measured there is not held out; name "
        f"the parts apart, as data.train='FOLDER/train-*.tar' data.test='FOLDER/test-*.tar'"
    ]


def _order(cfg: WebDatasetConfig, source: Source, seed: int) -> Order:
    counts = [one.count(shard) for shard, one in zip(source.shards, source.chosen, strict=True)]
    return Order(counts, streams=cfg.streams, window=cfg.shuffle_window, block=cfg.block, seed=seed)


def _label_facts(cfg: WebDatasetConfig, rules: Rules) -> dict[str, object]:
    """How labels and texts are read, only where it is not as ever."""
    facts: dict[str, object] = {"label": cfg.label} if cfg.label != "cls" else {}
    facts |= {"classes": rules.names} if rules.names is not None else {}
    return facts | ({"text": cfg.text} if cfg.text is not None else {})
