"""Which decoder a request's parameters ask for.

This module does not know how any of them decodes.
"""

from __future__ import annotations

from handloom.cache.sequence import Sequence
from handloom.decoding.beam import BeamDecoder
from handloom.decoding.sample import SampleDecoder
from handloom.decoding.samples import SamplesDecoder
from handloom.errors import UnsupportedOption
from handloom.sampling.params import GenerationParams
from handloom.text.tokenizer import Tokenizer

RequestDecoder = SampleDecoder | SamplesDecoder | BeamDecoder


def make_decoder(
    sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, *, owns_sequence: bool = True
) -> RequestDecoder:
    """The decoder for a prompt. Raises UnsupportedOption for several outputs of a sequence of the caller's."""
    if params.num_beams == params.num_return_sequences == 1:
        return SampleDecoder(sequence, params, tokenizer, owns_sequence=owns_sequence)
    if not owns_sequence:
        option = "num_beams" if params.num_beams > 1 else "num_return_sequences"
        raise UnsupportedOption(
            f"{option}={getattr(params, option)}: a sequence goes on in place, in one way; pass its token_ids"
        )
    return (BeamDecoder if params.num_beams > 1 else SamplesDecoder)(sequence, params, tokenizer)
