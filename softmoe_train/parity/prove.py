"""This file owns the proof: the layout's engine and one plain process side by side, tensor by tensor.

Every rank runs the same lines; only rank 0 holds the reference, and compares.
"""

import gc
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from softmoe_train.data.batch import Batch
from softmoe_train.dist import (
    World,
    control_group,
    gather_over_world,
    global_values,
    local_values,
    sum_over_world,
    wait_for_all,
)
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.moe import MoE
from softmoe_train.model.sparse import Decisions
from softmoe_train.parity.heard import Heard
from softmoe_train.parity.measure import (
    ROUNDING,
    ROUTER_TIES,
    Moved,
    Row,
    apart,
    distance,
    fingerprint,
    least_sizes,
    relative,
    tolerances,
)
from softmoe_train.parity.plain_layer import plain_weights
from softmoe_train.parity.plain_sparse import plain_sparse
from softmoe_train.parity.reference import Reference
from softmoe_train.parity.state import parity_batch, perturb_engine, routing_tokens
from softmoe_train.run import DTYPES, build_engine, build_topology
from softmoe_train.settings import RunConfig

LONGEST_WAIT = timedelta(hours=12)  # of the ranks for rank 0, which computes whole global batches alone

Say = Callable[[str], None]
UPDATE_ROUNDS, AVERAGE_ROUNDS = 2, 8  # how often each may round what it stores; a slow average moves by little more
CLIPS = (0.5, 2.0)  # the limit of each update in gradient norms: one that clips, and one that must do nothing


