"""Writes docs/generate.md: every option of transformers' `generate`, and what becomes of it here.

    python docs/make_generate.py

The rows are the tables the code itself refuses and resolves options by, so the page says what the code does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from handloom.sampling.options import INERT, NO_EFFECT_IN_A_FILE, OURS
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import AFTER_THE_CALLERS, BEFORE_THE_CALLERS
from handloom.sampling.surface import ELSEWHERE, NO_EFFECT, NOTES, WHY_NOT

PAGE = Path(__file__).with_name("generate.md")
STRUCTURE = "`json_schema`, `regex`, `grammar` or `choices` (see [structured.md](structured.md))"
ARGUMENTS = (
    "generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn negative_prompt_ids assistant_model "
    "streamer inputs input_ids inputs_embeds attention_mask"
).split()
REFUSED_ARGUMENTS = (
    "synced_gpus negative_prompt_attention_mask custom_generate "
    "tokenizer assistant_tokenizer trust_remote_code position_ids "
    "past_key_values logits_to_keep"
).split()
PROOFS = {
    "generation_config": "test_generation_config.py",
    "logits_processor": "test_callers_processors.py",
    "stopping_criteria": "test_stopping.py",
    "prefix_allowed_tokens_fn": "test_rules_in_generate.py",
    "streamer": "test_streamers.py",
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask"), "test_batches_of_transformers.py"),
    "forced_bos_token_id": "test_rules_in_generate.py",
    "renormalize_logits": "test_rules_in_generate.py",
    "remove_invalid_values": "test_rules_in_generate.py",
    "num_return_sequences": "test_several_samples.py",
    "negative_prompt_ids": "test_guidance.py",
    **dict.fromkeys(
        (
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "assistant_model",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
        ),
        "test_speculation.py",
    ),
    "num_beam_groups": "test_group_beams.py",
    "diversity_penalty": "test_group_beams.py",
    "pad_token_id": "test_group_beams.py",
    "force_words_ids": "test_constrained_beams.py",
    "constraints": "test_constrained_beams.py",
    "penalty_alpha": "test_contrastive_and_dola.py",
    "dola_layers": "test_contrastive_and_dola.py",
    "token_healing": "test_token_healing.py",
    "output_scores": "test_scores_and_logprobs.py",
    "output_logits": "test_scores_and_logprobs.py",
    "output_hidden_states": "test_internals.py",
    "output_attentions": "test_internals.py",
}

INTRODUCTION = """\
<!-- Made by docs/make_generate.py; edit the tables in src/handloom/sampling/surface.py and run it again. -->

# `lm.generate` beside `model.generate`

`lm.generate(prompt, **options)` takes the options of transformers' `generate` under the same names, and gives the same
tokens, or an error that names the option; where a row says that something differs, above all `do_sample`, it does so by
design. Nothing is dropped in silence. An option that is not supported may still be said with the value that switches it
off, so that a `GenerationConfig` can be passed as it is.

Who wins: the caller's options, then a `generation_config` passed along, then the model's generation_config.json, then
transformers' global defaults. `None` switches a rule off.

The list is that of transformers 5.17 and 5.23, which have the same public fields. A field that only another release has
is known here by asking the installed one: it is refused by name. One that the installed release lacks stays in this
table and works all the same, as an option or in a mapping. Fields that begin with an underscore are bookkeeping.

In a prompt that is a string, as in `tokenizer(prompt)`, the text of a special token (`<|im_end|>`) is that token: such
prompts are often templates written by hand. In the messages of `lm.chat` and `lm.render_chat` it is text, and only what
the chat template writes is a control token: transformers does so with `sanitize_control_tokens=True`, here it takes
`sanitize_control_tokens=False` to change it. For a template of your own, `lm.tokenizer.encode(text,
add_special_tokens=False, split_special_tokens=True)` gives the ids of what others wrote.

The proof is a file of tests/parity, where tokens and scores are compared with transformers' own (and, for what is no
field and refused, of tests/unit).
"""


def supported() -> list[str]:
    """The fields of GenerationConfig that work."""
    return sorted(({field.name for field in fields(GenerationParams)} | {"constraints"}) - OURS)


def page() -> str:
    """The whole page."""
    config = [*supported(), *(name for name in WHY_NOT if name not in REFUSED_ARGUMENTS), *NO_EFFECT]
    return "\n".join(
        [
            INTRODUCTION,
            "## Fields of `GenerationConfig`\n",
            *_table(sorted(config)),
            "\n## Arguments of `generate`\n",
            *_table([*ARGUMENTS, *REFUSED_ARGUMENTS]),
            "\n## Order of the rules\n",
            "Scores pass these in turn; those after the caller's own processors run only where tokens are drawn, but "
            "for the next one and the last two.\n",
            *_rules(),
            "\n## Options of handloom's own\n",
            ", ".join(f"`{name}`" for name in sorted(OURS - set(ARGUMENTS))) + ": see `GenerationParams`.\n",
            "## Names of other libraries\n",
            "They are refused with the name that the option has here:\n",
            "| elsewhere | here |",
            "|---|---|",
            *(f"| {', '.join(f'`{name}`' for name in names)} | {here} |" for here, names in _elsewhere().items()),
            "",
        ]
    )


def _table(names: Iterable[str]) -> list[str]:
    return ["| option | | note | proof |", "|---|---|---|---|", *(_row(name) for name in names)]


def _row(name: str) -> str:
    if name in NO_EFFECT:
        return f"| `{name}` | no effect here | {NO_EFFECT[name]} | test_options.py |"
    if name in WHY_NOT:
        off = f"; off: `{INERT[name]!r}`" if name in INERT else ""
        in_file = "; in a model's file it has no effect" if name in NO_EFFECT_IN_A_FILE else ""
        proof = "test_generate_page.py" if name in REFUSED_ARGUMENTS else "test_options.py"
        return f"| `{name}` | not supported | {WHY_NOT[name]}{off}{in_file} | {proof} |"
    return f"| `{name}` | works | {NOTES.get(name, '')} | {PROOFS.get(name, 'test_options.py')} |"


def _elsewhere() -> dict[str, list[str]]:
    """What it is here -> what others call it."""
    found: dict[str, list[str]] = {}
    for name, here in ELSEWHERE.items():
        found.setdefault(here, []).append(name)
    return found


def _rules() -> list[str]:
    before = [f"`{rule.option}`" for rule in BEFORE_THE_CALLERS]
    after = [STRUCTURE if rule.option == "structure" else f"`{rule.option}`" for rule in AFTER_THE_CALLERS]
    steps = [*before, "the caller's `logits_processor`", *after]
    return [f"{number}. {step}" for number, step in enumerate(steps, 1)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
