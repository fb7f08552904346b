"""This file owns `bench infer`: images per second of a transformer with experts beside the dense one of the same size."""

from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.bench.rounds import Side, Timings, measure, no_reset
from softmoe_train.bench.settings import InferSettings, Measuring, group_problems
from softmoe_train.bench.table import Outcome, milliseconds, progress, ratio
from softmoe_train.model.count import forward_flops
from softmoe_train.model.init import initialize
from softmoe_train.model.records import ModelConfig, moe_blocks
from softmoe_train.model.vit import ViT, build_model
from softmoe_train.settings import RunConfig

SOFT, DENSE = "soft", "dense"  # the sides: the model, whatever its router, and its twin


class InferRow(NamedTuple):
    """What was measured of one batch size."""

    images: int
    timings: Timings


def infer_problems(own: Measuring | None, config: RunConfig) -> list[str]:
    """Why there is nothing to compare, or nowhere."""
    problems = group_problems(own, config.model.group_images)
    if not moe_blocks(config.model.moe.blocks, config.model.depth):
        problems.append(
            "model has no experts (model.moe.blocks=[]), so it is the dense one; choose one that has, as model=soft_s16_128e"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
    return problems


def bench_infer(settings: InferSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Forward only, of the model and of its dense twin (the same configuration with model.moe.blocks=[])."""
    twin = config.model_copy(update={"moe": config.moe.model_copy(update={"blocks": []})})
    models = {SOFT: _ready(config, dtype, device), DENSE: _ready(twin, dtype, device)}
    flops = {name: forward_flops(model.config) for name, model in models.items()}
    rows = []
    with progress(len(settings.images) * (settings.rounds + settings.warmup), shown=True) as advance:
        for images in settings.images:
            batch = torch.randint(0, 256, (images, 3, config.image_size, config.image_size), dtype=torch.uint8).to(
                device
            )
            sides = [_side(name, model, batch) for name, model in models.items()]
            timings = measure(
                sides,
                device=device,
                rounds=settings.rounds,
                warmup=settings.warmup,
                after=lambda images=images: advance(f"{images} images"),
            )
            rows.append(InferRow(images, timings))
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return _outcome(rows, config, dtype, flops, parameters, settings.rounds)


def _ready(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ViT:
    model = build_model(config, dtype)
    model.to_empty(device=device)
    initialize(model, seed=0)
    return model.eval().requires_grad_(False)


def _side(name: str, model: ViT, batch: Tensor) -> Side:
    def run() -> None:
        with torch.inference_mode():
            model(batch)

    return Side(name, run, no_reset)


def _outcome(
    rows: list[InferRow],
    config: ModelConfig,
    dtype: torch.dtype,
    flops: dict[str, int],
    parameters: dict[str, int],
    rounds: int,
) -> Outcome:
    moe = config.moe
    blocks = len(moe_blocks(moe.blocks, config.depth))
    name = str(dtype).removeprefix("torch.")
    return Outcome(
        title=f"inference, {name}: {moe.num_experts} experts x {config.capacity} slots in {blocks} of {config.depth} blocks, "
        f"beside the dense model of width {config.width} (both {config.num_tokens} tokens)",
        columns=[
            "images",
            f"{moe.router} ms",
            "dense ms",
            f"{moe.router} images/s",
            "dense images/s",
            f"{moe.router} / dense speed",
        ],
        cells=[_cells(row) for row in rows],
        notes=[
            f"median (quartiles) of {rounds} interleaved rounds, forward only",
            f"{moe.router} {parameters[SOFT]:,} parameters, {flops[SOFT] / 1e9:.2f} GFLOP an image; dense {parameters[DENSE]:,}, "
            f"{flops[DENSE] / 1e9:.2f}",
        ],
        rows=[
            {
                "images": row.images,
                "dtype": name,
                "seconds": {side: row.timings.spread(side)._asdict() for side in (SOFT, DENSE)},
                "images_per_second": {side: row.images / row.timings.spread(side).median for side in (SOFT, DENSE)},
                "ratio": row.timings.ratio(DENSE, SOFT)._asdict(),
                "flops_per_image": flops,
                "parameters": parameters,
                "seconds_of_rounds": row.timings.seconds,
            }
            for row in rows
        ],
    )


def _cells(row: InferRow) -> list[str]:
    soft, dense = row.timings.spread(SOFT), row.timings.spread(DENSE)
    return [
        str(row.images),
        milliseconds(soft),
        milliseconds(dense),
        f"{row.images / soft.median:,.1f}",
        f"{row.images / dense.median:,.1f}",
        ratio(row.timings.ratio(DENSE, SOFT)),
    ]
