"""This file owns what a data configuration may say: the records under `data` and the rules each keeps alone."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from softmoe_train.config import Record

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
ShardSpec = str | list[str]
LabelKind = Literal["hard", "multi_hot", "none"]

_SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RATIO = re.compile(r"[1-9][0-9]{0,3}/[1-9][0-9]{0,3}")


def _pixels_or_ratio(value: object) -> object:
    if value is None or (type(value) is int and value > 0) or (isinstance(value, str) and _RATIO.fullmatch(value)):
        return value
    raise PydanticCustomError("side", "input should be pixels (1 or more), a ratio to the image size as 8/7, or null")


Side = Annotated[int | str | None, BeforeValidator(_pixels_or_ratio)]


class InceptionCrop(Record):
    """A random crop of `min_area` to `max_area` of the picture, resized bilinearly to a square (paper, section 5)."""

    kind: Literal["inception_crop"]
    min_area: Fraction
    max_area: Fraction
    min_aspect: Positive
    max_aspect: Positive
    antialias: bool
    flip: bool
    arithmetic: Literal[
        "float32", "uint8"
    ]  # of the resize: truncated, as the paper's pipeline does, or rounded and faster

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for name in ("area", "aspect"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(
                    f"min_{name}={low} is above max_{name}={high}: a crop needs min <= max; exchange them."
                )
        return self


class PaddedCrop(Record):
    """The picture at its target size, padded with `padding` black pixels a side and cut back at a random place."""

    kind: Literal["padded_crop"]
    padding: Count
    antialias: bool
    flip: bool


class ResizeCentralCrop(Record):
    """The shorter side resized to `resize` by area averages, then the central square (paper, section 5)."""

    kind: Literal["resize_central_crop"]
    resize: PositiveInt


class Resize(Record):
    """A bilinear resize to a square of `resize` pixels, whatever the aspect, then the central square.

    `resize: null` means the image size itself; where the picture has that size already, it stays exactly as it is. A ratio, as `8/7`,
    is of the image size.
    """

    kind: Literal["resize"]
    resize: Side
    antialias: bool

    def side(self, image_size: int) -> int:
        """The square that the central one is cut from, in pixels."""
        if isinstance(self.resize, str):
            above, below = map(int, self.resize.split("/"))
            return (2 * above * image_size + below) // (2 * below)  # to the nearest, in whole numbers
        return self.resize or image_size


TransformConfig = Annotated[InceptionCrop | PaddedCrop | ResizeCentralCrop | Resize, Field(discriminator="kind")]


class RandAugment(Record):
    """RandAugment of training pictures: `layers` operations in a row, all at one `magnitude` (`randaugment.py`)."""

    layers: PositiveInt
    magnitude: Annotated[float, Field(ge=0, le=20)]  # above 20 the released Posterize would need more than 8 bits


class CacheConfig(Record):
    """How shards at URLs are read: where this node keeps copies, how many, and with how much patience."""

    folder: str | None  # null: softmoe_train/shards under XDG_CACHE_HOME, or ~/.cache
    max_gib: Annotated[float, Field(ge=0)]  # 0 keeps none: every sample is read by itself
    prefetch: Count  # shards that are fetched before they are needed
    attempts: PositiveInt
    timeout: Positive  # seconds


class SourceConfig(Record):
    """One of several sources of training samples: `weight` of every P samples, P the sum of all sources' weights."""

    shards: ShardSpec
    weight: PositiveInt
    seed: Count  # of its own order, together with the run's


class KeepConfig(Record):
    """Which samples are read at all: those with one of `labels` and with `keys` in their key; null keeps all."""

    labels: list[Count | str] | None  # numbers, or names of data.classes
    keys: str | None  # a regular expression, which re.search must find in the key
    renumber: bool  # a label's class is its place in `labels`; a sample's other labels are left out

    @model_validator(mode="after")
    def _something_to_keep(self) -> Self:
        if self.renumber and self.labels is None:
            raise ValueError(
                "data.keep.renumber=true with data.keep.labels=null: a class is its place in that list; give the list, or use false"
            )
        if self.labels is not None and not self.labels:
            raise ValueError("data.keep.labels=[] keeps no sample; list the labels to keep, or use null for all")
        if self.keys is not None:
            try:
                re.compile(self.keys)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"data.keep.keys={self.keys!r} is not a regular expression ({error}); correct it, or use null for all keys"
                ) from None
        return self


class WebDatasetConfig(Record):
    """Tar shards of pictures, labels and texts: where they are, in which order they are read, what is done to them."""

    kind: Literal["webdataset"]
    train: ShardSpec | None
    mixture: dict[str, SourceConfig] | None  # in place of train: sources by name
    test: ShardSpec | None
    cache: CacheConfig
    streams: PositiveInt
    shuffle_window: PositiveInt  # samples
    block: PositiveInt  # samples of one contiguous run of tars
    workers: Count  # decode processes a rank; 0 decodes in the training process
    prefetch: PositiveInt  # batches a worker prepares ahead
    label: str  # cls, or json:FIELD.SUBFIELD
    classes: str | None  # a file with the name of a class on each line: labels are then names
    labels: LabelKind
    text: str | None  # txt, or json:FIELD.SUBFIELD
    keep: KeepConfig
    quarantine: str | None  # a file of samples that are never read
    train_transform: TransformConfig
    test_transform: TransformConfig
    randaugment: RandAugment | None  # after train_transform
    mixup: Positive | None  # p of Beta(p, p); above 0
    scaled_decode: bool  # a training JPEG is decoded at a half, a quarter or an eighth of its size where an inception crop allows it
    max_pixels: PositiveInt
    max_broken: Count
    max_broken_fraction: Fraction | None  # of the images seen

    @field_validator("label", "text")
    @classmethod
    def _a_member(cls, value: str | None, info: ValidationInfo) -> str | None:
        plain = {"label": "cls", "text": "txt"}[str(info.field_name)]
        if value is None or value == plain or (value.startswith("json:") and all(path_of(value) or [""])):
            return value
        raise ValueError(
            f"data.{info.field_name}={value!r} is no part of a sample; use {plain}, or json:FIELD (json:FIELD.SUBFIELD inside it)"
        )

    @field_validator("mixture")
    @classmethod
    def _names_of_sources(cls, mixture: dict[str, SourceConfig] | None) -> dict[str, SourceConfig] | None:
        wrong = [name for name in mixture or {} if not _SOURCE_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"data.mixture: {wrong[0]!r} is no name for a source, since metrics and overrides use it: use letters, digits, _ and -"
            )
        if mixture is not None and not mixture:
            raise ValueError("data.mixture={} holds no source; name one or more, or use null and data.train")
        return mixture


def path_of(member: str) -> tuple[str, ...] | None:
    """The path of a field in `json:FIELD.SUBFIELD`; None where the member itself is meant."""
    kind, colon, path = member.partition(":")
    return tuple(path.split(".")) if colon and kind == "json" else None


class SyntheticConfig(Record):
    """Pictures made by arithmetic from (seed, sample number): a class-dependent pattern under noise."""

    kind: Literal["synthetic"]
    streams: PositiveInt
    labels: Literal["hard", "multi_hot"]
    num_train: PositiveInt
    num_test: PositiveInt
    noise: Annotated[float, Field(ge=0)]  # standard deviation in gray levels
    mixup: Positive | None  # p of Beta(p, p); above 0


DataConfig = Annotated[WebDatasetConfig | SyntheticConfig, Field(discriminator="kind")]
