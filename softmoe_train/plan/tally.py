"""This file owns what a process holds and sends while torch runs: bytes alive, the most at once, and every collective.

It sees real tensors and fake ones alike, so that a plan and a measurement count the same things.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# In this order: a name may hold another. Bytes that a rank sends, of each byte given and times (n - 1) / n, by a ring.
KINDS = (
    ("alltoall", "all-to-all", 1), ("allreduce", "all-reduce", 2), ("allgather", "all-gather", 1),
    ("reducescatter", "reduce-scatter", 1), ("reduce", "reduce", 1), ("broadcast", "broadcast", 1),
)  # fmt: skip


class Collective(NamedTuple):
    """One collective that this process took part in."""

    kind: str
    ranks: tuple[int, ...]  # of its group, as the world numbers them
    given: int  # bytes of the whole that is exchanged, summed, gathered or scattered

    @property
    def off_rank(self) -> int:
        """Bytes that this rank sends to others; of a sum or a gather as the usual ring does it."""
        n = len(self.ranks)
        times = next(times for _, kind, times in KINDS if kind == self.kind)
        return times * self.given * (n - 1) // n

    def off_host(self, ranks_per_host: int) -> int:
        """Bytes that rank 0 sends to other hosts where all peers get equal parts, as in an exchange of slots."""
        away = sum(rank // ranks_per_host != 0 for rank in self.ranks)
        return self.given * away // len(self.ranks)

    def hosts(self, ranks_per_host: int) -> int:
        """Over how many hosts the group lies."""
        return len({rank // ranks_per_host for rank in self.ranks})


class Tally(TorchDispatchMode):
    """Adds up the storages that operators make, takes off those that die, and writes down collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.aside = False  # while true nothing is counted
        self.collectives: list[Collective] = []
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "Tally":
        self._fake = active_fake_mode() is not None
        # DTensor finds the global shape of a result by making it with fake tensors, in the mode that is there: that is no memory.
        self._lock = ShardingPropagator._fake_mode_lock
        ShardingPropagator._fake_mode_lock = _Aside(self)  # pyright: ignore[reportAttributeAccessIssue]
        tally, resize = self, torch.UntypedStorage.resize_
        self._resize = resize

        def resize_(storage: torch.UntypedStorage, size: int) -> None:  # FSDP2 frees and refills what it gathers
            resize(storage, size)
            if id(storage) in tally._sizes:
                tally._set(storage)

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ShardingPropagator._fake_mode_lock = self._lock
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with what lies on this rank
        if self.aside:
            return func(*args, **(kwargs or {}))
        # What was there before is not ours; with fake tensors the tally sees all from the start.
        inputs = () if self._fake else tree_leaves((args, kwargs or {}))
        known = {id(t.untyped_storage()) for t in inputs if isinstance(t, Tensor)}
        if self._fake and func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # the real one makes no tensor either
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._see(tensor.untyped_storage(), known)
        kind = _kind_of(str(func))
        if kind is not None:
            self.collectives.append(Collective(kind, _ranks_of(args), max(_bytes(arg) for arg in args)))
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = id(storage)  # one Python object for as long as the storage lives
        if key in self._sizes:
            self._set(storage)
        elif key not in known:
            self._sizes[key] = 0
            self._set(storage)
            weakref.finalize(storage, self._forget, key)

    def _set(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes() - self._sizes[id(storage)]
        self._sizes[id(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class _Aside:
    """In place of the lock under which DTensor plans an operator."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def __enter__(self) -> None:
        self.tally.aside = True

    def __exit__(self, *error: Any) -> None:
        self.tally.aside = False


def _kind_of(name: str) -> str | None:
    if not name.startswith(("c10d.", "_c10d_functional.", "_c10d_functional_autograd.")):
        return None
    plain = name.split(".")[1].replace("_", "")
    return next((kind for part, kind, _ in KINDS if part in plain), None)


def _bytes(arg: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor))


def _ranks_of(args: Iterable[Any]) -> tuple[int, ...]:
    """Of the group of a collective: functional ones are given its name, the others the group itself."""
    for leaf in tree_leaves(list(args)):
        name = leaf if isinstance(leaf, str) and leaf not in ("sum", "avg", "min", "max") else None
        if isinstance(leaf, torch.ScriptObject):
            try:
                name = dist.ProcessGroup.unbox(leaf).group_name
            except RuntimeError:  # the operator of a reduction
                continue
        if name is not None:
            group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]
            return tuple(dist.get_process_group_ranks(group))
    raise AssertionError(f"no group among {args}")
