"""This file owns what the base of an image must hold before anything is installed over it, and what is installed then.

    python3 docker/beneath.py check [ACCEPTED]   refuse a base without the Python, pip or torch that we need (exit code 2)
    python3 docker/beneath.py pin                print the constraint that keeps pip from replacing the base's torch
    python3 docker/beneath.py wants [EXTRAS]     print what pyproject.toml requires beside torch, with these extras (a,b)
    python3 docker/beneath.py kept PIN           fail where torch is another than PIN, or no longer the base's own

Runs by the base's own Python, which may be an old one: it must at least be able to say so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

OLDEST_PIP = (22, 3)  # the first with --python, by which it installs into an environment without a pip of its own


def project() -> dict[str, object]:
    """The [project] table of the pyproject.toml beside us, or of the folder above."""
    import tomllib  # Python 3.11, which `check` has made sure of

    here = Path(__file__).resolve().parent
    found = next(p for p in (here / "pyproject.toml", here.parent / "pyproject.toml") if p.is_file())
    return tomllib.loads(found.read_text())["project"]


def version_of(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def allowed(version: str, rule: str) -> bool:
    """Whether a version is in a PEP 440 range; one before a release (2.11.0a0) is not in that release's."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # a plain base has it inside pip alone
        from pip._vendor.packaging.specifiers import SpecifierSet
    return SpecifierSet(rule).contains(version, prereleases=True)


def problems(accepted: str) -> list[str]:
    """Everything that is wrong with this base, each with its remedy."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this is what tells it
        return [f"its python3 is {sys.version.split()[0]}, and 3.11 to 3.13 will do: take a base with one of them"]
    pip = version_of("pip")
    if pip is None or tuple(int(part) for part in pip.split(".")[:2]) < OLDEST_PIP:
        return [f"its python3 has {'no pip' if pip is None else f'pip {pip}'}: install python3-pip, 22.3 or later"]
    found, wanted = [], project()
    if not allowed(sys.version.split()[0], str(wanted["requires-python"])):
        found.append(
            f"its python3 is {sys.version.split()[0]}, outside {wanted['requires-python']}: take a base inside it"
        )
    rule = next(r for r in wanted["dependencies"] if r.startswith("torch>")).removeprefix("torch")
    torch = version_of("torch")
    if torch is None:
        found.append(
            f"its python3 has no torch, and which build of it fits your machines we cannot know: make a base of it in two lines,\n"
            f"      FROM <this base>\n      RUN python3 -m pip install 'torch{rule}'\n"
            f"    with the index of the build that you want, or leave BASE out"
        )
    elif importlib.util.find_spec("torch") is None:
        found.append(f"it names torch {torch} and has no module of that name: take another base")
    elif not allowed(torch, rule) and torch != accepted:
        found.append(
            f"it carries torch {torch}, and torch{rule} is what we have tried; pip would put another torch over it, perhaps of another\n"
            f"    CUDA. Take another base, or keep its torch on your own responsibility: --build-arg ACCEPT_TORCH={torch}"
        )
    return found


def wants(extras: str) -> list[str]:
    """What pyproject.toml requires beside torch, with these extras; ValueError names one that does not exist."""
    table = project()
    optional = table["optional-dependencies"]
    rules = [rule for rule in table["dependencies"] if not rule.startswith("torch>")]
    for extra in filter(None, extras.split(",")):
        if extra not in optional:
            raise ValueError(f"EXTRAS={extras}: there is no {extra!r}; there are {', '.join(sorted(optional))}")
        rules += optional[extra]
    return rules


def kept(pin: str) -> list[str]:
    """What has become of the base's torch, seen from the environment that everything was installed into."""
    version, spec = version_of("torch"), importlib.util.find_spec("torch")
    if f"torch=={version}" != pin:
        return [f"torch was {pin} in the base, and is {version} now"]
    if spec is None or spec.origin is None or Path(spec.origin).is_relative_to(sys.prefix):
        return [f"torch is not the base's own any more: {spec and spec.origin}"]
    return []


def main(task: str, argument: str = "") -> int:
    """One task; returns the exit code."""
    if task == "pin":
        print(f"torch=={version_of('torch')}")
        return 0
    if task == "wants":
        try:
            print("\n".join(wants(argument)))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    found = problems(argument) if task == "check" else kept(argument)
    if not found:
        print(f"Python {sys.version.split()[0]}, pip {version_of('pip')}, torch {version_of('torch')}")
        return 0
    head = (
        "this base will not do, and nothing was installed over it"
        if task == "check"
        else "the base's torch was not kept"
    )
    print("\n  - ".join([f"{head}:", *found]), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
