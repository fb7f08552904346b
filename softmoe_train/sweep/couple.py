"""This file owns couplings: settings of a point that follow from others, by arithmetic that is read and never run as code."""

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from softmoe_train.asked import unread
from softmoe_train.config import flat
from softmoe_train.parallel.layout import listed
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.settings import SweepConfig

EXPERTS, SLOTS = "model.moe.num_experts", "model.moe.slots_per_expert"
LONGEST = 200  # characters of an expression
MOST = 10**18  # no number reaches it, on the way to a value or as one
FINEST = 10**90  # nor does what a number is a fraction of; as a float it is none yet
SIGNS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, two: Fraction(one // two),
}


class CoupleError(ValueError):
    """Why a coupling has no value."""


def coupling_problems(settings: SweepConfig, swept: list[str], given: list[str]) -> list[str]:
    """What is wrong with the couplings whatever the point; `swept` and `given` are keys of the line."""
    problems = []
    for key, expression in settings.couple.items():
        where = f"sweep.couple={{{key}: {expression!r}}}"
        if key in (*swept, *given):
            problems.append(f"{where}: {key} is given on the line too; leave one of them out")
        if key == SLOTS and settings.fixed_slots is not False:
            problems.append(f"{where}: sweep.fixed_slots decides {SLOTS} too; leave one of them out")
        try:
            read = keys_of(expression)
        except CoupleError as error:
            problems.append(f"{where}: {error}")
            continue
        problems += [
            f"{where}: {one} is coupled itself; write what it is coupled to" for one in read if one in settings.couple
        ]
    if settings.fixed_slots is False:
        return problems
    where = f"sweep.fixed_slots={str(settings.fixed_slots).lower()}"
    if SLOTS in swept:
        problems.append(f"{where}: {SLOTS} follows from {EXPERTS}, but it is swept too; sweep {EXPERTS} alone")
    elif SLOTS in given and settings.fixed_slots is not True:
        problems.append(f"{where}: {SLOTS} follows from it, but it is given too; leave it out")
    if EXPERTS not in swept and settings.fixed_slots is True:
        problems.append(f"{where} needs {EXPERTS} to be swept, as in {EXPERTS}=8,16,32")
    return problems


def coupled(settings: SweepConfig, config: RunConfig, base: Callable[[], RunConfig]) -> list[str]:
    """The overrides that follow for a point from its own `config`; `base` is that without the swept number of experts.

    Raises CoupleError that names key, values, rule and remedy.
    """
    found, values = {}, flat(config.model_dump())
    if settings.fixed_slots is not False:
        found[SLOTS] = values[SLOTS] = _slots(settings.fixed_slots, config, base)
    for key, expression in settings.couple.items():
        found[key] = _number(key, expression, values)
    words = [f"{key}={value}" for key, value in found.items()]
    read = unread(config.model, words)
    if read:
        raise CoupleError(f"{'; '.join(read)}: a coupling of it would do nothing{_sparse_slots(config, found)}")
    return words


def keys_of(expression: str) -> list[str]:
    """The keys that an expression reads; raises CoupleError for what is no arithmetic."""
    read: list[str] = []

    def look(key: str) -> Fraction:
        read.append(key)
        return Fraction(1)

    _evaluate(_parsed(expression), look, dividing=False)
    return read


def value_of(expression: str, values: Mapping[str, Any]) -> Fraction:
    """What an expression comes to; raises CoupleError."""

    def look(key: str) -> Fraction:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise CoupleError(f"{key} is {'no key of a run' if key not in values else f'{value}, which is no number'}")
        return _bounded(value, key)

    return _evaluate(_parsed(expression), look, dividing=True)


def _parsed(expression: str) -> ast.expr:
    if len(expression) > LONGEST:
        raise CoupleError(f"is longer than {LONGEST} characters")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CoupleError("is no arithmetic; write numbers, keys, + - * / // and brackets") from None


def _evaluate(node: ast.expr, look: Callable[[str], Fraction], *, dividing: bool) -> Fraction:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            return _bounded(value, ast.unparse(node))
        case ast.Name() | ast.Attribute():
            return look(ast.unparse(node))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, look, dividing=dividing)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in SIGNS:
            one, two = (_evaluate(side, look, dividing=dividing) for side in (left, right))
            if isinstance(sign, ast.Div | ast.FloorDiv) and not two:
                if dividing:
                    raise CoupleError(f"divides by {ast.unparse(right)}, which is 0")
                return one
            value = SIGNS[type(sign)](one, two)
            return _bounded(value, ast.unparse(node)) if dividing else value
    raise CoupleError(f"{ast.unparse(node)!r} is no arithmetic; write numbers, keys, + - * / // and brackets")


def _bounded(value: float | Fraction, what: str) -> Fraction:
    if abs(value) >= MOST:
        raise CoupleError(f"{what} is beyond {MOST:.0e}, which no setting is; use smaller numbers")
    exact = value if isinstance(value, Fraction) else Fraction(repr(value))  # 0.1 is a tenth, as it was written
    if exact.denominator >= FINEST:
        raise CoupleError(f"{what} is finer than 1/{FINEST:.0e}, which no setting is; use fewer digits")
    return exact


def _slots(fixed: bool | int, config: RunConfig, base: Callable[[], RunConfig]) -> int:
    moe = config.model.moe
    if fixed is True:
        without = base().model.moe
        total, why = (
            without.num_experts * without.slots_per_expert,
            f"{without.num_experts} x {without.slots_per_expert}",
        )
        where = f"sweep.fixed_slots=true ({why} = {total} slots without the swept {EXPERTS})"
    else:
        total, where = fixed, f"sweep.fixed_slots={fixed}"
    if total % moe.num_experts:
        legal = listed([n for n in range(1, total + 1) if total % n == 0])
        raise CoupleError(f"{EXPERTS}={moe.num_experts} does not divide {where}; use {legal}")
    return total // moe.num_experts


def _number(key: str, expression: str, values: Mapping[str, Any]) -> int | float:
    where = f"sweep.couple={{{key}: {expression!r}}}"
    if key not in values:
        raise CoupleError(f"{where}: there is no key {key}; `softmoe train --cfg job` prints every key")
    before = values[key]
    if before is not None and (isinstance(before, bool) or not isinstance(before, int | float)):
        raise CoupleError(f"{where}: {key}={before} is no number, so no arithmetic gives one")
    try:
        value = value_of(expression, values)
    except CoupleError as error:
        raise CoupleError(f"{where}: {error}") from None
    if isinstance(before, int) and value.denominator != 1:
        raise CoupleError(f"{where} gives {float(value):g}, but {key} is a whole number; use values that divide, or //")
    return int(value) if value.denominator == 1 and not isinstance(before, float) else float(value)


def _sparse_slots(config: RunConfig, found: Mapping[str, object]) -> str:
    if SLOTS not in found or not config.model.moe.is_sparse:
        return ""
    return (
        " (the capacity of a sparse router is model.moe.sparse.capacity_factor x tokens / experts: with any number of experts it has "
        "as many slots in all, so leave the coupling out)"
    )
