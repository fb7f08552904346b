"""This file owns `softmoe inspect routing=true`: a checkpoint's model in one process, looked at over pictures, drawn and told.

n images  T tokens  E experts  S slots per expert  M = E S slots
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softmoe_train.checkpoint.inspect import InspectConfig, read_contents
from softmoe_train.checkpoint.layout import Box
from softmoe_train.config import ConfigError, compose_onto
from softmoe_train.data import Batch, SyntheticConfig, WebDatasetConfig, build_eval_stream
from softmoe_train.data.records import DataConfig
from softmoe_train.dist import pick_device
from softmoe_train.drawing.curves import draw_slot_curves
from softmoe_train.drawing.maps import SlotMap, draw_slot_maps
from softmoe_train.drawing.panels import LACKS, can_draw
from softmoe_train.evals.curves import cumulative_weights
from softmoe_train.evals.looks import Look, looks_at, seen_of
from softmoe_train.evals.portraits import draw, numbers
from softmoe_train.model.records import moe_blocks
from softmoe_train.model.routing import Routing
from softmoe_train.model.sparse import SparseRouting
from softmoe_train.model.vit import ViT, build_model
from softmoe_train.observe.console import format_value
from softmoe_train.observe.run_files import replace_bytes
from softmoe_train.settings import RunConfig
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.sources import opened_source

AT_ONCE = 16  # images in the model
SHOWN, MAPPED = 4, 8  # images and slots of a heat map (the paper shows 8 slots)


class Portrait(NamedTuple):
    """What was found: the files, and measures and numbers by block."""

    ckpt: str
    folder: Path
    files: list[str]
    images: int
    left_out: int
    measures: dict[int, dict[str, float]]
    numbers: dict[int, dict[str, Any]]

    def document(self) -> dict[str, Any]:
        """All of it as plain values, for programs."""
        blocks = {block: {**of, **self.numbers[block]} for block, of in self.measures.items()}
        return {"folder": str(self.folder), "files": self.files, "images": self.images, "blocks": blocks}


def draw_portrait(asked: InspectConfig) -> Portrait:
    """Look at the routers of a checkpoint and write the pictures.

    Raises ConfigError for what is wrong with the request, before weights are read, and CheckpointError where the checkpoint is damaged.
    """
    contents = read_contents(asked.path)
    config = _config(contents.config)
    data = _data(asked, config)
    folder = Path(asked.pictures)
    device = pick_device("auto", 0)
    images = _images(asked, config, data)
    model = _model(asked, config).to(device)
    blocks = moe_blocks(config.model.moe.blocks, config.model.depth)
    looked = _look(model, blocks, config, images.pixels, device)
    pictures = draw(looked.looks) | looked.own_pictures(config, images.pixels[:SHOWN])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        replace_bytes(folder / f"{name}.png", content)
    measures = {block: look.measures() for block, look in looked.looks.items()}
    shown = {block: numbers(look) for block, look in looked.looks.items()}
    files = [f"{name}.png" for name in pictures]
    return Portrait(str(asked.path), folder, files, len(images.pixels), images.broken, measures, shown)


def _config(saved: dict[str, Any]) -> RunConfig:
    """The settings of the run, with the usual thresholds where it did not look at its routers."""
    evals = saved.get("evals")
    looks = isinstance(evals, dict) and evals.get("routing") is not None
    return compose_onto(RunConfig, saved, [] if looks else ["evals=[routing]"], lambda _: [])


def _data(asked: InspectConfig, config: RunConfig) -> DataConfig:
    """The data whose held-out images are looked at; ConfigError tells all that stands against it."""
    problems, data = [], config.data
    if not config.model.has_experts:
        problems.append(
            f"ckpt={asked.ckpt}: no block of this model holds experts, so nothing is routed; name another checkpoint"
        )
    if not can_draw():
        problems.append(f"routing=true: {LACKS}")
    folder = Path(asked.pictures)
    if folder.exists() and not folder.is_dir():
        problems.append(f"pictures={asked.pictures} is a file; name a folder")
    if isinstance(data, SyntheticConfig):
        if asked.images is not None:
            problems.append(
                f"images={asked.images}: this run's pictures were made by arithmetic, and say nothing of how to prepare others; leave it out"
            )
    elif asked.images is None and data.test is None:
        problems.append("images is not set, and the run has no data.test; give shards, as in images=/data/test-*.tar")
    if problems:
        raise ConfigError(problems)
    return data if isinstance(data, SyntheticConfig) else _as_read(data, asked.images)


def _as_read(data: WebDatasetConfig, images: str | list[str] | None) -> WebDatasetConfig:
    """The run's own choice of held-out samples, or every picture of other shards, whatever its label."""
    read = {"workers": 0, "text": None, "mixup": None}
    if images is not None:
        keep = data.keep.model_copy(update={"labels": None, "keys": None, "renumber": False})
        read |= {"test": images, "labels": "none", "classes": None, "keep": keep, "quarantine": None}
    return data.model_copy(update=read)


class Images(NamedTuple):
    """Pictures that could be read, and how many could not."""

    pixels: Tensor  # "n 3 Y X" bytes
    broken: int


