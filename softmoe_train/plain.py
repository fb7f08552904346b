"""This file owns how a name or a reason from outside is shown: on one line, without what steers a terminal, and not without end."""

from collections.abc import Iterable, Sequence

_LONGEST = 240  # characters


def plain(text: object, longest: int = _LONGEST) -> str:
    """`text` with each character that does not print written as its escape, and the middle of a long one left out."""
    text = str(text)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def the_first(words: Sequence[str], most: int) -> str:
    """The first `most` of some words and how many more there are, as in `a, b and 3 more`."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def ranks_in_words(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-4, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'' if spans == [str(runs[0][0])] else 's'} {', '.join(spans)}"


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
