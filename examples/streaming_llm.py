"""StreamingLLM (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks") in twenty lines.

    python examples/streaming_llm.py                    # SmolLM2-135M on the Declaration of Independence
    python examples/streaming_llm.py --text my.txt --model some/model --window 512

Three sequences read one text token by token, in one forward pass per step: one keeps all K and V, one a window of the
last tokens, one the first `sinks` tokens and a smaller window. Without its first tokens, which attention heads rest on,
a model loses its way; with four of them it goes on as if it remembered. As in the paper a token's position is its place
in the cache: `sequence.remove` rotates the keys after a gap back (`sequence.evict` would keep their positions). So the
cache stays as small as the window, and a text may be longer than the model's context.

streaming_llm.svg, beside this file, is what the first command draws. Perplexity of the 1366 tokens after the first 256:
23.9 with the full cache, 59.8 with a window of 256, 23.6 with 4 sinks and a window of 252.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import handloom as hl

DECLARATION = Path(__file__).with_name("declaration.txt")


def read_along(lm: hl.LM, token_ids: Sequence[int], kept: Mapping[str, tuple[int, int]]) -> dict[str, list[float]]:
    """Negative log-likelihood, in nats, of every token but the first, by each way of keeping a cache.

    kept: (sinks, window) by name: at most that many of the first and of the last tokens are attended to.
    """
    sequences = {name: lm.sequence([token_ids[0]]) for name in kept}
    losses: dict[str, list[float]] = {name: [] for name in kept}
    for token_id in token_ids[1:]:
        logprobs = lm.step(list(sequences.values())).log_softmax(dim=-1)
        for row, (name, sequence) in zip(logprobs, sequences.items(), strict=True):
            losses[name].append(-row[token_id].item())
            sinks, window = kept[name]
            if len(sequence) == sinks + window:
                sequence.remove(sinks, sinks + 1)
            sequence.append(token_id)
    return losses


def perplexities(losses: Sequence[float], bin_size: int) -> list[float]:
    """exp of the mean loss of each `bin_size` tokens in a row."""
    bins = [losses[at : at + bin_size] for at in range(0, len(losses), bin_size)]
    return [math.exp(sum(part) / len(part)) for part in bins]


def draw(losses: Mapping[str, Sequence[float]], window: int, bin_size: int, file: Path) -> None:
    """A curve for each, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, values in losses.items():
        curve = perplexities(values, bin_size)
        axes.plot([bin_size * (i + 0.5) for i in range(len(curve))], curve, label=name)
    axes.axvline(window, color="gray", linestyle=":", label=f"{window} tokens: the cache is full")
    axes.set(yscale="log", xlabel="tokens read", ylabel=f"perplexity of {bin_size} tokens")
    axes.legend()
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the one that handloom takes by itself")
    parser.add_argument("--text", type=Path, default=DECLARATION)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=256, help="tokens in the cache, sinks included")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--bin", type=int, default=64, help="tokens of a point of the curve")
    parser.add_argument("--output", type=Path, default=Path("streaming_llm.svg"))
    given = parser.parse_args(arguments)
    lm = hl.LM.from_pretrained(given.model)
    token_ids = lm.tokenizer.encode(given.text.read_text(encoding="utf-8"))[: given.max_tokens]
    kept = {
        "full cache": (0, min(len(token_ids), lm.max_context)),  # past the context it can only be a window too
        f"window of {given.window}": (0, given.window),
        f"{given.sinks} sinks + window of {given.window - given.sinks}": (given.sinks, given.window - given.sinks),
    }
    losses = read_along(lm, token_ids, kept)
    for name, values in losses.items():
        after = values[given.window :] or values
        print(f"{name}: perplexity {math.exp(sum(after) / len(after)):.2f} of the {len(after)} tokens after the window")
    draw(losses, given.window, given.bin, given.output)
    print(f"drawn to {given.output}")


if __name__ == "__main__":
    main()
