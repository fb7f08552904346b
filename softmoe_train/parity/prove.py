"""This file owns the proof: the layout's engine and one plain process side by side, tensor by tensor.

Every rank runs the same lines; only rank 0 holds the reference, and compares.
"""

import gc
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from torch import Tensor

from softmoe_train.data.batch import Batch
from softmoe_train.dist import World, control_group, gather_over_world, global_values, sum_over_world, wait_for_all
from softmoe_train.engine.protocol import Engine
from softmoe_train.parity.measure import Moved, Row, distance, fingerprint, move_distance, relative, tolerances
from softmoe_train.parity.reference import Reference
from softmoe_train.parity.state import parity_batch, perturb_engine
from softmoe_train.run import build_engine, build_topology
from softmoe_train.settings import RunConfig

LONGEST_WAIT = timedelta(hours=12)  # of the ranks for rank 0, which computes whole global batches alone

Say = Callable[[str], None]
UPDATE_ROUNDS, AVERAGE_ROUNDS = 2, 8  # how often each may round what it stores; a slow average moves by little more


def prove(config: RunConfig, world: World, device: torch.device, dtype: torch.dtype, say: Say) -> list[Row]:
    """Logits, loss and every gradient; then two updates of a fresh engine: loss, norm, weights, optimizer state.

    `dtype` is that of the one process. Every rank of the default process group must call it; rank 0 gets the rows of the
    table, the others none.
    """
    say("building the model of one process")
    reference = Reference(config, dtype, device) if world.main else None
    proof = _Proof(config, world, device, reference, say)
    wanted = proof.in_one_process(0)
    engine = proof.layout()
    proof.logits(engine, wanted[1])
    proof.loss("loss", engine, 0, wanted[0])
    proof.gradients(engine)
    del engine  # what its gradients were asked for takes the place of an update
    gc.collect()
    rate = proof.rate()
    proof.clip()
    engine = proof.layout()
    for update in (0, 1):
        if update:
            wanted = proof.in_one_process(update)
        factor = proof.allowed.second if update else 1.0
        proof.loss(f"update {update + 1}: loss", engine, update, wanted[0], factor=factor)
        proof.update(f"update {update + 1}", engine, rate, factor=factor)
    return proof.rows


