"""Reading image shards: order by arithmetic, decoding, transforms, and batches that carry the cursor that resumes."""

from softmoe_train.data.batch import Batch, Broken, Cursor, ImageStream
from softmoe_train.data.build import (
    build_eval_stream,
    build_stream,
    check_data,
    check_evaluated,
    check_streams,
    make_indexes,
)
from softmoe_train.data.labels import check_labels
from softmoe_train.data.places import ShardsError, UselessShardsError
from softmoe_train.data.records import DataConfig, SyntheticConfig, WebDatasetConfig
from softmoe_train.data.sources import left_out

__all__ = [
    "Batch",
    "Broken",
    "Cursor",
    "DataConfig",
    "ImageStream",
    "ShardsError",
    "SyntheticConfig",
    "UselessShardsError",
    "WebDatasetConfig",
    "build_eval_stream",
    "build_stream",
    "check_data",
    "check_evaluated",
    "check_labels",
    "check_streams",
    "left_out",
    "make_indexes",
]
