"""What of transformers' `generate` is not here, and why; and what is worth knowing of what is. Data alone.

The errors that refuse an option and the table in docs/generate.md are made of these words, so neither can go stale.

This module does not know how an option is checked or what it does.
"""

from __future__ import annotations

_SAME_TOKENIZER = "a draft model must have the same tokenizer as the model"
_CACHE = "there is one paged KV cache, whose size is `kv_cache_tokens` of `LM.from_pretrained`"
_COMPILE = "nothing here is compiled by torch.compile"
_PROMPT = "give it to `lm.generate`; an engine takes one prompt, its first argument"
_RAGGED = "nothing is padded, so nothing has to be masked"

# Options of transformers that are refused by name unless their value asks for nothing.
WHY_NOT: dict[str, str] = {
    # fields of GenerationConfig
    "use_cache": "the engine lives on its KV cache",
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": "the engine chunks long prompts by itself: `max_step_tokens` of `Engine`",
    "compile_config": _COMPILE,
    "continuous_batching_config": "every call is batched continuously: see `Engine`",
    "use_mtp": "no family here has layers that predict several tokens; draft with `assistant_model`",
    "speculation_type": "it names drafters that were trained for one model; give `assistant_model` or `speculation`",
    "is_assistant": "transformers sets it on its draft model; an `assistant_model` needs no mark here",
    "assistant_early_exit": "a model does not draft for itself with its first layers; give a smaller `assistant_model`",
    "assistant_lookbehind": _SAME_TOKENIZER,
    "assistant_ensemble_weight": "it accepts tokens that the model alone would not have chosen",
    "target_lookbehind": _SAME_TOKENIZER,
    "decoder_start_token_id": "there are no encoder-decoder models here",
    # arguments of generate
    "synced_gpus": "it keeps processes of a training run in step; one process runs a model here",
    "negative_prompt_attention_mask": _RAGGED,
    "custom_generate": "no code that came with a model ever runs",
    # what generate hands on to the model or to a criterion
    "tokenizer": "an LM has its own",
    "assistant_tokenizer": _SAME_TOKENIZER,
    "trust_remote_code": "no code that came with a model ever runs",
    "position_ids": "positions are counted from 0, whatever the batch",
    "past_key_values": "`lm.sequence` keeps its cache; `lm.generate(sequence)` goes on from it",
    "logits_to_keep": "only the last position's logits are computed; `prompt_logprobs` asks for the others",
}

# Arguments that `lm.generate` itself takes, and that no engine has a use for.
OF_LM: dict[str, str] = {
    "inputs": _PROMPT,
    "input_ids": _PROMPT,
    "inputs_embeds": _PROMPT,
    "attention_mask": "it is about `input_ids` of `lm.generate`; any other prompt has no padding to hide",
    "streamer": "give it to `lm.generate` or `lm.stream`; an engine hands out events as they come",
}

# What other libraries call it, and what it is here.
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict", "num_predict"), "max_new_tokens"),
    **dict.fromkeys(("n", "best_of", "num_samples"), "num_return_sequences"),
    "min_tokens": "min_new_tokens",
    "ignore_eos": "eos_token_id=None",
    "stop_token_ids": "eos_token_id, with the model's own among them",
    "beam_width": "num_beams",
    "logit_bias": "sequence_bias, as [[[token_id], bias], ...]",
    "bad_words": "bad_words_ids",
    "allowed_token_ids": "prefix_allowed_tokens_fn",
    "repeat_penalty": "repetition_penalty",
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty"), "repetition_penalty, or a logits_processor that does just that"
    ),
    "top_logprobs": "logprobs",
    **dict.fromkeys(("guided_json", "response_format"), "json_schema"),
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
    "structured_outputs": "json_schema, regex, grammar or choices",
    "draft_model": "assistant_model",
    "sampling_params": "an argument for each option: generate(prompt, temperature=0.8)",
    **dict.fromkeys(("prompt", "text"), "the first argument"),
    "messages": "lm.chat(messages)",
    "stream": "lm.stream(prompt)",
    **dict.fromkeys(("echo", "return_full_text"), "prompt + output.text: an output has the new text alone"),
}

# Fields that are accepted and change nothing.
NO_EFFECT: dict[str, str] = {
    "bos_token_id": "an empty prompt starts with the tokenizer's",
    "return_dict_in_generate": "an Output always has everything that was asked for",
    "disable_compile": _COMPILE,
    "low_memory": "candidates of contrastive search share their pages",
    "transformers_version": "says who wrote the file",
}