class _Proof:
    """The two sides, and the rows so far."""

    def __init__(
        self, config: RunConfig, world: World, device: torch.device, reference: Reference | None, say: Say
    ) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.reference = reference
        self.say = say
        self.allowed = tolerances(config.precision, config.optim, narrow=config.parallel.exchange_dtype is not None)
        self.rows: list[Row] = []
        self.images = config.batch_size // world.size // config.micro_batches
        self.waiting = control_group(world, LONGEST_WAIT)
        self.topology = build_topology(config, world, device)

    def layout(self) -> Engine:
        """The engine of the user's settings, perturbed."""
        self.say("building the layout")
        engine = build_engine(self.config, self.topology, self.device)
        perturb_engine(engine, self.config.seed)
        return engine

    def in_one_process(self, update: int) -> tuple[float, list[Tensor]]:
        """The reference's loss and logits, by micro-batch, of a whole global batch; nothing on other ranks."""
        found = self.reference.forward_backward(update, self.images, self.say) if self.reference else (0.0, [])
        wait_for_all(self.waiting)  # not in a collective of the device, whose time is short
        return found

    @torch.no_grad()
    def logits(self, engine: Engine, wanted: list[Tensor]) -> None:
        """What every image is answered."""
        self.say("comparing logits")
        error = size = 0.0
        for i, batch in enumerate(self._batches(0)):
            for rank, got in enumerate(gather_over_world(engine.module(batch.images))):
                if self.reference is not None:
                    want = wanted[rank * self.config.micro_batches + i].double()
                    error += (got.double() - want).square().sum().item()
                    size += want.square().sum().item()
        self._row("logits", self.allowed.logits, {"": relative(size**0.5 + error**0.5, size**0.5)})

    def loss(self, what: str, engine: Engine, update: int, wanted: float, *, factor: float = 1.0) -> None:
        """The mean loss of a global batch; leaves the gradients in the engine."""
        self.say(f"the layout's {what}")
        batches = self._batches(update)
        losses = [engine.forward_backward(b, last=b is batches[-1]) for b in batches]
        loss = sum_over_world(torch.stack(losses).sum()).item()
        self._row(what, self.allowed.loss * factor, {"": relative(loss, wanted)})

    def gradients(self, engine: Engine) -> None:
        """Every gradient, summed over the ranks, before the clip."""
        got = engine.gradients()
        self._compare("gradients", got, self.reference.gradients() if self.reference else {}, self.allowed.gradients)

    def clip(self) -> None:
        """From now on both sides clip, where the run clips at all, at half the norm: a clip that does nothing proves nothing."""
        if self.config.optim.clip_norm is not None:
            half = torch.tensor(self.reference.norm() / 2 if self.reference else 0.0, dtype=torch.float64)
            limit = sum_over_world(half.to(self.device)).item()
            optim = self.config.optim.model_copy(update={"clip_norm": limit})
            self.config = self.config.model_copy(update={"optim": optim})
            if self.reference is not None:
                self.reference.clip_below(limit)

    def rate(self) -> float:
        """The learning rate of the updates, rank 0's on all."""
        rate = torch.tensor(self.reference.rate() if self.reference else 0.0, dtype=torch.float64)
        return sum_over_world(rate.to(self.device)).item()

    def update(self, name: str, engine: Engine, rate: float, *, factor: float) -> None:
        """One update on both sides: the norm that clips it, the weights and the optimizer state that it leaves."""
        norms = gather_over_world(engine.update(rate).norm.reshape(1).double()).flatten().tolist()
        tensors = engine.state_dict()
        moved: dict[str, Moved] = {}
        averaged: dict[str, Moved] = {}
        state: dict[str, Tensor] = {}
        if self.reference is not None:
            norm = self.reference.norm()
            error = max((relative(got, norm) for got in norms), key=lambda e: (e != e, e))
            self._row(f"{name}: gradient norm", self.allowed.norm * factor, {"": error})
            self._row(f"{name}: norm across ranks", 0.0, {"": relative(max(norms), min(norms))})
            moved, averaged = self._moved(self.reference, rate)
            state = self.reference.state()
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self._compare(f"{name}: weights", weights, moved, self.allowed.weights * factor)
        average = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
        average.pop("updates", None)
        self._compare(f"{name}: average", average, averaged, self.allowed.weights * factor)
        kept = {n: t for n, t in tensors.items() if n.startswith("optimizer.")}
        self._compare(f"{name}: state", kept, state, self.allowed.state * factor)

    def _moved(self, reference: Reference, rate: float) -> tuple[dict[str, Moved], dict[str, Moved]]:
        """The reference's update, of the weights and of their average."""
        # The step of Adafactor takes the place of the gradient.
        gradients = {n: g.clone() for n, g in reference.gradients().items()}
        before = [{n: w.clone() for n, w in kept.items()} for kept in (reference.values, reference.average)]
        reference.update(rate)
        sides = zip((reference.values, reference.average), before, (UPDATE_ROUNDS, AVERAGE_ROUNDS), strict=True)
        weights, average = ({n: Moved(a[n], b[n], gradients[n], rounds) for n in b} for a, b, rounds in sides)
        return weights, average

    def _batches(self, update: int) -> list[Batch]:
        """This rank's micro-batches of a global batch."""
        first = self.world.rank * self.config.micro_batches * self.images
        starts = range(first, first + self.config.micro_batches * self.images, self.images)
        return [parity_batch(self.config, update, range(s, s + self.images)).to(self.device) for s in starts]

    def _compare(
        self,
        what: str,
        got: Mapping[str, Tensor],
        want: Mapping[str, Tensor] | Mapping[str, Moved],
        tolerance: float,
    ) -> None:
        """One tensor at a time, gathered by all ranks in the same order and freed before the next."""
        measured: dict[str, float] = {}
        apart: dict[str, float] = {}
        for i, (name, tensor) in enumerate(got.items()):
            self.say(f"comparing {what}, {i + 1} of {len(got)}")
            whole = global_values(tensor)
            marks = gather_over_world(fingerprint(whole))
            apart[name] = float((marks != marks[0]).any(1).sum().item())
            if self.reference is not None and name in want:
                other = want[name]
                measured[name] = distance(whole, other) if isinstance(other, Tensor) else move_distance(whole, other)
        # What only one side has is infinitely far.
        names = [*want, *(name for name in got if name not in want)]
        errors = {name: measured.get(name, float("inf")) for name in names}
        scalars = {name: error for name, error in errors.items() if name in got and got[name].numel() == 1}
        self._row(what, tolerance, {name: error for name, error in errors.items() if name not in scalars})
        self._row(f"{what}, scalars", max(tolerance, self.allowed.scalars), scalars)
        self._row(f"{what}, copies", 0.0, apart)

    def _row(self, what: str, tolerance: float, errors: dict[str, float]) -> None:
        if self.reference is not None and errors:
            self.rows.append(Row(what, tolerance, errors))