def _images(asked: InspectConfig, config: RunConfig, data: DataConfig) -> Images:
    """The first images, whole routing groups of them; raises ConfigError where there are none."""
    what = "data.test of the run" if asked.images is None else f"images={asked.images}"
    parts: list[Tensor] = []
    broken: list[str] = []
    try:
        for batch in _held_out(config, data):
            parts.append(batch.images[batch.mask])
            broken += [f"{one.shard} {one.key}: {one.reason}" for one in batch.broken]
            if sum(map(len, parts)) >= asked.count:
                break
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError([f"{what}: {error}"]) from None
    pixels = torch.cat(parts)[: asked.count]
    group = config.model.group_images
    pixels = pixels[: len(pixels) // group * group]
    if not len(pixels):
        why = f"none of its images can be read, the first for: {broken[0]}" if broken else f"fewer than {group} images"
        raise ConfigError([f"{what}: {why}; name others"])
    return Images(pixels, len(broken))


def _held_out(config: RunConfig, data: DataConfig) -> Iterator[Batch]:
    stream = build_eval_stream(
        data,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        batch_size=AT_ONCE,
        rank=0,
        world=1,
    )
    yield from stream


def _model(asked: InspectConfig, config: RunConfig) -> ViT:
    """The model with the checkpoint's weights, every byte of which is checked."""
    assert asked.ckpt is not None
    source = WarmConfig(source=str(asked.path), weights="model", noise=0.0, head="auto", allow_new=[], ignore=[])
    model = build_model(config.model, torch.float32).to_empty(device="cpu")
    with opened_source(source) as opened, torch.no_grad():
        opened.verify(0, 1)
        for name, p in model.named_parameters():
            values = opened.weights.tensors[name]
            p.copy_(values.read(Box((0,) * p.ndim, tuple(p.shape))))
    return model


class _Looked:
    """What one pass over the images leaves, of each block; of Soft MoE's also single slots."""

    def __init__(self, looks: dict[int, Look]) -> None:
        self.looks = looks
        self.slot_curves: dict[int, Tensor] = {}  # "M T", summed over images
        self.dispatch: dict[int, Tensor] = {}  # "n T M", of the images that are shown

    def add(self, block: int, routing: Routing | SparseRouting, real: Tensor) -> None:
        """Take what the router of a block decided of some images."""
        self.looks[block].add(routing, real)
        if isinstance(routing, Routing):
            dispatch = routing.dispatch.flatten(2)
            self.dispatch.setdefault(block, dispatch[:SHOWN].cpu())
            G, T, M = dispatch.shape
            summed = cumulative_weights(dispatch.mT.flatten(0, 1)).view(G, M, T).double().sum(0)
            self.slot_curves[block] = self.slot_curves.get(block, 0) + summed

    def own_pictures(self, config: RunConfig, images: Tensor) -> dict[str, bytes]:
        """Curves of single slots, and a heat map of slots for each block."""
        if not self.slot_curves:
            return {}
        curves = {block: (of / of[0, -1]).cpu().numpy() for block, of in self.slot_curves.items()}
        pictures = {"slot_curves": draw_slot_curves(curves)}
        pixels = images.permute(0, 2, 3, 1).numpy()
        side = config.model.image_size // config.model.patch_size
        for block, dispatch in self.dispatch.items():
            slots = [_slot_map(dispatch, s, side, config.model.moe.slots_per_expert) for s in _worth_showing(dispatch)]
            title = f"Block {block}: what single slots read, from the sharpest to the softest"
            pictures[f"slot_maps_block_{block}"] = draw_slot_maps(pixels, slots, title)
        return pictures


def _worth_showing(dispatch: Tensor) -> list[int]:
    """Slots from the sharpest to the softest over these images, at equal steps."""
    order = torch.special.entr(dispatch).sum(1).mean(0).argsort()
    return order[np.linspace(0, len(order) - 1, min(MAPPED, len(order))).round().astype(int)].tolist()


def _slot_map(dispatch: Tensor, slot: int, side: int, slots_per_expert: int) -> SlotMap:
    name = f"expert {slot // slots_per_expert}"
    if slots_per_expert > 1:
        name += f"\nslot {slot % slots_per_expert}"
    return SlotMap(name, dispatch[:, :, slot].unflatten(1, (side, side)).double().numpy())


@torch.no_grad()
def _look(model: ViT, blocks: list[int], config: RunConfig, pixels: Tensor, device: torch.device) -> _Looked:
    assert config.evals.routing is not None
    looked = _Looked(looks_at(model, blocks, config.evals.routing.thresholds, device, curves=True))
    group = config.model.group_images
    for part in pixels.split(max(1, AT_ONCE // group) * group):
        real = torch.ones(len(part), dtype=torch.bool, device=device)
        for block, routing in zip(blocks, seen_of(model, part.to(device), real), strict=True):
            looked.add(block, routing, real)
    return looked


def print_portrait(portrait: Portrait) -> None:
    """A table of measures by block, and where the pictures are."""
    names = list(next(iter(portrait.measures.values())))
    wide = max(map(len, names))
    print(f"routing of {portrait.ckpt}\n")
    print(f"{'':{wide}}", *(f"{f'block {block}':>9}" for block in portrait.measures), sep="  ")
    for name in names:
        print(f"{name:{wide}}", *(f"{format_value(of[name]):>9}" for of in portrait.measures.values()), sep="  ")
    left_out = f" ({portrait.left_out} could not be read)" if portrait.left_out else ""
    print(
        f"\n{len(portrait.files)} pictures of {portrait.images} images{left_out} in {portrait.folder}: {', '.join(portrait.files)}"
    )
