"""The adapter of ONNX Runtime GenAI against a stand-in with the calls that its manual documents, and no others."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from handloom.measure.worker_process import WORKERS

ADAPTER = WORKERS / "onnxruntime_engine.py"
EOS, VOCABULARY = 3, 11


class Config:
    def __init__(self, path: str) -> None:
        self.settings = json.loads((Path(path) / "genai_config.json").read_text())

    def overlay(self, text: str) -> None:
        def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, dict):
                    merge(into.setdefault(name, {}), value)
                else:
                    into[name] = value

        merge(self.settings, json.loads(text))


class Model:
    def __init__(self, config: Config) -> None:
        self.settings = config.settings


class GeneratorParams:
    def __init__(self, model: Model) -> None:
        self.options = {"batch_size": 1, "min_length": 0, "max_length": 8, "num_beams": 1, "do_sample": True}

    def set_search_options(self, **options: float) -> None:
        assert {*options} <= {*self.options}
        self.options.update(options)


class Generator:
    """The next token is the sum of all so far; one that would be eos is the next id while the least length is ahead."""

    def __init__(self, model: Model, params: GeneratorParams) -> None:
        self.options, self.rows = params.options, np.empty((params.options["batch_size"], 0), np.int32)

    def append_tokens(self, tokens: np.ndarray) -> None:
        assert tokens.dtype == np.int32 and tokens.flags.c_contiguous
        self.rows = np.concatenate([self.rows, tokens.reshape(len(self.rows), -1)], axis=1)

    def is_done(self) -> bool:
        return self.rows.shape[1] >= self.options["max_length"] or bool((self.rows[:, -1] == EOS).any())

    def generate_next_token(self) -> None:
        assert not self.is_done()
        tokens = self.rows.sum(axis=1) % VOCABULARY
        if self.rows.shape[1] < self.options["min_length"]:
            tokens = np.where(tokens == EOS, EOS + 1, tokens)
        self.rows = np.concatenate([self.rows, tokens[:, None].astype(np.int32)], axis=1)

    def get_sequence(self, row: int) -> np.ndarray:
        return self.rows[row]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    classes = {"Config": Config, "Model": Model, "GeneratorParams": GeneratorParams, "Generator": Generator}
    module = SimpleNamespace(**classes, __version__="0.18.0")
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", module)
    folder = tmp_path / "onnxruntime-fp32"
    folder.mkdir()
    decoder = {"session_options": {"log_id": "onnxruntime-genai"}, "num_hidden_layers": 2}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}, "search": {}}))
    made = runpy.run_path(str(ADAPTER))["Engine"]
    return lambda precision: made(
        model="m", files=str(tmp_path), precision=precision, threads=2, max_batch=2, max_tokens=9
    )


def test_every_prompt_gets_its_tokens_past_eos_and_none_of_another(engine: Any) -> None:
    one = engine("fp32")
    assert one.about == {"held": "fp32", "version": "0.18.0"}
    prompts = [[1, 2, 1], [1, 1, 1], [5, 0, 4]]
    together = one.run(prompts=prompts, new_tokens=5)
    assert [len(tokens) for tokens in together] == [5, 5, 5]
    assert together == [one.run(prompts=[prompt], new_tokens=5)[0] for prompt in prompts]
    assert together[1][0] == EOS + 1, "the sum is eos"


def test_it_computes_in_as_many_threads_as_the_others(engine: Any) -> None:
    decoder = engine("fp32").model.settings["model"]["decoder"]
    assert decoder["session_options"]["intra_op_num_threads"] == 2
    assert decoder["num_hidden_layers"] == 2


def test_a_precision_that_nobody_built_is_left_out_with_a_line(engine: Any) -> None:
    with pytest.raises(SystemExit, match=r"no folder onnxruntime-int8 in --peer-models; .*builder makes it"):
        engine("int8")
