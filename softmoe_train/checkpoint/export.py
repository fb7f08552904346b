"""This file owns the portable form of the weights: safetensors files that plain PyTorch reads by documented names."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import field_validator

from softmoe_train.checkpoint.agreement import CheckpointError, DamagedError
from softmoe_train.checkpoint.blocks import Files, blocks, opened, whole_reads
from softmoe_train.checkpoint.folder import flush_folder
from softmoe_train.checkpoint.inspect import Contents, OfCheckpoint, read_contents
from softmoe_train.checkpoint.manifest import JSON, StoredTensor
from softmoe_train.checkpoint.reader import check_hashes, file_faults
from softmoe_train.config import out_problems

FORMAT = 1
SUFFIX = ".safetensors"
EXPERTS = ".experts."
# What a reader without this package needs to know; B images, T tokens, D width, E experts, S slots per expert, H mlp_dim.
NAMES = {
    "patch_embed.weight": "(D, 3 P P): x @ weight.T + bias of each P x P patch, row-major patches, pixels as (channel, y, x); RGB bytes / 127.5 - 1",
    "position": "(T, D): added to the embedded patches; there is no class token",
    "blocks.N": "x = x + attn(norm1(x)), then x = x + mlp(norm2(x)), or + moe(norm2(x)) where the block has experts; N from 0",
    "norm1, norm2, norm": "LayerNorm over D, eps 1e-6",
    "attn.qkv": "(3 D, D): query, key, value, each num_heads x head_dim",
    "attn.query_norm, attn.key_norm": "LayerNorm over head_dim, eps 1e-6, scale only; then softmax(q k / sqrt(head_dim)) v",
    "attn.out, mlp.fc1, mlp.fc2, head": "linear, weight as (out, in)",
    "mlp": "fc2(gelu(fc1(x))), gelu in its tanh form",
    "moe.router": "logits[t, e, s] = scale * <x_t / |x_t|, phi[:, e, s] / |phi[:, e, s]|>, each length sqrt(sum of squares + 1e-6); phi (D, E, S)",
    "moe.router.combine_phi": "(D, E, S), where model.moe.soft.combine=separate: in the place of phi for the weights that tokens read slots by",
    "moe.router, ablations": "by model.moe.soft: dispatch=uniform weighs tokens by 1 / T, combine=uniform slots by 1 / (E S), normalize=false has scale * <x_t, phi>, scale=false the scale 1; model.moe.router=identity: slot (e, s) is x_t with t = e S + s, and y_t what its expert makes of it",
    "moe.router.gate": "(D, E), where model.moe.router is tokens_choice or experts_choice: gates[t, e] = softmax over e of x @ gate; y_t = sum over the experts e that serve t of gates[t, e] * expert e of x_t, and 0 where none does",
    "moe.router, sparse": "in groups of sparse.group_images consecutive images, an expert serves S = round(tokens * top_k * capacity_factor / E) tokens (multiple_of_4: up, to one). experts_choice (top_k 1): those with its largest gates. tokens_choice: each token asks for its top_k largest gates; all first choices are served before any second, in token order, or by descending largest gate under batch_priority; equal gates by number. No noise outside of training",
    "moe": "slot (e, s) = sum over t of softmax over t of logits * x_t; y_t = sum over (e, s) of softmax over all (e, s) of logits * expert e of slot (e, s)",
    "moe.experts": "expert e: gelu(x @ w1[e] + b1[e]) @ w2[e] + b2[e]; w1 (E, D, H), b1 (E, H), w2 (E, H, D), b2 (E, D); in a file of one expert without E",
    "moe.experts.wg, moe.experts.bg": "(E, D, H) and (E, H), where model.moe.expert=gated_mlp: expert e is (gelu(x @ wg[e] + bg[e]) * (x @ w1[e] + b1[e])) @ w2[e] + b2[e]",
    "head.weight": "(num_classes, D): logits = head(mean over tokens of norm(x))",
}


class ExportConfig(OfCheckpoint):
    """Keys of `softmoe export`."""

    out: str | None  # the file to write
    weights: Literal["model", "average"]
    experts: Literal["together", "separate"]  # separate: a file for each expert beside `out`

    @field_validator("out")
    @classmethod
    def _writable(cls, out: str | None) -> str:
        if out is None:
            raise ValueError(f"out is not set; name the file to write, as in out=weights{SUFFIX}")
        problems = out_problems("out", out, SUFFIX)
        if problems:
            raise ValueError(problems[0])
        return out


class Exported(NamedTuple):
    """The files that were written (that of the whole, or of all but the experts, last) and what is in them."""

    files: list[Path]
    tensors: int
    bytes: int
    step: int


class Piece(NamedTuple):
    """What goes into a file under one name: a stored tensor, or one row of it (one expert, without its first dim)."""

    name: str
    tensor: StoredTensor
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the reader sees it."""
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]