# What is different, or not obvious, about options that work.
NOTES: dict[str, str] = {
    "max_length": "counts the prompt, healed if that is asked for; max_new_tokens wins over it",
    "max_new_tokens": "20 where nothing is said; past the context it is refused, from a model's file cut",
    "min_length": "counts the prompt",
    "stop_strings": "or `stop`; as in transformers they stay in the text; `include_stop_text=False` cuts them off",
    "do_sample": "where it is left out or None, an explicit sampling option or seed turns it on, where transformers "
    "warns and stays greedy; without one the model's own counts, where transformers takes None for greedy",
    "temperature": "0 means greedy",
    "top_k": "50 when sampling and nothing is said, as in transformers; None or 0 for off",
    "eos_token_id": "one or several; None for none",
    "num_return_sequences": "outputs come as in transformers, in one list: all of the first prompt, then the next's",
    "num_beams": "up to 1024; beams fork pages, and the prompt runs once",
    "length_penalty": "refused without beams, which alone have a use for it",
    "early_stopping": "True, False or 'never'; refused without beams, which alone have a use for it",
    "prompt_lookup_num_tokens": "at most; fewer where acceptance does not pay. The tokens are those without it, also "
    "sampled. Candidates that a rule bans are not cut off first. Refused beside beams, several outputs, guidance and "
    "draws by rng='torch'",
    "max_matching_ngram_size": "2 where nothing is said; refused without prompt_lookup_num_tokens",
    "assistant_model": "an LM with the same tokenizer. The tokens are those without it: sampled ones are coupled by "
    "their noise, where transformers' depend on the drafts. Refused as prompt lookup is",
    "num_assistant_tokens": "at most; fewer where acceptance does not pay. An option of the request; transformers "
    "reads the assistant's own generation_config",
    "num_assistant_tokens_schedule": "the two heuristics are one here: each request starts anew",
    "assistant_confidence_threshold": "as given; transformers moves it where it finds scikit-learn. None or 0: off",
    "num_beam_groups": "tokens and scores of transformers 4.56, the last that had it; an output ends with the "
    "end-of-sequence token that came, where that wrote the first of several; refused beside sampling and stop_strings",
    "diversity_penalty": "above 0 with num_beam_groups above 1, and 0 without",
    "force_words_ids": "tokens and scores of transformers 4.56, as for num_beam_groups; what the prompt has counts; "
    "`Output.beams.fulfilled`; at most 1024 token ids; refused beside sampling, groups and stop_strings",
    "constraints": "PhrasalConstraint and DisjunctiveConstraint, of transformers up to 4.56; else force_words_ids",
    "pad_token_id": "nothing is padded; with num_beam_groups, a group that is over repeats it, and others keep away "
    "from it, as in transformers",
    "output_scores": "per step float32 [vocab_size], after the rules; under beams see `Output.beams`",
    "output_logits": "per step float32 [vocab_size], before the rules; under beams see `Output.beams`",
    "guidance_scale": "each output and its twin after the negative prompt run in one step; with beams every beam has "
    "its own twin, where transformers mixes them up; refused beside prompt_logprobs, and for a sequence to continue",
    "negative_prompt_ids": "token ids [n], or beside `input_ids` a tensor [batch, n]; or a text, `negative_prompt`; "
    "refused without a guidance_scale",
    "output_hidden_states": "per step and layer [n, hidden_size], all of the prompt at first; of a sequence, what is "
    "computed then",
    "output_attentions": "per step and layer [num_heads, n, context], whatever the backend",
    "penalty_alpha": "contrastive search as transformers 4.55 had it, over `top_k` candidates (50 if unsaid), "
    "none of which a rule forbids; refused beside sampling, beams, several outputs, guidance, DoLa, prompt_logprobs, "
    "and for a sequence to continue",
    "dola_layers": "as transformers 4.55 had it: 'low', 'high' or a list of layers that the model has; refused beside "
    "beams, several outputs, guidance, contrastive search and grammars",
    "token_healing": "before all else, greedily and by no other rule: the prompt's last token, or the last few which "
    "one token covers and goes past, give way to the likeliest token that has or begins with their text. As in "
    "transformers the one that was there gets 1.0 on top. Here nothing else may win, the prompt keeps its spaces and "
    "its bos, special tokens heal nothing. `Output.prompt_token_ids` are the healed ones, `text` begins with what they "
    "add. Refused beside a grammar, a custom_decoder, and for a sequence to continue",
    "sequence_bias": "biases up to 1e30 either way, or -inf; at most 2^20 token ids",
    "bad_words_ids": "a single eos among them is left out; at most 2^20 token ids",
    "encoder_repetition_penalty": "over the prompt's token ids; refused where they are embeddings, and beside beams or "
    "num_return_sequences, where transformers applies it to one sequence only",
    "encoder_no_repeat_ngram_size": "over the prompt's token ids; refused where they are embeddings",
    "forced_bos_token_id": "comes after a prompt of one token, as in transformers",
    "exponential_decay_length_penalty": "the power ends at 1e30, where Python's would overflow",
    "remove_invalid_values": "without it, a request with NaN logits ends with an error, the others go on",
    "watermarking_config": "a `Watermark` or `SynthID`, transformers' configs, or a dict of their fields",
    "generation_config": "a GenerationConfig or a mapping",
    "inputs": "another name of `input_ids`",
    "input_ids": "or as the first argument: tensors or lists [batch, n], which give a list of outputs, or one prompt "
    "[n]; also what a tokenizer returns, as keywords or as the first argument",
    "inputs_embeds": "instead of the first argument: [batch, n, hidden_size], or of one prompt [n, hidden_size]",
    "attention_mask": "of `input_ids` or `inputs_embeds`: what it hides is taken off, on either side, and no rule or "
    "limit counts it; a tensor of ids needs one where it has several rows, or a pad_token_id that is no eos",
    "logits_processor": "transformers' or any callable; one of a built-in class takes that one's place. Called for "
    "each output alone, [1, n] and [1, vocab_size]: one that keeps something between calls serves one output (`params` "
    "gives each prompt its own), and transformers' two that do are refused for several",
    "stopping_criteria": "transformers' or any callable; refused where one of transformers' classes would take the "
    "place of an option there, and says something else",
    "streamer": "transformers' own, or anything with put and end; for several prompts a list with one each; with beams "
    "it gets what cannot change any more; one that raises ends its own request",
    "prefix_allowed_tokens_fn": "called with the prompt's place in the call, and its ids; also with "
    "num_return_sequences, where transformers counts outputs",
}
