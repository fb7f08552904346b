"""This file owns one rank's part in `softmoe parity`: what may be asked, the process group, the proof, what is told."""

import logging
from typing import Literal, NamedTuple

import torch

from softmoe_train.config import JsonOut, Record
from softmoe_train.dist import World, pick_device, process_group, sum_over_world
from softmoe_train.parallel.layout import expert_axis
from softmoe_train.parity.prove import prove
from softmoe_train.parity.table import print_table, told_by, verdict, write_json
from softmoe_train.run import DTYPES
from softmoe_train.settings import RunConfig, compute_problems


class ParityConfig(Record):
    """What a proof has beside the keys of a run."""

    out: JsonOut
    reference: Literal["float64", "same"]  # precision of the one process for float32 runs; others keep their own


class ParityRun(NamedTuple):
    """The run to prove, and how."""

    run: RunConfig
    own: ParityConfig

    @property
    def processes(self) -> int:
        """Local workers to start."""
        return self.run.processes

    @property
    def dtype(self) -> torch.dtype:
        """What the one process computes in."""
        if self.run.precision == "float32" and self.own.reference == "float64":
            return torch.float64
        return DTYPES[self.run.precision]


def parity_problems(config: RunConfig, size: int, local_size: int) -> list[str]:
    """What keeps a run on `size` ranks from being proven: as for training, without its data, run folder and schedule."""
    problems = compute_problems(config, size, local_size)
    if config.batch_size % size:
        problems.append(
            f"batch_size={config.batch_size} does not divide into {size} ranks: every rank has equally many images; use a "
            f"multiple of {size}"
        )
    return problems


def parity_rank(asked: ParityRun, world: World) -> bool:
    """Prove the layout as one rank of `world`; rank 0 prints the table and the verdict. The same answer on every rank."""
    device = pick_device(asked.run.device, world.local_rank)
    # Every rank would warn that gathering an expert weight takes two collectives.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with process_group(world, device):
        rows = prove(asked.run, world, device, asked.dtype, told_by(world.main))
        if world.main:
            title = _title(asked, world, device)
            print_table(title, rows)
            print(verdict(rows), flush=True)
            if asked.own.out is not None:
                write_json(asked.own.out, title, rows)
        # Also keeps the others until all is told: a launcher ends the rest when the first one fails.
        failing = sum_over_world(torch.tensor(float(any(row.failing for row in rows)), device=device))
        return not failing.item()


def _title(asked: ParityRun, world: World, device: torch.device) -> str:
    """What was compared, in a line or two."""
    run = asked.run
    R = expert_axis(run.parallel, num_experts=run.model.num_experts, size=world.size)
    ranks = "1 process" if world.size == 1 else f"{world.size} processes"
    layout = f"{ranks}, expert axis {R}, {run.parallel.sharding}, engine {run.engine.kind}"
    batch = f"{run.batch_size} images in {run.micro_batches} micro-batch{'' if run.micro_batches == 1 else 'es'} a rank, {run.optim.kind}"
    dtype = str(asked.dtype).removeprefix("torch.")
    return f"{layout}; {device.type}, {run.precision}\n{batch}\nagainst one process in {dtype}, no engine, mesh or collective"
