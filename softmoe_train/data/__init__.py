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
from softmoe_train.data.sources import facts_of_test, left_out, trained_and_tested

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
    "facts_of_test",
    "left_out",
    "make_indexes",
    "trained_and_tested",
]