def prove(config: RunConfig, world: World, device: torch.device, dtype: torch.dtype, say: Say) -> list[Row]:
    """Routing, logits, loss and every gradient; then two updates of a fresh engine: loss, norm, weights, optimizer state.

    `dtype` is that of the one process, which starts the second update from what the layout's first one left: so each is
    measured by itself. Every rank of the default process group must call it; rank 0 gets the rows of the table, the others none.
    """
    say("building the model of one process")
    reference = Reference(config, dtype, device) if world.main else None
    proof = _Proof(config, world, device, reference, say)
    engine = proof.layout()
    proof.routing(engine)
    answers, decided = proof.answers(engine)
    wanted = proof.in_one_process(0, decided)
    proof.decisions("decisions")
    proof.logits(answers, wanted[1])
    proof.loss("loss", proof.backward(engine, 0)[0], wanted[0])
    proof.gradients(engine)
    del engine  # what its gradients were asked for takes the place of an update
    gc.collect()
    rate = proof.rate()
    engine = proof.layout()
    for update, norms in enumerate(CLIPS):
        name = f"update {update + 1}"
        loss, decided = proof.backward(engine, update)
        if update:
            wanted = proof.in_one_process(update, decided)
            proof.decisions(f"{name}: decisions")
        proof.clip(engine, norms)
        proof.loss(f"{name}: loss", loss, wanted[0])
        proof.update(name, engine, rate)
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

    def in_one_process(self, update: int, decided: list[dict[str, Decisions]]) -> tuple[float, list[Tensor]]:
        """The reference's loss and logits, by micro-batch, of a whole global batch; nothing on other ranks."""
        found = (0.0, [])
        if self.reference is not None:
            found = self.reference.forward_backward(update, self.images, decided, self.say)
        wait_for_all(self.waiting)  # not in a collective of the device, whose time is short
        return found

    def decisions(self, what: str) -> None:
        """How far what the layout's sparse routers decided is from what the one process finds, which has followed them."""
        self._row(what, self.allowed.decisions, self.reference.decisions_apart() if self.reference else {})

    @torch.no_grad()
    def routing(self, engine: Engine) -> None:
        """Both weightings of every router, of tokens in the precision of the run: the router is float32 in all of them."""
        self.say("comparing routers")
        layers = {name: m for name, m in engine.module.named_modules() if isinstance(m, MoE)}
        errors = {}
        for name, layer in layers.items():
            x = routing_tokens(self.config, name, self.images).to(self.device, DTYPES[self.config.precision])
            parameters = {key: local_values(p).double() for key, p in layer.router.named_parameters()}
            worst = (
                self._sparse_error(layer, x, parameters["gate"])
                if layer.config.is_sparse
                else _soft_error(layer, x, parameters)
            )
            errors[f"{name}.router"] = gather_over_world(torch.tensor([worst], device=self.device)).max().item()
        self._row("routing", self.allowed.routing, errors)

    def _sparse_error(self, layer: MoE, x: Tensor, gate: Tensor) -> float:
        """Of what is put into slots, read back and told; infinite where other tokens are chosen than gates allow."""
        keys = image_keys(self.config.seed, torch.arange(len(x), device=self.device))
        x = x.view(-1, layer.config.group_images * x.shape[1], x.shape[2])
        got = layer.router(x, keys)
        wanted = plain_sparse(layer.config, gate, x.double(), keys, got.decisions)
        if not wanted.apart <= ROUTER_TIES:
            return math.inf
        slots = torch.einsum("GTES,GTD->GESD", wanted.dispatch, x.double())
        pairs = ((got.slots, slots), (got.weights, wanted.combine.sum(1)), (got.told, wanted.told))
        return max(distance(a, b) for a, b in pairs)

    @torch.no_grad()
    def answers(self, engine: Engine) -> tuple[list[Tensor], list[dict[str, Decisions]]]:
        """The layout's logits, and what its sparse routers decide, by micro-batch of the global batch."""
        self.say("the layout's logits")

        def logits(batch: Batch) -> Tensor:
            return engine.module(batch.images, image_keys(self.config.seed, batch.sample_ids)).logits

        with Heard(engine.module, self.world.size) as heard:
            found = [heard.after(gather_over_world(logits(batch))) for batch in self._batches(0)]
        return [answer for rank in zip(*found, strict=True) for answer in rank], heard.of_global_batch()

    def logits(self, answers: list[Tensor], wanted: list[Tensor]) -> None:
        """What every image is answered."""
        error = size = 0.0
        for got, want in zip(answers, wanted):
            error += (got.double() - want.double()).square().sum().item()
            size += want.double().square().sum().item()
        self._row("logits", self.allowed.logits, {"": relative(size**0.5 + error**0.5, size**0.5)})

    def backward(self, engine: Engine, update: int) -> tuple[float, list[dict[str, Decisions]]]:
        """The mean loss of a global batch, and what sparse routers decide; leaves the gradients in the engine."""
        self.say("the layout's gradients")
        batches = self._batches(update)
        with Heard(engine.module, self.world.size) as heard:
            losses = [heard.after(engine.forward_backward(b, last=b is batches[-1])) for b in batches]
        return sum_over_world(torch.stack(losses).sum()).item(), heard.of_global_batch()

    def loss(self, what: str, got: float, wanted: float) -> None:
        """The mean loss of a global batch."""
        self._row(what, self.allowed.loss, {"": relative(got, wanted)})

    def gradients(self, engine: Engine) -> None:
        """Every gradient, summed over the ranks, before the clip."""
        want = self.reference.gradients() if self.reference else {}
        self._compare("gradients", engine.gradients(), want, self.allowed.gradients)

    def clip(self, engine: Engine, norms: float) -> None:
        """Have both sides clip, where the run clips at all, at so many gradient norms of the one process."""
        if self.config.optim.clip_norm is not None:
            limit = self._of_rank_0(lambda reference: reference.norm() * norms)
            engine.clip_norm = limit
            if self.reference is not None:
                self.reference.clip_at(limit)

    def rate(self) -> float:
        """The learning rate of the updates, rank 0's on all."""
        return self._of_rank_0(Reference.rate)

    def update(self, name: str, engine: Engine, rate: float) -> None:
        """One update on both sides: the norm that clips it, the weights and the optimizer state that it leaves."""
        norms = gather_over_world(engine.update(rate).norm.reshape(1).double()).flatten().tolist()
        tensors = engine.state_dict()
        weights: dict[str, Moved] = {}
        average: dict[str, Moved] = {}
        state: dict[str, Tensor | Moved] = {}
        if self.reference is not None:
            norm = self.reference.norm()
            error = max((relative(got, norm) for got in norms), key=lambda e: (e != e, e))
            self._row(f"{name}: gradient norm", self.allowed.norm, {"": error})
            self._row(f"{name}: norm across ranks", 0.0, {"": relative(max(norms), min(norms))})
            weights, average, state = self._moved(self.reference, rate)
        for what, want, tolerance in (
            ("weights", weights, self.allowed.weights),
            ("average", average, self.allowed.weights),
            ("state", state, self.allowed.state),
        ):
            self._compare(f"{name}: {what}", _part(tensors, what), want, tolerance, adopt=True)

    def _moved(
        self, reference: Reference, rate: float
    ) -> tuple[dict[str, Moved], dict[str, Moved], dict[str, Tensor | Moved]]:
        """The reference's update, of the weights, of their average and of the optimizer, by the names of engines."""
        # The step of Adafactor takes the place of the gradient.
        gradients = {n: torch.ones_like(t) for n, t in reference.values.items()}  # what is frozen must not move at all
        gradients |= {n: g.clone() for n, g in reference.gradients().items()}
        before = {n: t.clone() for n, t in self._stepwise(reference).items()}
        reference.update(rate)
        after = self._stepwise(reference)
        moved = {n: Moved(after[n], t, gradients[_parameter(n)], _rounding(n, after[n])) for n, t in before.items()}
        state = {**reference.state(), **_part(moved, "state")}
        return _part(moved, "weights"), _part(moved, "average"), state

    def _stepwise(self, reference: Reference) -> dict[str, Tensor]:
        """What moves by steps whose size is not that of the gradient: weights, averages, the momentum of Adafactor."""
        kept = {f"model.{n}": t for n, t in reference.values.items()}
        kept |= {f"average.{n}": t for n, t in reference.average.items()}
        if self.config.optim.kind == "adafactor":
            kept |= {n: t for n, t in reference.state().items() if n.startswith("optimizer.exp_avg.")}
        return kept

    def _batches(self, update: int) -> list[Batch]:
        """This rank's micro-batches of a global batch."""
        first = self.world.rank * self.config.micro_batches * self.images
        starts = range(first, first + self.config.micro_batches * self.images, self.images)
        return [parity_batch(self.config, update, range(s, s + self.images)).to(self.device) for s in starts]

    def _compare(
        self,
        what: str,
        got: Mapping[str, Tensor],
        want: Mapping[str, Tensor | Moved],
        tolerance: float,
        *,
        adopt: bool = False,
    ) -> None:
        """One tensor at a time, gathered by all ranks in the same order and freed before the next, or adopted by the reference."""
        measured: dict[str, float] = {}
        copies: dict[str, float] = {}
        least = least_sizes(want, self.allowed.share)
        for i, (name, tensor) in enumerate(got.items()):
            self.say(f"comparing {what}, {i + 1} of {len(got)}")
            whole = global_values(tensor)
            marks = gather_over_world(fingerprint(whole))
            copies[name] = float((marks != marks[0]).any(1).sum().item())
            if self.reference is not None and name in want:
                measured[name] = apart(whole, want[name], least[name])
                if adopt and measured[name] < math.inf and not name.endswith(".updates"):
                    self.reference.adopt(name, whole)
        # What only one side has is infinitely far.
        names = [*want, *(name for name in got if name not in want)]
        self._row(what, tolerance, {name: measured.get(name, math.inf) for name in names})
        self._row(f"{what}, copies", 0.0, copies)

    def _row(self, what: str, tolerance: float, errors: dict[str, float]) -> None:
        if self.reference is not None and errors:
            self.rows.append(Row(what, tolerance, {_shown(name): error for name, error in errors.items()}))

    def _of_rank_0(self, number: Callable[[Reference], float]) -> float:
        """What the reference says, on all ranks."""
        value = torch.tensor(number(self.reference) if self.reference else 0.0, dtype=torch.float64)
        return sum_over_world(value.to(self.device)).item()


