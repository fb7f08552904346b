"""Make shards of pictures with captions, from a folder and an annotation file of COCO's kind: an example of a source of your own.

    python data/make_captions.py --pictures train2017 --captions captions_train2017.json --out shards/coco

A sample has its first caption as KEY.txt, and all of them in KEY.json. What is written here is only where the pictures are and what
belongs to them; shuffling, even shards, resuming and the index come from `make_shards`.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from softmoe_train.shards import Item, LeftOut, StoppedError, Stored, make_shards, making

ROWS = 5_000  # pictures of a part, which one process looks at


class Captions:
    """The pictures that an annotation file lists; satisfies `Source`. It is sent to the processes that read pictures."""

    def __init__(self, pictures: Path, annotations: Path) -> None:
        self.pictures, self.data = pictures, annotations.read_bytes()

    def parts(self) -> Iterator[list[tuple[str, list[str]]]]:
        """File names with their captions."""
        document = json.loads(self.data)
        captions: dict[int, list[str]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"].strip())
        rows = [(image["file_name"], captions[image["id"]]) for image in document["images"]]
        for start in range(0, len(rows), ROWS):
            yield rows[start : start + ROWS]

    def items(self, part: list[tuple[str, list[str]]]) -> Iterator[Item | LeftOut]:
        """A picture with its captions, or why there is none."""
        for name, captions in part:
            path = self.pictures / name
            if not captions or not path.is_file():
                yield LeftOut(name, "no caption" if path.is_file() else "no such file")
            else:
                picture = Stored(str(path), 0, path.stat().st_size)
                yield Item(name, picture, text=captions[0], extra={"captions": captions})

    def class_names(self) -> None:
        """There are no classes."""

    def facts(self) -> str:
        """The hash of the annotations: a making that was interrupted goes on with the same ones only."""
        return hashlib.sha256(self.data).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, metavar="FOLDER", help="where the pictures are")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help="the annotations, JSON")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the shards go")
    given = parser.parse_args()
    try:
        print(make_shards(Captions(given.pictures, given.captions), making(out=given.out)))
    except (ValueError, StoppedError) as error:
        parser.exit(1, f"{error}\n")
