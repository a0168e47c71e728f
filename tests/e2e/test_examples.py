"""The examples run, and what they show is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import handloom as hl
from engines import all_free, lm_with
from tiny_models import random_ids, save, tiny_llama

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_streaming_llm_reads_what_the_model_scores_and_keeps_no_more_than_it_says() -> None:
    lm, ids, held = lm_with(page_size=4), random_ids(1, 40), []
    step = lm.step

    def watched(sequences: list[hl.LiveSequence]) -> object:
        logits = step(sequences)
        held.append([sequence.num_cached for sequence in sequences])
        return logits

    lm.step = watched  # type: ignore[method-assign, assignment]
    losses = example("streaming_llm").read_along(
        lm, ids, {"all": (0, 40), "wide": (4, 36), "window": (0, 8), "sinks": (2, 6)}
    )
    assert losses["all"] == pytest.approx([-logprob for logprob in lm.score(ids).logprobs], abs=1e-4)
    assert losses["wide"] == losses["all"]
    assert losses["window"][:8] == losses["sinks"][:8] == pytest.approx(losses["all"][:8], abs=1e-4)
    assert losses["window"][8:] != losses["sinks"][8:] != losses["all"][8:]
    assert [max(counts) for counts in zip(*held, strict=True)] == [39, 39, 8, 8]
    lm.pool.forget_cached()
    assert all_free(lm)


def test_streaming_llm_draws_a_curve_for_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder, picture = save(tiny_llama(), tmp_path / "llama"), tmp_path / "curve.svg"
    sizes = ["--window", "12", "--max-tokens", "30", "--bin", "5"]
    example("streaming_llm").main(["--model", str(folder), *sizes, "--output", str(picture)])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[:3]] == [
        "full cache", "window of 12", "4 sinks + window of 8",
    ]  # fmt: skip
    assert "of the 17 tokens after the window" in said
    assert picture.read_text().count("<path") > 3


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert example("streaming_llm").perplexities([0.0, 2.0, 3.0], 2) == pytest.approx([2.718281828, 20.085536923])
