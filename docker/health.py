"""Healthy: the package and its torch import, and where the container was given GPUs the driver still answers for one.

The run itself is not looked at: it ends by itself when it fails or hangs (hang_limit), and the container with it. This makes no CUDA
context (which would take memory from the run), counts devices through NVML, runs at the lowest priority and in one thread.
"""

import glob
import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
os.nice(19)

import torch  # noqa: E402

import softmoe_train  # noqa: E402

given = glob.glob("/dev/nvidia[0-9]*") if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else []
seen = torch.cuda.device_count() if given else 0
print(f"softmoe_train {softmoe_train.__version__}, torch {torch.__version__}, {seen} GPUs seen, {len(given)} given")
sys.exit(1 if given and not seen else 0)
