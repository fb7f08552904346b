"""Make shards of ImageNet-1k from the archives that it is given out as, which are read where they lie and not unpacked.

    python data/make_imagenet.py --archives downloads --out shards/imagenet
    softmoe train data=imagenet1k data.train=shards/imagenet/train data.test=shards/imagenet/val model.num_classes=1000

`downloads` holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, and for the latter's labels either LOC_val_solution.csv, or the
development kit's ILSVRC2012_validation_ground_truth.txt with map_clsloc.txt. Both splits count classes by the sorted synsets. More words,
as resize=512, go to `softmoe shards make`.
"""

import argparse
import sys
from pathlib import Path

from softmoe_train.commands.main import main


def labels_in(archives: Path) -> list[str]:
    """What says the classes of the validation pictures, as settings."""
    if (archives / "LOC_val_solution.csv").exists():
        return [f"labels={archives}/LOC_val_solution.csv"]
    return [f"labels={archives}/ILSVRC2012_validation_ground_truth.txt", f"synsets={archives}/map_clsloc.txt"]


def make_imagenet(archives: Path, out: Path, more: list[str]) -> int:
    """Make train, then val by its class names; the exit code of the first that fails."""
    train = [f"from={archives}/ILSVRC2012_img_train.tar", f"out={out}/train"]
    val = [f"from={archives}/ILSVRC2012_img_val.tar", f"out={out}/val", "name=val", f"classes={out}/train/classes.txt"]
    return main(["shards", "make", "source=archives", *train, *more]) or main(
        ["shards", "make", "source=archives", *val, *labels_in(archives), *more]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, required=True, metavar="FOLDER", help="where the archives are")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("more", nargs="*", help="key=value of `softmoe shards make`")
    given = parser.parse_args()
    sys.exit(make_imagenet(given.archives, given.out, given.more))
