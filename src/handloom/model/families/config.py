"""Reading config.json with an allow-list: typed, bounded, and every key accounted for.

A family asks for each key it understands, with bounds. `finish()` then refuses every key that nobody
asked for, so that a choice the forward pass would not carry out can never be silently dropped.

This module does not know what any key means to a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from handloom.checkpoint.json_object import quote
from handloom.errors import ConfigError, UnsafeCheckpoint, UnsupportedModel

MAX_LAYERS, MAX_WIDTH, MAX_HEADS, MAX_HEAD_DIM, MAX_VOCAB, MAX_CONTEXT = 1024, 1 << 18, 1024, 1024, 1 << 22, 1 << 27

# Keys that say nothing about the forward pass: bookkeeping, training, token ids that other readers own.
INERT = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path
    _model_name_or_path use_cache
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id initializer_range
    initializer_factor task_specific_params return_dict output_hidden_states output_attentions
    chunk_size_feed_forward id2label label2id num_labels problem_type torchscript tokenizer_class prefix
    finetuning_task is_decoder gradient_checkpointing transformers.js_config auto_map pretraining_tp
    attention_dropout resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout unsloth_fixed unsloth_version is_llama_config
    cache_implementation _attn_implementation_autoset
    """.split()
)
# Present and harmless at these values only.
INERT_AT: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}
ATTENTION_IMPLEMENTATIONS = frozenset(
    (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "paged_attention")
)


class ConfigReader:
    """Typed access to one config.json (or a dict nested in it). Every method raises ConfigError.

    ignore_keys: keys that may be left unread, here and in nested dicts.
    """

    def __init__(self, values: Mapping[str, Any], where: str, ignore_keys: Iterable[str] = ()) -> None:
        self.values, self.where = values, where
        self._ignored = frozenset(ignore_keys)
        self._asked = set(self._ignored)

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; None counts as absent, as in transformers."""
        self._asked.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def fail(self, key: str, expected: str) -> ConfigError:
        said = "missing" if self.values.get(key) is None else quote(self.values[key])
        return ConfigError(f"{self.where}: {key} is {said}; expected {expected}")

    def integer(self, key: str, default: int | None = None, *, high: int = MAX_WIDTH) -> int:
        """From 1 to high."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.fail(key, f"an integer from 1 to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, high: float = 1e12) -> float:
        """A finite float in (0, high]."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise self.fail(key, f"a number above 0 and up to {high:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def one_of(self, key: str, choices: Mapping[str, Any], default: str | None = None) -> Any:
        """The entry of `choices` that the string value names. Raises UnsupportedModel for another string."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise UnsupportedModel(
                f"{self.where}: {key} is {quote(value)}; handloom computes only {', '.join(sorted(choices))}"
            )
        return choices[value]

    def strings(self, key: str, length: int) -> Sequence[str] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or not all(isinstance(v, str) for v in value):
            raise self.fail(key, f"a list of {length} strings")
        return value

    def nested(self, key: str) -> ConfigReader | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return ConfigReader(value, f"{self.where}: {key}", self._ignored)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids or none. Ids outside the vocabulary are left out: no model can ever choose them."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)

    def ignore(self, *keys: str) -> None:
        """Keys this family knows and that change nothing in the forward pass."""
        self._asked.update(keys)

    def finish(self, *, top_level: bool = True) -> None:
        """Refuse every key that was neither asked for nor known to be inert. Raises ConfigError."""
        for key, value in self.values.items():
            if key in self._asked:
                continue
            if top_level and re.fullmatch(r"_?attn_implementation(_internal)?", key):
                check_attention_implementation(value, self.where, key)
            elif top_level and key in INERT_AT:
                if value not in INERT_AT[key]:
                    raise UnsupportedModel(f"{self.where}: {key}={quote(value)} is not supported")
            elif not (top_level and key in INERT) and value is not None and value is not False:
                raise ConfigError(
                    f"{self.where}: {key}={quote(value)} is not understood, and a model that needs it would be "
                    f"computed wrongly; if it changes nothing, pass ignore_config_keys=[{key!r}]"
                )


def check_attention_implementation(value: object, where: str, key: str) -> None:
    """Only names of transformers' own implementations pass, and are ignored; a kernel repository is refused."""
    if not isinstance(value, str | None) or value not in ATTENTION_IMPLEMENTATIONS:
        raise UnsafeCheckpoint(
            f"{where}: {key}={quote(value)} asks for code from elsewhere; handloom never loads kernels named by a "
            "checkpoint; remove the key"
        )
