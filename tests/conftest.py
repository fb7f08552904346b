"""Shapes that the annotations promise are checked at run time, in tests only; and it is told how many tests ran on a real SLURM."""

import pytest
from jaxtyping import install_import_hook

install_import_hook(["softmoe_train.model", "softmoe_train.parallel.exchange"], "beartype.beartype")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what CI asks for (.ci/run): skipped tests pass."""
    ran = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.nodeid.startswith("tests/slurm/") and report.when == "call"
    ]
    if ran:
        terminalreporter.write_line(f"tests on a real SLURM: {len(ran)} ran")
