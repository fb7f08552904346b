"""This file owns how a study is spoken to: words key=value, of keys that it knows, and lines that are seen at once."""

import sys


def options_of(words: list[str], known: dict[str, str]) -> dict[str, str]:
    """The values given over those `known`; exits with 2 and one message where a word is none of them."""
    odd = [word for word in words if "=" not in word or word.partition("=")[0] not in known]
    if odd:
        print(f"{' '.join(odd)}: there is no such option; write key=value with {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return known | dict(word.split("=", 1) for word in words)


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)
