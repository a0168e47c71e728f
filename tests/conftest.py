"""For every test: no model hub, and one thread per worker where several workers share the machine."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two pools of spinning threads on the same cores are many times slower than one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # before anything imports triton: without a GPU its interpreter runs the kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background makes them, and what they start, deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
