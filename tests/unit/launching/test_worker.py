import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "SOFTMOE", "RANK"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_worker_whose_launcher_has_gone_already_exits() -> None:
    done = run(
        """
        from softmoe_train.launching.worker import die_with_parent
        die_with_parent()
        print("alive")
        """,
        SOFTMOE_LAUNCHER_PID="999999999",
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, "")


def test_a_worker_dies_with_the_thread_that_started_it_and_not_before() -> None:
    done = run(
        """
        import subprocess, sys, threading, time
        worker = "from softmoe_train.launching.worker import die_with_parent; die_with_parent();"
        worker += "import time; print('up', flush=True); time.sleep(60)"
        hold, up = threading.Event(), threading.Event()
        started = []
        def start():
            started.append(subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE))
            started[0].stdout.readline()
            up.set()
            hold.wait()
        thread = threading.Thread(target=start)
        thread.start()
        assert up.wait(timeout=40)
        time.sleep(0.2)
        assert started[0].poll() is None
        hold.set()
        thread.join()
        assert started[0].wait(timeout=5) == -9
        """
    )
    assert done.returncode == 0, done.stderr


def test_without_a_launcher_of_ours_a_failed_worker_prints_its_rank_and_traceback(tmp_path: Path) -> None:
    program = """
        import sys
        from softmoe_train.launching.worker import run_worker
        def main():
            raise RuntimeError("expert 7 is on fire")
        sys.exit(run_worker(main))
    """
    done = run(program, RANK="3", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("rank 3 failed:\nTraceback")
    assert done.stderr.endswith("RuntimeError: expert 7 is on fire\n")
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]
    assert recorded["message"] == "RuntimeError: expert 7 is on fire"
    assert "in main" in recorded["extraInfo"]["py_callstack"]


def test_a_failed_worker_exits_although_a_thread_of_it_never_ends() -> None:
    done = run(
        """
        import sys, threading, time
        from softmoe_train.launching.worker import run_worker
        def main():
            threading.Thread(target=time.sleep, args=(60,)).start()
            print("out")
            raise RuntimeError("expert 7 is on fire")
        sys.exit(run_worker(main))
        """
    )
    assert (done.returncode, done.stdout) == (1, "out\n")
