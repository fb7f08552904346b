"""This file owns what a person sees of a checkpoint: facts, sizes, files, the tree of tensors, settings, and a difference."""

import sys
from collections.abc import Iterator

import rich.box
import rich.console
import rich.table
import yaml

from softmoe_train.checkpoint.difference import Difference
from softmoe_train.checkpoint.inspect import Contents, Inspection, held_by_files, num_bytes, totals
from softmoe_train.checkpoint.manifest import JSON, StoredTensor

Branch = list[tuple[list[str], StoredTensor]]  # the parts of a name that are left, and the tensor


def print_inspection(inspection: Inspection) -> None:
    """All of it, the verdict last; faults go to standard error."""
    contents = inspection.contents
    print("\n".join(_facts(contents)), end="\n\n")
    _print_totals(contents)
    _print_files(contents)
    _print_tree(contents)
    if contents.config:
        print("config\n" + _indented(yaml.safe_dump(contents.config, sort_keys=False, allow_unicode=True)), end="\n\n")
    if inspection.difference is not None:
        _print_difference(contents, inspection.difference)
    if inspection.faults == []:
        chunks = sum(len(tensor.chunks) for tensor in contents.manifest.tensors.values())
        files = f"{len(contents.manifest.files):,} file{'' if len(contents.manifest.files) == 1 else 's'}"
        print(f"verified: {chunks:,} chunks in {files} cover every tensor, and every hash holds")
    elif inspection.faults:
        print(f"{contents.path} cannot be trusted:", file=sys.stderr)
        print("\n".join(f"  - {fault}" for fault in inspection.faults), file=sys.stderr)
    sys.stdout.flush()


def _facts(contents: Contents) -> Iterator[str]:
    loop, ranks = contents.loop, contents.mark.world
    yield f"{contents.path}"
    yield f"step           {contents.mark.step:,}"
    if isinstance(seen := loop.get("images_seen"), int):
        yield f"images seen    {seen:,}"
    if isinstance(cursor := loop.get("cursor"), dict):
        yield f"data position  {', '.join(f'{key} {value}' for key, value in cursor.items())}"
    if isinstance(best := loop.get("best"), dict):
        yield f"best           {best['rule']}: {best['value']:.6g} at step {best['step']}"
    yield f"saved by       {ranks:,} rank{'' if ranks == 1 else 's'}"


def _print_totals(contents: Contents) -> None:
    table = _table("kind", "tensors", "elements", "experts", "others", "bytes")
    for kind, total in totals(contents.manifest).items():
        sizes = (total.expert_bytes, total.other_bytes, total.expert_bytes + total.other_bytes)
        table.add_row(kind, f"{total.tensors:,}", f"{total.elements:,}", *map(_bytes, sizes))
    _print(table)


def _print_files(contents: Contents) -> None:
    table = _table("file", "bytes", "tensors", "experts")
    for file, held in held_by_files(contents.manifest).items():
        experts = ", ".join(f"{a}" if b == a + 1 else f"{a}..{b - 1}" for a, b in held.experts)
        table.add_row(file, _bytes(held.bytes), f"{held.tensors:,}", experts or "none")
    _print(table)


def _print_tree(contents: Contents) -> None:
    table = _table("tensor", "shape", "dtype", "bytes")
    branch = [(name.split("."), tensor) for name, tensor in contents.manifest.tensors.items()]
    for row in _rows(branch, 0):
        table.add_row(*row)
    _print(table)


def _rows(branch: Branch, depth: int) -> Iterator[tuple[str, str, str, str]]:
    """A line per name; what several names begin with is a line of its own, with its size, unless it is the only way on."""
    groups: dict[str, Branch] = {}
    for parts, tensor in branch:
        groups.setdefault(parts[0], []).append((parts[1:], tensor))
    for first, group in groups.items():
        name = first
        while len({tuple(parts[:1]) for parts, _ in group}) == 1 and group[0][0]:
            name = f"{name}.{group[0][0][0]}"
            group = [(parts[1:], tensor) for parts, tensor in group]
        shown = "  " * depth + name
        yield from (
            (shown, " x ".join(map(str, tensor.shape)) or "1", tensor.dtype, _bytes(num_bytes(tensor)))
            for parts, tensor in group
            if not parts
        )
        below = [(parts, tensor) for parts, tensor in group if parts]
        if below:
            yield shown, f"{len(below):,} tensors", "", _bytes(sum(num_bytes(tensor) for _, tensor in below))
            yield from _rows(below, depth + 1)


def _print_difference(contents: Contents, found: Difference) -> None:
    print(f"against {found.other}")
    for key, (here, there) in found.settings.items():
        print(f"  {key}={_value(here)} here, {_value(there)} there")
    for name in found.only_here:
        print(f"  {name} is only here")
    for name in found.only_there:
        print(f"  {name} is only there")
    for name, (here, there) in found.reshaped.items():
        print(f"  {name} is {here} here, {there} there")
    print(f"  {len(found.equal):,} tensors are equal to the last bit, {len(found.changed):,} are not", end="\n\n")
    if found.changed:
        table = _table("tensor", "relative", "largest")
        for name, change in found.changed.items():
            table.add_row(name, f"{change.relative:.2e}", f"{change.largest:.2e}")
        _print(table)


def _table(*columns: str) -> rich.table.Table:
    """One column of names to the left, the others to the right, no line broken."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _print(table: rich.table.Table) -> None:
    # As wide as it needs: a name that is cut or folded cannot be copied.
    width = rich.console.Console(file=sys.stdout, width=1000).measure(table).maximum
    rich.console.Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)
    print()


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} B"


def _value(value: JSON) -> str:
    return "null" if value is None else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())
