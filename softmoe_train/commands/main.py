"""This file owns the command line: `softmoe VERB [overrides]`."""

import argparse
import sys

import softmoe_train
from softmoe_train.commands.train import train
from softmoe_train.config import ConfigError

EPILOG = """overrides are Hydra's: key=value, e.g. recipe=quickstart processes=2 run_dir=runs/mine
`softmoe train recipe=debug` needs no data; `softmoe train --cfg job` prints every key with its value"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 a wrong setting, 3 a run that stopped itself, 130 interrupted."""
    parser = argparse.ArgumentParser("softmoe", description=softmoe_train.__doc__)
    parser.add_argument("--version", action="version", version=f"softmoe_train {softmoe_train.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser(
        "train",
        help="pretrain, or continue what the run folder holds",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--cfg", choices=["job"], help="print the resolved configuration and start nothing")
    verb.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args(arguments)
    try:
        return train(options.overrides, print_only=options.cfg is not None)
    except ConfigError as error:
        print(f"softmoe {options.verb}: {error}", file=sys.stderr)
        return 2
