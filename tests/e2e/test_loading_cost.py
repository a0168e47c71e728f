"""Loading a folder with its tokenizer, up to the first token, costs little more than its weights.

In a process of its own, for what a load imports is a part of its price; what `transformers.AutoTokenizer` imports by
itself, the most with transformers before 5.18, is not counted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import save, tiny_llama

LAYERS, HIDDEN, WIDTH = 8, 64, 100_000
LOAD = """
import sys
from pathlib import Path
import handloom as hl
import torch
from transformers import AutoTokenizer

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

torch.ones(8, 8) @ torch.ones(8, 8)
Path("/proc/self/clear_refs").write_text("5")
before, imported = status("VmRSS"), set(sys.modules)
lm = hl.LM.from_pretrained(sys.argv[1], dtype="float32")
print(status("VmHWM") - before)
lm.generate("one two", max_new_tokens=1)
print(*sorted(name for name in set(sys.modules) - imported if name.startswith("transformers.")))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bytes that loading half a GiB of weights added, and what of transformers was imported."""
    folder = save(
        tiny_llama(num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=WIDTH),
        tmp_path_factory.mktemp("large"),
    )
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_the_peak_of_a_whole_load_is_that_of_the_weights(printed: list[str]) -> None:
    weights = LAYERS * 3 * HIDDEN * WIDTH * 4
    assert 0.98 * weights < int(printed[0]) < 1.2 * weights


def test_nothing_of_transformers_own_models_is_imported(printed: list[str]) -> None:
    """Its configuration and generation modules bring in a thousand others: 200 MiB and more than a second."""
    imported = set(printed[1].split())
    assert not imported & {"transformers.models.llama", "transformers.modeling_utils", "transformers.generation.utils"}
