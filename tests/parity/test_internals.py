"""Hidden states, attentions, K and V per step: those of generate(return_dict_in_generate=True), one prompt at a time;
and asking for them changes no bit of what other requests get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import handloom as hl
from engines import all_free, lm_in_float64
from handloom.collect import Collector
from handloom.decoding.decoder import FinishedEvent, TokenEvent
from parity_checks import BACKENDS, Pair, load_pair
from tiny_models import TINY, VOCAB_SIZE, random_ids, save

PROMPT = random_ids(2, 11)
ASKED = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
EOS = list(range(4, VOCAB_SIZE, 30))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": None, "max_new_tokens": 12},
    "sampling": {"do_sample": True, "top_k": 40, "eos_token_id": EOS, "max_new_tokens": 12},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS, "max_new_tokens": 9},
    "beams, no eos": {"num_beams": 2, "eos_token_id": None, "max_new_tokens": 9, "length_penalty": 0.0},
}
EAGER: dict[str, Pair] = {}


@pytest.fixture(params=sorted(TINY))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """transformers gives attention weights only where it computes them plainly."""
    family = request.param
    if family not in EAGER:
        EAGER[family] = load_pair(save(TINY[family](), tmp_path_factory.mktemp(family)), attention="eager")
    return EAGER[family]


def theirs(model: PreTrainedModel, prompt: list[int], options: dict[str, Any]) -> Any:
    return model.generate(torch.tensor([prompt]), return_dict_in_generate=True, **{"do_sample": False, **options})


def assert_equal(ours: Any, wanted: Any, what: str) -> None:
    """Nested tuples of tensors alike."""
    assert type(ours) is type(wanted) is tuple, what
    assert len(ours) == len(wanted), what
    for i, (mine, own) in enumerate(zip(ours, wanted, strict=True)):
        if isinstance(own, Tensor):
            torch.testing.assert_close(mine, own, rtol=2e-5, atol=2e-4, msg=lambda m, i=i: f"{what}[{i}]: {m}")
        else:
            assert_equal(mine, own, f"{what}[{i}]")


def assert_caches_equal(ours: DynamicCache, wanted: DynamicCache) -> None:
    assert type(ours) is DynamicCache
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in wanted.layers]
    assert ours.get_seq_length() == wanted.get_seq_length()
    for i, (mine, own) in enumerate(zip(ours.layers, wanted.layers, strict=True)):
        assert_equal((mine.keys, mine.values), (own.keys, own.values), f"layer {i}")


@pytest.mark.parametrize("mode", MODES)
def test_all_outputs_are_those_of_generate(pair: Pair, mode: str) -> None:
    options = {**ASKED, **MODES[mode]}
    torch.manual_seed(5)
    wanted = theirs(pair.hf, PROMPT, options)
    torch.manual_seed(5)
    rng = {"rng": "torch"} if options.get("do_sample") else {}
    outputs = pair.lm().generate([PROMPT], output_past_key_values=True, **options, **rng)
    for row, output in enumerate(outputs):
        ours = output.to_transformers()
        assert type(ours) is type(wanted)
        used = ours.sequences.shape[1]
        assert ours.sequences[0].tolist() == wanted.sequences[row, :used].tolist()
        for name in ("scores", "logits", "hidden_states", "attentions"):
            assert_equal(ours[name], wanted[name], name)
        assert_caches_equal(ours.past_key_values, wanted.past_key_values)
        beams = (
            {"beam_indices": (ours.beam_indices, wanted.beam_indices[row : row + 1])} if "num_beams" in options else {}
        )
        mine, own = (
            pair.hf.compute_transition_scores(
                out.sequences[at : at + 1], out.scores, **{name: both[which] for name, both in beams.items()}
            )
            for which, (out, at) in enumerate(((ours, 0), (wanted, row)))
        )
        torch.testing.assert_close(mine, own[:, : mine.shape[1]], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_them(pair: Pair, backend: str) -> None:
    options = {**ASKED, **MODES["greedy"]}
    ours = pair.lm(backend=backend).generate(PROMPT, **options).to_transformers()
    wanted = theirs(pair.hf, PROMPT, options)
    for name in ("hidden_states", "attentions"):
        assert_equal(ours[name], wanted[name], name)


def test_transformers_goes_on_from_our_cache(pair: Pair) -> None:
    """The K and V of our pages are as good as its own: the same tokens follow."""
    output = pair.lm().generate(PROMPT, max_new_tokens=6, eos_token_id=None, output_past_key_values=True)
    ids = torch.tensor([PROMPT + output.token_ids])
    cache = output.to_transformers().past_key_values
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(pair.hf.generate(ids, past_key_values=cache, **options), pair.hf.generate(ids, **options))


def test_each_is_given_where_it_was_asked_for(pair: Pair) -> None:
    for name in ("hidden_states", "attentions", "past_key_values"):
        output = pair.lm().generate(PROMPT, max_new_tokens=2, **{f"output_{name}": True})
        given = {other for other in ("hidden_states", "attentions", "past_key_values") if getattr(output, other)}
        assert given == {name}
        assert [key for key, value in output.to_transformers().items() if value is not None] == ["sequences", name]


def test_several_samples_have_their_own_after_one_prompt(pair: Pair) -> None:
    """Each output has what a request for its tokens alone would have."""
    lm = pair.lm()
    options = {"max_new_tokens": 6, "eos_token_id": EOS, "output_hidden_states": True, "output_attentions": True}
    outputs = lm.generate(
        PROMPT, num_return_sequences=3, seed=4, temperature=1.5, output_past_key_values=True, **options
    )
    for output in outputs:
        with torch.no_grad():
            out = pair.hf(torch.tensor([PROMPT + output.token_ids[:-1]]), output_hidden_states=True, use_cache=True)
        steps = output.to_transformers().hidden_states
        for layer, wanted in enumerate(out.hidden_states):
            assert_equal((torch.cat([step[layer] for step in steps], 1),), (wanted,), f"layer {layer}")
        assert_caches_equal(output.to_transformers().past_key_values, out.past_key_values)


def run_events(engine: hl.Engine, requests: list[int]) -> list[list[Any]]:
    told: dict[int, list[Any]] = {request: [] for request in requests}
    for event in engine.run():
        if isinstance(event, TokenEvent):
            told[event.request_id].append((event.token_id, event.logits, event.seen))
        elif isinstance(event, FinishedEvent):
            assert event.error is None
    return [told[request] for request in requests]


@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 7}, {"max_step_tokens": 5, "max_running": 2}], ids=str)
def test_chunks_and_company_change_nothing_and_others_keep_their_bits(pair: Pair, limits: dict[str, int]) -> None:
    lm = pair.lm()
    prompts = [random_ids(1, 9), PROMPT, random_ids(3, 20), PROMPT]
    plain = {"max_new_tokens": 6, "eos_token_id": None, "output_logits": True}
    asked = {**plain, **ASKED}
    free = lm.generate(prompts, **plain)
    alone = lm.generate(PROMPT, **asked)
    engine = hl.Engine(lm, **limits)
    requests = [engine.add_request(p, **(asked if i == 1 else plain)) for i, p in enumerate(prompts)]
    for i, (told, output) in enumerate(zip(run_events(engine, requests), free, strict=True)):
        assert [token for token, _, _ in told] == output.token_ids
        assert all(torch.equal(own, bits) for (_, own, _), bits in zip(told, output.logits, strict=True))
        if i != 1:
            assert all(seen.hidden_states is seen.attentions is None for _, _, seen in told)
            continue
        assert_equal(tuple(seen.hidden_states for _, _, seen in told), tuple(alone.hidden_states), "hidden states")
        assert_equal(tuple(seen.attentions for _, _, seen in told), tuple(alone.attentions), "attentions")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 3, "seed": 1}], ids=str)
@pytest.mark.parametrize("spill_bytes", [0, None])
def test_who_is_preempted_gets_the_same(options: dict[str, Any], spill_bytes: int | None) -> None:
    """Tokens that are computed again are not taken for new ones. Float64: see `lm_in_float64`."""
    roomy, tight = lm_in_float64(), lm_in_float64(26 if options else 16)
    asked = {"max_new_tokens": 14, "eos_token_id": [], **options}
    prompts = [random_ids(i, length) for i, length in enumerate((9, 14, 21))]
    expected = roomy.generate(prompts, output_hidden_states=True, output_attentions=True, **asked)
    engine = hl.Engine(tight, spill_bytes=spill_bytes)
    collector = Collector(engine)
    for prompt in prompts:
        collector.add(prompt, output_hidden_states=True, output_attentions=True, **asked)
    for _ in collector.pieces():
        pass
    assert engine.stats().num_preempted > 0, "nobody was stopped, so nothing was proven"
    for ours, wanted in zip(collector.outputs, expected, strict=True):
        assert ours.token_ids == wanted.token_ids
        for name in ("hidden_states", "attentions"):
            assert_equal(ours.to_transformers()[name], wanted.to_transformers()[name], name)
    assert all_free(tight)


def test_a_sequence_that_goes_on_has_those_of_what_was_computed_then(pair: Pair) -> None:
    lm = pair.lm()
    with lm.sequence(PROMPT) as sequence:
        first = lm.generate(sequence, max_new_tokens=3, eos_token_id=None, output_hidden_states=True)
        sequence.append([7, 8])
        second = lm.generate(
            sequence, max_new_tokens=2, eos_token_id=None, output_hidden_states=True, output_past_key_values=True
        )
        computed = sequence.token_ids[:-1]
    with torch.no_grad():
        out = pair.hf(torch.tensor([computed]), output_hidden_states=True, use_cache=True)
    assert [step[0].shape[0] for step in first.hidden_states] == [len(PROMPT), 1, 1]
    assert [step[0].shape[0] for step in second.hidden_states] == [3, 1]
    seen = torch.cat([step[-1] for step in (*first.hidden_states, *second.hidden_states)])
    assert_equal((seen,), (out.hidden_states[-1][0],), "final hidden states")
    assert_caches_equal(second.to_transformers().past_key_values, out.past_key_values)


def test_embeddings_as_a_prompt_have_them_too(pair: Pair) -> None:
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    options = {"max_new_tokens": 4, "eos_token_id": None, "output_hidden_states": True, "output_attentions": True}
    ours = pair.lm().generate(embeddings, **options).to_transformers()
    wanted = pair.hf.generate(inputs_embeds=embeddings[None], do_sample=False, return_dict_in_generate=True, **options)
    for name in ("hidden_states", "attentions"):
        assert_equal(ours[name], wanted[name], name)
