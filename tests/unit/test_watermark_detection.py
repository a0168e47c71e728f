"""Watermarks are found where they are, with the numbers of transformers' detectors, and not where they are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import SynthIDTextWatermarkLogitsProcessor, WatermarkDetector
from transformers.generation.watermarking import BayesianDetectorConfig, BayesianDetectorModel

from handloom.errors import InvalidPrompt
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import Row
from handloom.sampling.sampler import choose
from handloom.sampling.watermark import SynthID, Watermark
from handloom.sampling.watermark_detection import (
    detect_synthid,
    detect_watermark,
    synthid_flips,
    synthid_mask,
    synthid_posterior,
)
from known_wrong import COUNTS_REPEATED_NGRAMS

VOCAB, BOS, EOS = 300, 1, 2
KEYS = (654, 400, 836, 123, 340, 443, 597, 160, 57, 29)
WATERMARKS = [
    Watermark(bias=3.0),
    Watermark(bias=3.0, greenlist_ratio=0.5, hashing_key=7, context_width=3),
    Watermark(bias=5.0, seeding_scheme="selfhash", context_width=4),
]
SYNTHIDS = [
    SynthID(ngram_len=5, keys=KEYS),
    SynthID(ngram_len=2, keys=KEYS[:3], context_history_size=4),
    SynthID(ngram_len=3, keys=(*KEYS, -(2**50)), sampling_table_size=97, sampling_table_seed=3),
]


def text(config: Watermark | SynthID | None, length: int = 120, seed: int = 0) -> list[int]:
    """Tokens drawn from a flat model, with a watermark."""
    params = GenerationParams(max_new_tokens=length, do_sample=True, top_k=0, seed=seed, watermarking_config=config)
    row = Row(params, [5, 6, 7, 8, 9], 5)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        scores = torch.randn(1, VOCAB, generator=generator)
        row.token_ids = [*row.token_ids, choose(scores, [row]).token_ids[0]]
    return list(row.token_ids)


def plain_text(seed: int, low: int = 3) -> list[int]:
    return torch.randint(low, VOCAB, (90,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("config", [*WATERMARKS, *SYNTHIDS[:1]], ids=lambda config: repr(config)[:60])
def test_a_watermark_is_found_by_its_key_only(config: Any) -> None:
    marked, plain = text(config), text(None)
    if isinstance(config, SynthID):
        other = SynthID(ngram_len=config.ngram_len, keys=tuple(key + 1 for key in config.keys))
        with_key, with_another, without = (
            detect_synthid(marked, config), detect_synthid(marked, other), detect_synthid(plain, config)
        )  # fmt: skip
    else:
        other = Watermark(config.greenlist_ratio, config.bias, 12345, config.seeding_scheme, config.context_width)
        with_key, with_another, without = (
            detect_watermark(ids, key, VOCAB) for ids, key in ((marked, config), (marked, other), (plain, config))
        )
    assert with_key.z_score > 5 and with_key.p_value < 1e-6
    assert abs(with_another.z_score) < 3.5 and abs(without.z_score) < 3.5


@pytest.mark.parametrize("ignore_repeated_ngrams", [False, True])
@pytest.mark.parametrize("config", WATERMARKS, ids=lambda config: repr(config)[:60])
def test_green_tokens_are_counted_as_transformers_counts_them(config: Watermark, ignore_repeated_ngrams: bool) -> None:
    if ignore_repeated_ngrams and COUNTS_REPEATED_NGRAMS:
        pytest.skip("this release of transformers is known to be wrong here")
    theirs = WatermarkDetector(
        SimpleNamespace(bos_token_id=BOS, is_encoder_decoder=False, vocab_size=VOCAB),
        "cpu",
        {name: getattr(config, name) for name in Watermark.__dataclass_fields__},
        ignore_repeated_ngrams=ignore_repeated_ngrams,
    )
    for ids in (text(config, 40), plain_text(1), [BOS, *plain_text(2)], [5, 6] * 20, [BOS, 3, 4, 5, 6, 7]):
        wanted = theirs(torch.tensor([ids]), return_dict=True)
        score = detect_watermark(ids, config, VOCAB, bos_token_id=BOS, ignore_repeated_ngrams=ignore_repeated_ngrams)
        assert score.num_tokens_scored == wanted.num_tokens_scored[0]
        assert score.fraction == pytest.approx(wanted.green_fraction[0])
        assert score.z_score == pytest.approx(wanted.z_score[0])
        normal = torch.special.ndtr(torch.tensor(-score.z_score, dtype=torch.float64))
        assert score.p_value == pytest.approx(float(normal), rel=1e-9)


def their_synthid(config: SynthID) -> SynthIDTextWatermarkLogitsProcessor:
    fields = {name: getattr(config, name) for name in SynthID.__dataclass_fields__}
    return SynthIDTextWatermarkLogitsProcessor(**{**fields, "keys": list(config.keys)}, device=torch.device("cpu"))


@pytest.mark.parametrize("config", SYNTHIDS, ids=lambda config: repr(config)[:60])
def test_synthids_flips_masks_and_posterior_are_those_of_transformers(config: SynthID) -> None:
    theirs, depth = their_synthid(config), len(config.keys)
    model = BayesianDetectorModel(BayesianDetectorConfig(watermarking_depth=depth))
    with torch.no_grad():
        model.likelihood_model_watermarked.delta.normal_(generator=torch.Generator().manual_seed(1))
        model.likelihood_model_watermarked.beta.normal_(generator=torch.Generator().manual_seed(2))
        model.prior.fill_(0.3)
    parameters = model.likelihood_model_watermarked
    for ids in (text(config, 40), plain_text(1), [7, 8, 9] * 12, [*plain_text(3)[:40], EOS, 5, 6, 7]):
        tensor = torch.tensor([ids])
        flips, mask = synthid_flips(ids, config), synthid_mask(ids, config, eos_token_id=EOS)
        assert torch.equal(flips.long(), theirs.compute_g_values(tensor)[0])
        eos_mask = theirs.compute_eos_token_mask(tensor, EOS)[0, config.ngram_len - 1 :]
        assert torch.equal(mask.long(), theirs.compute_context_repetition_mask(tensor)[0] * eos_mask)
        with torch.no_grad():
            wanted = model(flips.long()[None], mask.long()[None])[0]
            ours = synthid_posterior(flips, mask, beta=parameters.beta[0, 0], delta=parameters.delta[0, 0], prior=0.3)
        assert ours == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)


def test_a_text_too_short_to_score_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match="context_width of 3"):
        detect_watermark([5, 6, 7], WATERMARKS[1], VOCAB)
    with pytest.raises(InvalidPrompt, match="ngram_len of 5"):
        detect_synthid([5, 6, 7, EOS, 8, 9, 10], SYNTHIDS[0], eos_token_id=EOS)
    with pytest.raises(InvalidPrompt):
        detect_synthid([], SYNTHIDS[0])
