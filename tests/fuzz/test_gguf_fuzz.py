"""Mutated GGUF bytes, all the way through config, weights and tokenizer: only HandloomError may come out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from gguf_files import ARCHITECTURES, QUANTIZABLE, architecture_keys, export, tokenizer_keys
from handloom.checkpoint.gguf import GGUFCheckpoint
from handloom.checkpoint.quantization import FORMATS, QuantizedRows
from handloom.errors import HandloomError
from tiny_models import TINY

NUMBERS = (0, 1, 2, 3, 9, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@cache
def model(family: str) -> PreTrainedModel:
    return TINY[family](**(QUANTIZABLE | {"num_hidden_layers": 1} if family != "gpt2" else {"n_layer": 1}))


@cache
def keys(family: str) -> dict[str, Any]:
    """Metadata of a small file with everything in it, and for gemma3 a SentencePiece tokenizer."""
    more: dict[str, Any] = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.unknown_token_id": 0}
    if family == "gemma3_text":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "\u2581", "  "]
        more |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 4 + [4],
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.merges": ...,
            "gemma3.attention.sliding_window_pattern": [True],
        }
    architecture = ARCHITECTURES[family]
    shape = {f"{architecture}.{key}": value for key, value in architecture_keys(model(family).config).items()}
    return {"general.architecture": architecture} | shape | tokenizer_keys() | more


def write(family: str, path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    storage = Storage.Q4_1 if family != "gpt2" else Storage.F16
    return export(model(family), path, storage, metadata=metadata, extra=tensors)


@cache
def honest(family: str, folder: Path) -> bytes:
    return write(family, folder / family, keys(family), {}).read_bytes()


texts = st.text(max_size=6) | st.sampled_from(["llama", "gpt2", "gemma3", "qwen2", "linear", "none", "yarn", "default"])
floats = st.floats(width=32, allow_nan=True) | st.just(1.0)
junk = (
    st.sampled_from(NUMBERS)
    | st.integers(-3, 400)
    | floats
    | st.booleans()
    | texts
    | st.lists(texts, min_size=1, max_size=4)
    | st.lists(st.integers(-9, 9), min_size=1, max_size=4)
    | st.lists(floats, min_size=1, max_size=4)
    | st.lists(st.booleans(), min_size=1, max_size=4)
)
more_keys = st.sampled_from(
    "rope.scaling.type rope.scaling.factor rope.scale_linear rope.freq_base_swa attention.sliding_window_pattern "
    "attention.sliding_window final_logit_softcapping expert_count vocab_size new_key".split()
)
more_tokenizer_keys = st.sampled_from(
    ["ggml.scores", "ggml.add_space_prefix", "ggml.add_eos_token", "ggml.eot_token_id", "chat_template.other"]
)


@st.composite
def edits(draw: st.DrawFn, family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata with one to three values replaced, lists among them edited, and perhaps a tensor replaced or added."""
    metadata = dict(keys(family))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from(sorted(metadata))
            | more_keys.map(lambda key: f"{ARCHITECTURES[family]}.{key}")
            | more_tokenizer_keys.map(lambda key: f"tokenizer.{key}")
        )
        value = metadata.get(key)
        if isinstance(value, list) and draw(st.booleans()):
            value = list(value)
            at = draw(st.integers(0, len(value) - 1))
            value[at] = value[draw(st.integers(0, len(value) - 1))] if draw(st.booleans()) else type(value[at])(7)
            metadata[key] = value[: draw(st.sampled_from([len(value)] * 3 + [at + 1]))]
        else:
            metadata[key] = draw(junk | st.just(...))
    tensors = {}
    if draw(st.integers(0, 3)) == 0:
        names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.bias", "output_norm.weight", "output.weight"]
        name = draw(st.sampled_from([*names, "rope_freqs.weight", "blk.1.attn_q.weight", "x", "blk.0.attn_qkv.weight"]))
        shape = draw(st.lists(st.sampled_from([1, 2, 7, 8, 32, 96, 331]), min_size=1, max_size=4))
        tensors[name] = np.ones(shape[:3] if len(shape) > 2 else shape, draw(st.sampled_from([np.float32, np.float16])))
    return metadata, tensors


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """Up to four edits, mostly in the header: bytes, little-endian numbers, pieces cut out or repeated, the end cut."""
    data = bytearray(content)
    header = content.rindex(b"output_norm") if draw(st.booleans()) else min(3000, len(content))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(header, len(data)) - 1))
        kind = draw(st.sampled_from(["byte", "number", "number", "cut", "repeat", "end"]))
        if kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            width = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from(NUMBERS) | st.integers(0, 300))
            data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[draw(st.integers(1, len(data))) :]
        if not data:
            return b""
    return bytes(data)


def use(path: Path) -> None:
    """Everything that is done with a checkpoint."""
    checkpoint = GGUFCheckpoint.open(path, "fuzzed")
    try:
        for name, info in checkpoint.tensors.items():
            checkpoint.read_into(name, torch.empty(info.shape))
            if info.storage in FORMATS:
                checkpoint.read_quantized(name, QuantizedRows.empty(FORMATS[info.storage], *info.shape))
        if (tokenizer := checkpoint.tokenizer()) is not None:
            ids = tokenizer.encode("ab  12 \u00e9\U0001f600 <s>")
            text = tokenizer.decode(ids)
            assert tokenizer.hf.encode("ab  12 \u00e9\U0001f600 <s>") == ids
            assert tokenizer.hf.decode(ids, skip_special_tokens=True) == text
    finally:
        checkpoint.close()


@pytest.mark.parametrize("family", TINY)
def test_row10_the_unchanged_file_is_good(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"{family}.gguf"
    path.write_bytes(honest(family, tmp_path_factory.getbasetemp()))
    use(path)


@pytest.mark.parametrize("family", TINY)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_row10_mutated_files_give_only_handloom_errors(
    family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{family}.fuzzed.gguf"
    path.write_bytes(data.draw(mutations(honest(family, tmp_path_factory.getbasetemp()))))
    try:
        use(path)
    except HandloomError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("family", TINY)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_row10_well_formed_files_with_odd_values_give_only_handloom_errors(
    family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{family}.edited.gguf"
    write(family, path, *data.draw(edits(family)))
    try:
        use(path)
    except HandloomError as error:
        assert len(str(error)) < 2000
