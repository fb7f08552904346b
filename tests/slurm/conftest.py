"""One cluster for all tests of a session; every test here needs it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM of two nodes on this machine; skips where it is not installed."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with running_cluster() as cluster:
        yield cluster
