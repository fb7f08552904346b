"""Cut scikit-learn's handwritten digits (1,797 gray pictures of 8 x 8 pixels, 10 classes) into WebDataset shards.

    python data/make_digits.py --out shards/digits
    softmoe train data=digits 'data.train=shards/digits/train-*.tar' 'data.test=shards/digits/test-*.tar'

A fifth of each class is held out, always the same. Shards are uneven on purpose, and their bytes are reproducible.
"""

import argparse
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from webdataset import ShardWriter

SHARES = {"train": (5, 3, 4, 2), "test": (3, 2)}  # of a split's samples, one number a shard


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The picture numbers of each split, shuffled: 80 % and 20 % of each class."""
    random = np.random.RandomState(0)  # its sequence is frozen by numpy's promise
    shuffled = random.permutation(len(labels))
    by_class = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    test = np.concatenate([numbers[: round(len(numbers) / 5)] for numbers in by_class])
    is_test = np.isin(shuffled, test)
    return {"train": shuffled[~is_test], "test": shuffled[is_test]}


def encode_samples(numbers: Iterable[int], images: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, str | bytes]]:
    """WebDataset samples of the pictures `numbers`, their 17 gray levels spread over 0 to 255."""
    for number in numbers:
        picture = io.BytesIO()
        # Stored, not compressed: zlib's versions differ in their output.
        Image.fromarray((images[number] * 255 / 16).astype(np.uint8)).save(picture, "PNG", compress_level=0)
        yield {"__key__": f"digit-{number:04d}", "png": picture.getvalue(), "cls": str(labels[number]).encode()}


def write_shard(path: Path, samples: Iterable[dict[str, str | bytes]]) -> None:
    """One shard, there only when it is whole."""
    part = path.with_suffix(".part")
    with (
        open(part, "wb") as file,
        # An opener, because by default the name is opened by webdataset's gopen, which may run commands.
        ShardWriter("%d", opener=lambda _: file, verbose=0, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            writer.write(sample)
    os.replace(part, path)


def make_digits(out: Path) -> None:
    """Write all shards into the folder `out`, or do nothing where they are there already."""
    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    for split, numbers in split_digits(digits.target).items():
        shares = np.asarray(SHARES[split])
        cuts = np.cumsum(shares)[:-1] * len(numbers) // shares.sum()
        for index, chunk in enumerate(np.split(numbers, cuts)):
            path = out / f"{split}-{index:06d}.tar"
            there = path.exists()
            if not there:
                write_shard(path, encode_samples(chunk.tolist(), digits.images, digits.target))
            print(f"{path}: {len(chunk)} samples{' (already there)' if there else ''}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    make_digits(parser.parse_args().out)
