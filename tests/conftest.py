"""For every test: no model hub, one thread per worker where several workers share the machine, an interpreter of Triton
that works with the installed NumPy, and no GPU, unless it is asked for.

Tests are of the CPU, also where there is a GPU: neither they nor what they start sees it. With
HANDLOOM_TEST_DEVICE=cuda they see it, and kernels run there instead of in Triton's interpreter: for the tests that
benchmarks/gpu.sh names.
"""

from __future__ import annotations

import os
import signal

import pytest

from interpreter import mend_interpreter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two pools of spinning threads on the same cores are many times slower than one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TEST_DEVICE = os.environ.get("HANDLOOM_TEST_DEVICE", "cpu")
if TEST_DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"HANDLOOM_TEST_DEVICE={TEST_DEVICE}: expected cpu or cuda")
if TEST_DEVICE == "cpu":
    # before anything asks CUDA, or ROCm, what there is
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("HANDLOOM_TEST_DEVICE=cuda, and torch sees no GPU")
    os.environ["TRITON_INTERPRET"] = "0"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background makes them, and what they start, deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if os.environ["TRITON_INTERPRET"] != "0":
    mend_interpreter()