def export(asked: ExportConfig) -> Exported:
    """Write the float32 weights of a checkpoint, every byte that is read checked first; no more than a few buffers are in memory.

    A file appears under its name when it is whole. Raises DamagedError, and CheckpointError for what is not there or not writable.
    """
    assert asked.out is not None
    contents, out = read_contents(asked.path), Path(asked.out)
    weights = _weights(contents, asked.weights)
    needed = {chunk.file for tensor in weights.values() for chunk in tensor.chunks}
    faults = file_faults(contents.path, contents.manifest, needed)
    if faults:
        raise DamagedError(f"{contents.path} is damaged", list(faults.values()))
    reads = whole_reads(contents.manifest, [f"{asked.weights}.{name}" for name in weights])
    check_hashes(contents.path, contents.manifest, reads)
    metadata = _metadata(contents, asked)
    with opened(contents.path) as files:
        try:
            written = [
                _write(place, pieces, {**metadata, **more}, files) for place, pieces, more in _plan(out, weights, asked)
            ]
        except OSError as error:
            raise CheckpointError(f"{out} was not written", [f"{type(error).__name__}: {error}"]) from error
    return Exported(
        files=[place for place, _ in written],
        tensors=len(weights),
        bytes=sum(size for _, size in written),
        step=contents.mark.step,
    )


def _weights(contents: Contents, kind: str) -> dict[str, StoredTensor]:
    """The stored weights by the name that a reader sees; `average.updates` is a count and no weight."""
    names = [name.removeprefix("model.") for name in contents.manifest.tensors if name.startswith("model.")]
    stored = {name: contents.manifest.tensors.get(f"{kind}.{name}") for name in names}
    if not names or None in stored.values():
        have = (
            "weights=average needs a run with average=ema; use weights=model" if names else "it was not saved by a run"
        )
        raise CheckpointError(f"{contents.path} cannot be exported", [f"it holds no {kind} weights: {have}"])
    return {name: tensor for name, tensor in stored.items() if tensor is not None}


def _metadata(contents: Contents, asked: ExportConfig) -> dict[str, str]:
    model: JSON = contents.config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{contents.path} cannot be exported", ["its config.json has no model: it was not saved by a run"]
        )
    return {
        "format": "pt",  # what readers of safetensors look for
        "softmoe_format": str(FORMAT),
        "step": str(contents.mark.step),
        "images_seen": str(contents.loop.get("images_seen", "")),
        "weights": asked.weights,
        "experts": asked.experts,
        "model": json.dumps(model),
        "names": json.dumps(NAMES),
    }


def _plan(
    out: Path, weights: dict[str, StoredTensor], asked: ExportConfig
) -> Iterator[tuple[Path, list[Piece], dict[str, str]]]:
    """Every file with its pieces and what its metadata says beside the rest; `out` itself last, so that it stands for all."""
    apart = [name for name in weights if EXPERTS in name and asked.experts == "separate"]
    for expert in range(max((weights[name].shape[0] for name in apart), default=0)):
        pieces = [Piece(name, weights[name], expert) for name in apart if expert < weights[name].shape[0]]
        yield (
            out.with_name(f"{out.name.removesuffix(SUFFIX)}.expert_{expert:05d}{SUFFIX}"),
            pieces,
            {"expert": str(expert)},
        )
    yield out, [Piece(name, tensor, None) for name, tensor in weights.items() if name not in set(apart)], {}


def _write(place: Path, pieces: list[Piece], metadata: dict[str, str], files: Files) -> tuple[Path, int]:
    """One file, under a name of its own until it is whole and on the disk; returns it with its size."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for piece in pieces:
        begin, end = end, end + 4 * torch.Size(piece.shape).numel()
        header[piece.name] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _becoming(place) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            rows = None if piece.expert is None else (piece.expert, piece.expert + 1)
            for block in blocks(files, piece.tensor, torch.float32, rows):
                file.write(block.reshape(-1).numpy().data)
        assert file.tell() == 8 + len(text) + end, (place, file.tell())
    return place, 8 + len(text) + end


@contextmanager
def _becoming(place: Path) -> Iterator[BufferedWriter]:
    draft = place.with_name(f"{place.name}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(place)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(place.parent)
