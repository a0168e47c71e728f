"""Which decoder a request's parameters ask for.

This module does not know how any of them decodes.
"""

from __future__ import annotations

from typing import get_args

from handloom.cache.sequence import Sequence
from handloom.decoding.beam import BeamDecoder
from handloom.decoding.branches import Branches
from handloom.decoding.constrained_beam import ConstrainedBeamDecoder
from handloom.decoding.contrastive import ContrastiveDecoder
from handloom.decoding.dola import DolaDecoder
from handloom.decoding.group_beam import GroupBeamDecoder
from handloom.decoding.guided import GuidedBranches
from handloom.decoding.healing import HealingDecoder, count_to_heal
from handloom.decoding.sample import SampleDecoder
from handloom.decoding.samples import SamplesDecoder
from handloom.decoding.score import ScoreDecoder
from handloom.decoding.speculative import SpeculativeDecoder, speculates
from handloom.errors import UnsupportedOption
from handloom.model.transformer import Transformer
from handloom.sampling.params import GenerationParams
from handloom.text.tokenizer import Tokenizer

RequestDecoder = (
    HealingDecoder
    | SampleDecoder
    | SpeculativeDecoder
    | SamplesDecoder
    | BeamDecoder
    | GroupBeamDecoder
    | ConstrainedBeamDecoder
    | ContrastiveDecoder
    | DolaDecoder
)
MODES = frozenset((*get_args(RequestDecoder), ScoreDecoder))


def make_decoder(
    sequence: Sequence,
    params: GenerationParams,
    tokenizer: Tokenizer | None,
    model: Transformer,
    *,
    owns_sequence: bool = True,
) -> RequestDecoder:
    """The decoder for a prompt. Raises UnsupportedOption for a sequence of the caller's where several take part,
    InvalidParam for layers that the model lacks."""
    if params.token_healing and (healing := _healing(sequence, params, tokenizer, model, owns_sequence)) is not None:
        return healing
    several = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0}
    asked = [option for option, neutral in several.items() if getattr(params, option) != neutral]
    if params.dola_layers:
        return DolaDecoder(sequence, params, tokenizer, model, owns_sequence=owns_sequence)
    if not asked:
        decoder = SpeculativeDecoder if speculates(params) else SampleDecoder
        return decoder(sequence, params, tokenizer, owns_sequence=owns_sequence)
    if not owns_sequence:
        raise UnsupportedOption(
            f"{asked[0]}={getattr(params, asked[0])}: a sequence goes on in place, in one way; pass its token_ids"
        )
    if params.penalty_alpha > 0:
        return ContrastiveDecoder(sequence, params, tokenizer)
    branches = Branches(sequence) if params.guidance_scale == 1.0 else GuidedBranches(sequence, params)
    kind: type[SamplesDecoder | BeamDecoder | GroupBeamDecoder | ConstrainedBeamDecoder] = SamplesDecoder
    if params.force_words_ids:
        kind = ConstrainedBeamDecoder
    elif params.num_beam_groups > 1:
        kind = GroupBeamDecoder
    elif params.num_beams > 1:
        kind = BeamDecoder
    return kind(sequence, params, tokenizer, branches)


def _healing(
    sequence: Sequence,
    params: GenerationParams,
    tokenizer: Tokenizer | None,
    model: Transformer,
    owns_sequence: bool,
) -> HealingDecoder | None:
    """What heals the prompt; None where nothing is to be healed. Raises UnsupportedOption, TokenizerError."""
    if not owns_sequence:
        raise UnsupportedOption("token_healing: a sequence goes on in place, as it is; pass its token_ids")
    if tokenizer is None:
        raise UnsupportedOption("token_healing needs the text of tokens, and this checkpoint has no tokenizer")
    ids = sequence.token_ids[sequence.num_embeddings :]
    if not ids:
        raise UnsupportedOption("token_healing is about the prompt's token ids, and this prompt is embeddings")
    count = count_to_heal(ids, tokenizer.extensions, has_before=sequence.num_embeddings > 0)
    if not count:
        return None
    return HealingDecoder(
        sequence, params, tokenizer.extensions, count, lambda healed: make_decoder(sequence, healed, tokenizer, model)
    )
