"""Where torch makes tensors elsewhere than on the host by default, nothing runs: an error says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines import all_free, lm_with
from handloom.errors import EngineError
from handloom.lm import LM
from tiny_models import save, tiny_llama


def test_another_default_device_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    lm, folder = lm_with(), save(tiny_llama(), tmp_path)
    expected = lm.generate([5, 6, 7], max_new_tokens=5).token_ids
    stream, sequence = lm.stream([5, 6, 7], max_new_tokens=5), lm.sequence([5, 6, 7])
    first = next(stream)
    with torch.device("meta"):
        for call in (
            lambda: lm.generate([5, 6, 7], max_new_tokens=5),
            lambda: lm.score([5, 6, 7]),
            lambda: sequence.logits,
            lambda: lm.step([sequence]),
            lambda: next(stream),
            lambda: LM.from_pretrained(folder),
        ):
            with pytest.raises(EngineError, match=r"default device is 'meta'.*set_default_device\('cpu'\)"):
                call()
    assert first.token_id == expected[0]
    assert lm.generate([5, 6, 7], max_new_tokens=5).token_ids == expected
    assert int(sequence.logits.argmax()) == expected[0]
    sequence.free()
    assert all_free(lm)
