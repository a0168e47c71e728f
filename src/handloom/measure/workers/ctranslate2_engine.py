"""CTranslate2 as `handloom bench cpu` runs it; see this folder's __init__.py.

It reads a folder of its own, `ctranslate2` among the peers' files, and makes any precision of that when it loads. Its
prompts are the vocabulary's strings; a least length equal to the most keeps eos from ending a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


class Engine:
    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, max_batch: int, max_tokens: int
    ) -> None:
        folder = Path(files or ".") / "ctranslate2"
        if not folder.is_dir():
            raise SystemExit("there is no folder ctranslate2 in --peer-models; ct2-transformers-converter makes it")
        if TYPES.get(precision) not in ctranslate2.get_supported_compute_types("cpu"):
            raise SystemExit(f"CTranslate2 does not compute in {precision} on this CPU")
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=TYPES[precision], inter_threads=1, intra_threads=threads
        )
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.about = {"held": TYPES[precision], "version": ctranslate2.__version__}

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = self.generator.generate_batch(
            [[self.vocabulary[token] for token in ids] for ids in prompts],
            beam_size=1,
            sampling_topk=1,
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]
