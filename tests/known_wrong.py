"""What releases of transformers are known to get wrong, found by looking at the installed one."""

from __future__ import annotations

import inspect

from tokenizers import decoders
from transformers import PreTrainedTokenizerFast, WatermarkDetector, __version__
from transformers.generation import logits_process as hf

# Options that, where scores are -inf already, end in older releases with nothing allowed, or with NaN.
WRONG_ON_INFINITIES = {
    name
    for name, kind, mended in [
        ("prefix_allowed_tokens_fn", hf.PrefixConstrainedLogitsProcessor, "isneginf"),
        ("exponential_decay_length_penalty", hf.ExponentialDecayLengthPenalty, "isfinite"),
    ]
    if mended not in inspect.getsource(kind)
}

# Older releases count each n-gram as often as it comes up, whatever ignore_repeated_ngrams says.
COUNTS_REPEATED_NGRAMS = "tolist" not in inspect.getsource(WatermarkDetector._score_ngrams_in_passage)

# Older releases raise in assisted generation with models that attend to a window: their caches cannot go back.
ASSISTS_WITH_WINDOWS = tuple(map(int, __version__.split(".")[:2])) >= (5, 23)


def mend_decoder(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Older releases put a decoder of characters before that of bytes where a GGUF file has bytes.

    llguidance goes by the first.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if isinstance(decoder, decoders.Sequence) and "ByteLevel" in str(decoder):
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
