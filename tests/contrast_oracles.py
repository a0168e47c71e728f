"""Contrastive search and DoLa as published, each step from nothing, over transformers' model in its dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def states_and_logits(model: PreTrainedModel, ids: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states [n, hidden_size] before each layer and after the final norm; logits [vocab_size] after the last."""
    out = model(torch.tensor([ids]), output_hidden_states=True)
    return tuple(layer[0] for layer in out.hidden_states), out.logits[0, -1]


def contrastive_search(model: PreTrainedModel, prompt: Sequence[int], alpha: float, k: int, steps: int) -> list[int]:
    """Su et al. 2022, equation 5."""
    ids = list(prompt)
    for _ in range(steps):
        states, logits = states_and_logits(model, ids)
        found: list[tuple[float, int]] = []
        for token in logits.topk(k).indices.tolist():
            own = states_and_logits(model, [*ids, token])[0][-1][-1]
            penalty = max(float(torch.cosine_similarity(own, other, dim=0)) for other in states[-1])
            found.append(((1 - alpha) * float(logits.softmax(0)[token]) - alpha * penalty, token))
        ids.append(max(found)[1])
    return ids[len(prompt) :]


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean of the divergences of the mean from each of two distributions, given by their logarithms, as
    transformers has it."""
    mean = (p.exp() + q.exp()) / 2
    terms = torch.special.xlogy(mean, mean) - mean * (p + q) / 2
    return float(terms.sum())


@torch.no_grad()
def dola(model: PreTrainedModel, prompt: Sequence[int], layers: Sequence[int], steps: int) -> list[int]:
    """Chuang et al. 2023, equations 2 to 4, with logarithms in float64."""
    ids = list(prompt)
    for _ in range(steps):
        states, logits = states_and_logits(model, ids)
        final = logits.double().log_softmax(0)
        early = [model.get_output_embeddings()(states[layer][-1]).double().log_softmax(0) for layer in layers]
        premature = max(early, key=lambda one: divergence(final, one))
        scores = final - premature
        scores[final < final.max() + math.log(0.1)] = -torch.inf
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]
