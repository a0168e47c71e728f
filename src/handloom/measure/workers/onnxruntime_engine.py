"""ONNX Runtime GenAI as `handloom bench cpu` runs it; see this folder's __init__.py.

It reads a folder for each precision among the peers' files, `onnxruntime-fp32` and so on, that its model builder makes.
A least length equal to the most keeps eos from ending a prompt. Written to the interface of version 0.18 as its manual
has it, and tested against a stand-in of that: it has not yet run with the package itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai


class Engine:
    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, max_batch: int, max_tokens: int
    ) -> None:
        folder = Path(files or ".") / f"onnxruntime-{precision}"
        if not folder.is_dir():
            raise SystemExit(
                f"there is no folder {folder.name} in --peer-models; onnxruntime_genai.models.builder makes it"
            )
        config = onnxruntime_genai.Config(str(folder))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        self.about = {"held": precision, "version": onnxruntime_genai.__version__}

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Prompts are of one length."""
        begin = len(prompts[0])
        length = begin + new_tokens
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(
            batch_size=len(prompts), min_length=length, max_length=length, do_sample=False, num_beams=1
        )
        generator = onnxruntime_genai.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        return [generator.get_sequence(row)[begin:].tolist() for row in range(len(prompts))]
