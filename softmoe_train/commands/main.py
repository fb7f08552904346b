"""This file owns the command line: `softmoe VERB [overrides]`."""

import argparse
import signal
import sys

import softmoe_train
from softmoe_train.commands.allocation import NO_MEMORY, no_memory
from softmoe_train.commands.bench import MEASURES, bench
from softmoe_train.commands.eval import eval_checkpoint
from softmoe_train.commands.export import export
from softmoe_train.commands.finetune import choose, finetune
from softmoe_train.commands.inspect import inspect
from softmoe_train.commands.parity import parity
from softmoe_train.commands.plan import compare, plan
from softmoe_train.commands.report import report
from softmoe_train.commands.shards import TASKS, shards
from softmoe_train.commands.sweep import sweep
from softmoe_train.commands.train import train
from softmoe_train.config import ConfigError
from softmoe_train.cores import limit_threads

EPILOG = """overrides are Hydra's: key=value, e.g. recipe=quickstart processes=2 run_dir=runs/mine
`softmoe train recipe=debug` needs no data; `softmoe train --cfg job` prints every key with its value"""
FINETUNE_EPILOG = """keys: ckpt=FOLDER_OR_FILE (a run: its newest checkpoint; a step; an export), weights=model or average; recipe=finetune/SET and any override of
a run, but for the model: that is the checkpoint's, with the recipe's image size and number of classes, and a fresh head
  softmoe finetune ckpt=runs/mine recipe=finetune/imagenet1k data.train=SHARDS data.test=SHARDS
  softmoe finetune -m ckpt=runs/mine recipe=finetune/pets schedule.peak=0.003,0.01 data.train=SHARDS data.test=SHARDS"""

BENCH_EPILOG = """measures: {measures}

each has keys of its own (conf/bench_*.yaml), all take rounds=, warmup= and out=FILE.json; step, exchange and checkpoint also take those of a run
(model=, precision=, device=, processes=, parallel.expert_axis= ...), infer the first three and recipe=, stream those of data
  softmoe bench layer cases=128x1,32x4 images=32 dtype=float32 out=layer.json picture=layer.png
  softmoe bench infer model=soft_s16_128e images=1,32
  softmoe bench step recipe=debug processes=2
  softmoe bench exchange recipe=debug processes=2 images=8,64
  softmoe bench stream data=inception data.train=/data/train data.workers=2
  softmoe bench checkpoint recipe=debug processes=2 folder=/scratch"""

PARITY_EPILOG = """any overrides of a run, and out=FILE.json (for programs) and reference=same (one process in float32, not float64)
  softmoe parity recipe=quickstart shrink=laptop processes=2 parallel.expert_axis=2
  torchrun --nproc-per-node 8 --no-python softmoe parity model=soft_b16_128e batch_size=64 parallel.sharding=fsdp"""

PLAN_EPILOG = """any overrides of a run, and ranks=64 ranks_per_host=8 (of the machines it is for), out=FILE.json (for programs)
  softmoe plan model=soft_h14_256e ranks=64 parallel.expert_axis=8 parallel.sharding=fsdp
  softmoe plan -m model=soft_s16_128e model.moe.num_experts=16,32,64 ranks=8"""

INSPECT_EPILOG = """keys: ckpt=FOLDER (a run: its newest checkpoint; or a step), verify=true, against=FOLDER, out=FILE.json,
routing=true (pictures of what its routers do) with images=SHARDS, count=256, pictures=FOLDER
  softmoe inspect ckpt=runs/mine verify=true
  softmoe inspect ckpt=runs/mine routing=true "images=/data/mine/test-*.tar" pictures=routing
  softmoe inspect ckpt=runs/mine against=runs/other/checkpoints/step_00001000"""

SHARDS_EPILOG = """tasks: {tasks}

each has keys of its own (conf/shards_*.yaml, a line for each), check those of a run too; all take processes= and progress=
  softmoe shards make from=pictures out=shards/mine test_fraction=0.1
  softmoe shards make source=archives from=ILSVRC2012_img_train.tar out=shards/imagenet resize=512
  softmoe shards make source=manifest from=list.csv out=shards/listed
  softmoe shards make source=parquet from=downloads/data out=shards/hub
  softmoe shards check "data.train=shards/mine/train-*.tar" model.num_classes=10 quarantine=bad.jsonl
  softmoe shards index data=shards/mine verify=true"""

EVAL_EPILOG = """keys: ckpt=FOLDER (a run: its newest checkpoint; or a step; or a file of weights), weights=model or average, out=FILE.json,
and those of a run, whose values are the checkpoint's: evals= names other evaluators, data.test= other images, processes= how many ranks
  softmoe eval ckpt=runs/mine
  softmoe eval ckpt=runs/mine/checkpoints/step_00001000 evals=[upstream] data.test=/data/other processes=8"""

