"""Builds the image for real with buildah, which needs no daemon, and lives in it as a newcomer would; as root, on Linux.

    python -m tests.image.build base=IMAGE [volumes=/etc/pip.conf,/some/index] [store=FOLDER]

`base` is an image whose python3 carries torch: of a registry, or one made here (debootstrap, `ADD` to scratch, pip install torch). `volumes` are
files and folders of this machine that the build must see at the same place, read-only and never in the image: pip's configuration, a local index.
`store` keeps what is built, for `buildah --root FOLDER/root --runroot FOLDER/run`, and may hold the base; else a temporary folder does.
The quickstart runs as process 1 of a PID namespace, by the image's user; then one as a user without a name is asked to end, and resumed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs import ROOT

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# What a container engine mounts; $1 is the root, $2 user:group, the rest the command.
ENTER = """
set -e; root=$1 user=$2; shift 2
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=64m tmpfs "$root/dev"; mkdir -m 1777 "$root/dev/shm"
for name in {devices}; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
echo '127.0.0.1 localhost' >"$root/etc/hosts"
exec chroot "$root" /usr/bin/env -i {variables} setpriv --reuid "${{user%:*}}" --regid "${{user#*:}}" --clear-groups \
    --no-new-privs --inh-caps=-all --bounding-set=-all sh -c 'cd {work} && exec "$@"' - {entrypoint} "$@"
"""


class Image:
    """An image in the store of buildah in `folder`, with a writable layer above it in which commands run."""

    def __init__(self, folder: Path) -> None:
        self._buildah = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run")]
        self._container = ""
        self.root = Path()
        self.config: dict[str, list[str] | str] = {}

    def build(self, base: str, volumes: list[str]) -> None:
        """Every instruction of the Dockerfile."""
        mounts = [f"--volume={path}:{path}:ro" for path in volumes]
        command = ["bud", "--isolation", "chroot", "--format", "docker", f"--build-arg=BASE={base}", *mounts]
        subprocess.run([*self._buildah, *command, "-t", "softmoe", str(ROOT)], check=True)
        self._container = self._said("from", "localhost/softmoe")
        self.root = Path(self._said("mount", self._container))
        self.config = json.loads(self._said("inspect", "--type", "image", "localhost/softmoe"))["Docker"]["config"]

    def start(self, user: str, *command: str) -> subprocess.Popen[str]:
        """A command as process 1, started by the image's entrypoint."""
        enter = ENTER.format(
            devices=" ".join(DEVICES),
            variables=" ".join(self.config["Env"]),
            work=self.config["WorkingDir"],
            entrypoint=" ".join(self.config["Entrypoint"]),
        )
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private"]
        program = [*apart, "bash", "-c", enter, "-", str(self.root), user, *command]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def remove(self) -> None:
        """The writable layer; the store goes with its folder."""
        if self._container:
            subprocess.run([*self._buildah, "rm", self._container], check=True, stdout=subprocess.DEVNULL)

    def _said(self, *command: str) -> str:
        return subprocess.run([*self._buildah, *command], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextmanager
def built(base: str, volumes: list[str], store: Path) -> Iterator[Image]:
    """The image, for as long as the block lasts."""
    image = Image(store)
    try:
        begin = time.monotonic()
        image.build(base, volumes)
        print(f"built in {time.monotonic() - begin:.0f} s")
        yield image
    finally:
        image.remove()


def live(image: Image) -> None:
    """A newcomer's first hour: health, the quickstart, a stop, a resume; each must end as promised."""
    own = str(image.config["User"])
    expect(image.start(own, *image.config["Healthcheck"]["Test"][1:]), 0, "softmoe_train")
    expect(image.start(own, "softmoe", "train", "recipe=quickstart"), 0, "complete at step 660 of 660")
    shutil.rmtree(image.root / "home/softmoe")  # another user's container begins without the first one's caches
    (image.root / "home/softmoe").mkdir(mode=0o755)  # and may not write there
    line = ("softmoe", "train", "recipe=quickstart", "run_dir=runs/stopped", "observe.progress=plain")
    running = image.start("54321:0", *line)
    for _ in range(600):
        metrics = image.root / "work/runs/stopped/metrics.jsonl"
        if (
            metrics.is_file() and metrics.stat().st_size
        ) or running.poll() is not None:  # before its first step it saves nothing
            break
        time.sleep(0.5)
    (first,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)  # `docker stop`
    expect(running, 75, "interrupted by SIGTERM")
    expect(image.start("54321:0", *line, "stop_after=300"), 0, "resumed from runs/stopped/checkpoints/")


def expect(running: subprocess.Popen[str], code: int, words: str) -> None:
    """The end of a command: its code, and what it must have said."""
    said, _ = running.communicate(timeout=1800)
    if running.returncode != code or words not in said:
        raise SystemExit(f"{said}\nended with {running.returncode} and not {code}, or did not say {words!r}")
    print(f"ended with {code}: {next(line for line in said.splitlines() if words in line)}")


def main(arguments: list[str]) -> int:
    """Build and live; returns the exit code."""
    asked = dict(argument.split("=", 1) for argument in arguments)
    missing = [name for name in ("buildah", "unshare", "setpriv") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"not run: needs root and {', '.join(missing) or 'all that is here'}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="softmoe_image_") as folder:
        store = Path(asked.get("store", folder))
        with built(asked["base"], list(filter(None, asked.get("volumes", "").split(","))), store) as image:
            live(image)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
