"""This file owns listening to a layout: what its sparse routers decide in each micro-batch, gathered from all ranks."""

from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from softmoe_train.dist import gather_over_world
from softmoe_train.model.moe import MoE
from softmoe_train.model.sparse import Decisions, SparseRouting

T = TypeVar("T")


class Heard:
    """Inside a `with`, hears the sparse routers of `module`. Every rank must do the same."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        layers = {name: m for name, m in module.named_modules() if isinstance(m, MoE) and m.config.is_sparse}
        self.routers = {name: layer.router for name, layer in layers.items()}
        self.ranks = ranks
        self.last: dict[str, Decisions] = {}
        self.parts: list[list[dict[str, Decisions]]] = []  # by micro-batch and rank
        self.hooks: list[Any] = []

    def __enter__(self) -> "Heard":
        self.hooks = [router.register_forward_hook(partial(self._hear, name)) for name, router in self.routers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def after(self, value: T) -> T:
        """`value`, and keep what was decided on its way: call it after each micro-batch."""
        self.parts.append(self._of_all_ranks())
        return value

    def of_global_batch(self) -> list[dict[str, Decisions]]:
        """What was decided by part of the global batch, in its order, and by MoE layer; empty where no router is sparse."""
        return [part for of_rank in zip(*self.parts, strict=True) for part in of_rank]

    def _hear(self, name: str, router: nn.Module, given: Any, routing: SparseRouting) -> None:
        self.last[name] = routing.decisions

    def _of_all_ranks(self) -> list[dict[str, Decisions]]:
        assert self.last.keys() == self.routers.keys(), f"not heard: {self.routers.keys() - self.last.keys()}"
        found: list[dict[str, Decisions]] = [{} for _ in range(self.ranks)]
        for name, decisions in self.last.items():
            gathered = [None if t is None else gather_over_world(t) for t in decisions]
            for rank, of_rank in enumerate(found):
                of_rank[name] = Decisions(*(None if t is None else t[rank] for t in gathered))  # pyright: ignore[reportArgumentType]
        return found
