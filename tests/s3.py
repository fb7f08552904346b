"""This file owns a real S3 server on this machine, for tests that read from one or write to one."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports


@contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """The environment in which s3:// is moto's server, which writes its log to `log`; raises TimeoutError where it does not come up."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=file
        )
        try:
            _wait_for(url)
            yield {
                "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
        finally:
            process.kill()
            process.wait()


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
