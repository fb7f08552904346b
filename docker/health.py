"""Healthy: the package and its torch could be imported, and where the container was given GPUs the driver answers for each that it counts.

The run itself is not looked at: it ends by itself when it fails or hangs (hang_limit), and the container with it. Nothing here takes
anything from it: files do not change, so the imports are tried once a container, and GPUs are asked through the driver's management
library (NVML), which makes no CUDA context. A look takes a few hundredths of a second.
"""

import ctypes
import glob
import subprocess
import sys
import tempfile
from pathlib import Path

TRIED = Path(tempfile.gettempdir(), "softmoe_imports")
IMPORTS = "import softmoe_train, torch; print('softmoe_train', softmoe_train.__version__, 'torch', torch.__version__)"


def imports() -> str:
    """What could be imported, tried at the first look; CalledProcessError where it cannot."""
    if not TRIED.is_file():
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.PIPE, text=True)
        TRIED.write_text(done.stdout)
    return TRIED.read_text().strip()


def silent(nvml: ctypes.CDLL) -> list[str]:
    """What the driver does not answer for; nothing where all is well."""
    count, device = ctypes.c_uint(), ctypes.c_void_p()
    for name, *arguments in (("nvmlInit_v2",), ("nvmlDeviceGetCount_v2", ctypes.byref(count))):
        error = getattr(nvml, name)(*arguments)
        if error:
            return [f"the driver: {name} says {error}"]
    if not count.value:
        return ["all GPUs: the driver counts none"]
    answers = [nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) for index in range(count.value)]
    return [
        f"GPU {index}: NVML error {error}" for index, error in enumerate(answers) if error
    ]  # 15: fallen off the bus


def main() -> int:
    """Print what was found; returns 0 for healthy and 1 for not, as Docker wants it."""
    try:
        said, lost = imports(), silent(ctypes.CDLL("libnvidia-ml.so.1")) if glob.glob("/dev/nvidia[0-9]*") else []
    except (OSError, subprocess.CalledProcessError) as error:
        said, lost = "", [str(error)]
    print("; ".join([said, *lost]))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