EXPORT_EPILOG = """keys: ckpt=FOLDER (a run: its newest checkpoint; or a step), out=FILE.safetensors, weights=model or average,
experts=together or separate (a file for each expert beside it)
  softmoe export ckpt=runs/mine out=weights.safetensors"""

REPORT_EPILOG = """run folders, or folders that hold some (a sweep); keys: out=FILE.html (report.html), json_out=FILE.json
  softmoe report runs/*
  softmoe report runs/sweep out=sweep.html json_out=sweep.json"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done, 1 a proof that fails or a checkpoint that is damaged, 2 a wrong setting, 3 a run that stopped itself or found no memory,
    4 one that hung, 75 a run that was asked to end and is to be resumed, 128 + n ended by signal n.
    """
    options = _parser().parse_args(arguments)
    limit_threads()
    try:
        match options.verb:
            case "bench":
                return bench(options.what, options.overrides)
            case "eval":
                return eval_checkpoint(options.overrides)
            case "export":
                return export(options.overrides)
            case "finetune":
                several = options.multirun and options.cfg is None
                return (
                    choose(options.overrides) if several else finetune(options.overrides, print_only=bool(options.cfg))
                )
            case "inspect":
                return inspect(options.overrides)
            case "parity":
                return parity(options.overrides)
            case "report":
                return report(options.overrides)
            case "shards":
                return shards(options.what, options.overrides)
            case "plan":
                return (compare if options.multirun else plan)(options.overrides)
            case _ if options.multirun and options.cfg is None:
                return sweep(options.overrides)
            case _:
                return train(options.overrides, print_only=options.cfg is not None)
    except ConfigError as error:
        print(f"softmoe {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # of a worker it ends elsewhere
        print(f"softmoe {options.verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        said = no_memory(options.verb, error)
        if said is None:
            raise
        print(f"softmoe {options.verb}: {said}", file=sys.stderr)
        return NO_MEMORY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("softmoe", description=softmoe_train.__doc__)
    parser.add_argument("--version", action="version", version=f"softmoe_train {softmoe_train.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, told: str, epilog: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=told, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    measures = "".join(f"\n  {name:<10} {text}" for name, text in MEASURES.items())
    training = verb("train", "pretrain, or continue what the run folder holds", EPILOG)
    tuning = verb(
        "finetune", "train the weights of a checkpoint on another set, at another resolution", FINETUNE_EPILOG
    )
    tuning.add_argument(
        "-m", "--multirun", action="store_true", help="every point of a sweep, chosen on held-out images"
    )
    training.add_argument(
        "-m", "--multirun", action="store_true", help="run every point of a sweep, and go on with one"
    )
    for parsed in (training, tuning):
        parsed.add_argument("--cfg", choices=["job"], help="print the resolved configuration and start nothing")
    proof = verb("parity", "prove that this layout computes what one process computes; needs no data", PARITY_EPILOG)
    planning = verb(
        "plan", "what a run costs, before it runs and on any machine: memory, FLOPs, bytes, legality", PLAN_EPILOG
    )
    planning.add_argument("-m", "--multirun", action="store_true", help="compare the points of a sweep in one table")
    measuring = verb(
        "bench",
        "measure against a floor taken in the same minute: layer, infer, step, exchange, stream, checkpoint",
        BENCH_EPILOG.format(measures=measures),
    )
    measuring.add_argument("what", choices=list(MEASURES), help="what to measure")
    tasks = "".join(f"\n  {name:<6} {text}" for name, text in TASKS.items())
    sharding = verb(
        "shards",
        "make shards from pictures, look through them, publish what they hold: make, check, index",
        SHARDS_EPILOG.format(tasks=tasks),
    )
    sharding.add_argument("what", choices=list(TASKS), help="what to do")
    inspecting = verb(
        "inspect", "what is in a checkpoint, whether it is whole, how it differs from another", INSPECT_EPILOG
    )
    evaluating = verb("eval", "run evaluators on a checkpoint", EVAL_EPILOG)
    exporting = verb("export", "write a checkpoint's weights as one safetensors file for plain PyTorch", EXPORT_EPILOG)
    reporting = verb("report", "compare runs or a sweep in one HTML file that stands alone", REPORT_EPILOG)
    for parsed in (
        training,
        tuning,
        proof,
        planning,
        measuring,
        evaluating,
        inspecting,
        exporting,
        sharding,
        reporting,
    ):
        parsed.add_argument("overrides", nargs="*", help="key=value")
    return parser
