"""Loading a folder with its tokenizer, up to the first token, costs little more than its weights.

In a process of its own, for what a load imports is a part of its price; what `transformers.AutoTokenizer` imports by
itself, the most with transformers before 5.18, is not counted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from handloom.ops.cpu import compiled_step
from tiny_models import save, tiny_llama

LAYERS, HIDDEN, WIDTH = 8, 96, 56_000
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
lm = hl.LM.from_pretrained(sys.argv[1], dtype="float32", backend=sys.argv[2], quantize=sys.argv[3] or None)
print(status("VmHWM") - before, sum(lm.held.values()))
lm.generate("one two", max_new_tokens=1)
print(*sorted(name for name in set(sys.modules) - imported if name.startswith("transformers.")))
"""


ALLOWED = {("torch", ""): 1.2, ("cpu", ""): 1.1, ("cpu", "int8"): 1.4}
"""Of the weights as they are held: 513, 513 and 131 MiB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    return save(model, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module", params=ALLOWED)
def loaded(request: pytest.FixtureRequest, folder: Path) -> tuple[tuple[str, str], list[str]]:
    """Backend and scheme; the bytes that loading added and those of weights, and what of transformers was imported."""
    compiled_step()  # once on a machine
    command = [sys.executable, "-c", LOAD, str(folder), *request.param]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return request.param, printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_the_peak_of_a_whole_load_is_that_of_the_weights(loaded: tuple[tuple[str, str], list[str]]) -> None:
    how, printed = loaded
    added, held = map(int, printed[0].split())
    assert held > LAYERS * 3 * HIDDEN * WIDTH * (1 if how[1] else 4)
    assert 0.98 * held < added < ALLOWED[how] * held


def test_nothing_of_transformers_own_models_is_imported(loaded: tuple[tuple[str, str], list[str]]) -> None:
    """Its configuration and generation modules bring in a thousand others: 200 MiB and more than a second."""
    imported = set(loaded[1][1].split())
    assert not imported & {"transformers.models.llama", "transformers.modeling_utils", "transformers.generation.utils"}
