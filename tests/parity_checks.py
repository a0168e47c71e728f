"""The same checkpoint twice: loaded by handloom and by transformers, and the two compared.

Nothing here knows which option or family a test is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import handloom as hl
from handloom import ops
from handloom.cache.batch import Work, build_batch
from known_wrong import mend_decoder

if TYPE_CHECKING:
    from llguidance import LLTokenizer

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Triton's interpreter takes milliseconds for a launch: the kernels, and a GPU, have parity tests of their own
BACKENDS = [name for name in ops.BACKENDS if name != "triton"]
PROMISED = 1e-4  # of the logits' scale
LOGITS_TOLERANCE = 2e-5  # the same for tiny models, whose worst is 4e-6; gemma3-270m's is 2.2e-5
SCORES_TOLERANCE = 1e-5  # where two scores are this close, either token is right


@dataclass
class Pair:
    """A checkpoint folder or GGUF file, its transformers model, and the LMs made of it, one per way of loading."""

    folder: Path
    hf: PreTrainedModel
    _lms: dict[tuple[Any, ...], hl.LM] = field(default_factory=dict)

    def lm(self, **how: Any) -> hl.LM:
        """handloom's LM, loaded once for each set of arguments to from_pretrained; by default on the CPU."""
        how = {"device": DEVICE if how.get("backend") == "triton" else "cpu", **how}
        key = tuple(sorted(how.items()))
        if key not in self._lms:
            self._lms[key] = hl.LM.from_pretrained(self.folder, **how)
        return self._lms[key]

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The vocabulary, as llguidance reads it out of transformers' tokenizer."""
        from llguidance.hf import from_tokenizer  # not on every machine with a GPU

        where = {"gguf_file": self.folder.name} if self.folder.is_file() else {}
        tokenizer = AutoTokenizer.from_pretrained(self.folder.parent if where else self.folder, **where)
        return from_tokenizer(mend_decoder(tokenizer), n_vocab=self.hf.config.vocab_size)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Of each token id, by llguidance; b"" of one that is no text."""
        ids = range(self.tokens.vocab_size)
        return [b"" if self.tokens.is_special_token(id_) else self.tokens.decode_bytes([id_]) for id_ in ids]


def load_pair(folder: Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Pair:
    """Load the folder with transformers; handloom loads it when first asked."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return Pair(folder, hf.eval())


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """transformers' logits at every position, [n, vocab_size], in the model's dtype, in host memory."""
    logits: Tensor = model(torch.tensor([list(ids)], device=model.device)).logits[0]
    return logits.cpu()


def our_logits(lm: hl.LM, ids: Sequence[int], chunks: Sequence[int] = ()) -> Tensor:
    """handloom's logits at every position, [n, vocab_size], in host memory: `chunks` tokens at once, then the rest."""
    with lm.sequence(list(ids)) as sequence:
        return torch.cat([run(lm, [Work(sequence, count, "all")]) for count in split(len(ids), chunks)])


def split(total: int, chunks: Sequence[int]) -> list[int]:
    """`chunks` as far as they fit in `total`, and what is left."""
    counts: list[int] = []
    for count in (*chunks, total):
        counts.append(min(count, total - sum(counts)))
    return [count for count in counts if count]


def run(lm: hl.LM, works: Sequence[Work]) -> Tensor:
    """The logits of one forward pass, in host memory; marks the tokens as computed."""
    logits = lm.transformer.forward(build_batch(works, lm.pool), lm.pool.layers)
    for work in works:
        work.sequence.num_computed += work.num_tokens
    return logits.cpu()


def assert_logits_equal(ours: Tensor, theirs: Tensor, what: str = "", *, tolerance: float = LOGITS_TOLERANCE) -> None:
    """max |Δ| ≤ tolerance of the largest logit, at every position."""
    assert ours.shape == theirs.shape, what
    assert torch.isfinite(theirs).all(), what
    scale, delta = theirs.abs().max(), (ours - theirs).abs().amax(-1)
    worst = int(delta.argmax())
    assert delta[worst] <= tolerance * scale, (
        f"{what}: at position {worst} of {len(delta)} the logits differ by {delta[worst]:.3g}, "
        f"which is {delta[worst] / scale:.3g} of their scale {scale:.3g}"
    )


def hf_generate(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> list[int]:
    """The new tokens of transformers' generate for one prompt."""
    out = model.generate(torch.tensor([list(ids)], device=model.device), **options)
    out = out if isinstance(out, Tensor) else out.sequences
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def assert_tokens_equal(model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], **options: Any) -> None:
    """`ours` equals greedy generate, or the scores at the first mismatch tie within SCORES_TOLERANCE."""
    result = model.generate(
        torch.tensor([list(prompt)], device=model.device),
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    theirs = result.sequences[0, len(prompt) :].tolist()
    if list(ours) == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    assert at < min(len(ours), len(theirs)), f"lengths differ: {list(ours)} and {theirs}"
    scores = result.scores[at][0]
    tie = torch.isclose(scores[ours[at]], scores[theirs[at]], rtol=SCORES_TOLERANCE, atol=SCORES_TOLERANCE)
    assert tie, (
        f"token {at} is {ours[at]} (score {scores[ours[at]]:.6f}), generate has {theirs[at]} "
        f"({scores[theirs[at]]:.6f}); {list(ours)} and {theirs}"
    )
