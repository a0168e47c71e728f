"""handloom against transformers' `generate` on one device, on seeded random weights in the shapes of real Llamas.

    python benchmarks/gpu_latency.py --device cuda --dtype bfloat16 --shapes 135m 1b

The weights are made once on the spot, for there may be no network; speed does not depend on what they say. Prompt ids,
sizes and rules as in cpu_vs_transformers.py. Rows are written as they come; a shape or backend that fails, or is not in
parity, does not keep the next from being measured, but the exit status says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import common
import handloom as hl
import report
from handloom.loading import DTYPES
from handloom.measure.peer import Transformers
from handloom.ops import BACKENDS

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
KV_HEADS = {"tiny": 2, "135m": 3, "1b": 8}
VOCABULARY = {"tiny": 512, "135m": 49152, "1b": 128256}


def make(shape: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Path:
    """A checkpoint of that shape with weights drawn on the device from a fixed seed (SmolLM2-135M, Llama-3.2-1B)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=KV_HEADS[shape],
        vocab_size=VOCABULARY[shape],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
    )
    with device:
        model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=list(SHAPES))
    parser.add_argument("--backends", nargs="+", default=["torch"], choices=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu_latency.jsonl")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    sizes = common.SMALL if arguments.small else replace(common.Sizes(), rounds=arguments.rounds)
    rows: list[report.Row] = []
    wrong: list[str] = []
    try:
        for shape in arguments.shapes:
            with tempfile.TemporaryDirectory() as folder:
                path = make(shape, dtype, device, Path(folder))
                peer = Transformers.load(path, dtype, device)
                for backend in arguments.backends:
                    model = f"llama {shape}, random, backend {backend}"
                    results = common.open_results("gpu_latency", arguments.output, device, dtype, model=model)
                    try:
                        lm = hl.LM.from_pretrained(path, dtype=dtype, device=device, backend=backend)
                        common.generation_cases(lm, peer, sizes, results)
                    except (Exception, SystemExit) as error:
                        traceback.print_exc()
                        wrong.append(f"{model}: {type(error).__name__}: {error}"[:400])
                    rows += results.rows
    finally:  # also when interrupted
        print(report.markdown(rows), *(f"failed: {each}\n" for each in wrong), sep="", end="", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