def _soft_error(layer: MoE, x: Tensor, parameters: Mapping[str, Tensor]) -> float:
    """Of both weightings."""
    got, wanted = layer.router(x), plain_weights(layer.config, parameters, x.double())
    return max(distance(a, b) for a, b in zip((got.dispatch, got.combine), wanted, strict=True))


KINDS = {"weights": ("model.",), "average": ("average.",), "state": ("optimizer.", "average.updates")}
T = TypeVar("T")


def _part(tensors: Mapping[str, T], what: str) -> dict[str, T]:
    """Those of an engine's tensors that are weights, averages or state; the count of averages is state."""
    counted = "average.updates"
    return {n: t for n, t in tensors.items() if n.startswith(KINDS[what]) and (n != counted or what == "state")}


def _shown(name: str) -> str:
    """A tensor's name beside the row that says what of it is meant."""
    return name if name.endswith(".updates") else name.removeprefix("model.").removeprefix("average.")


def _parameter(name: str) -> str:
    """The parameter that `model.<name>`, `average.<name>` or `optimizer.<key>.<name>` belongs to."""
    return name.split(".", 2 if name.startswith("optimizer.") else 1)[-1]


def _rounding(name: str, tensor: Tensor) -> float:
    rounds = AVERAGE_ROUNDS if name.startswith("average.") else UPDATE_ROUNDS
    return rounds * ROUNDING.get(tensor.dtype, ROUNDING[torch.float32])  # float64 stands for what float32 stores
