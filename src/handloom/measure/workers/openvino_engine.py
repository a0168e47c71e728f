"""OpenVINO GenAI as `handloom bench cpu` runs it; see this folder's __init__.py.

It reads GGUF files of the types that it knows and makes a graph of them when it loads. Its prefix cache, on by default,
is off: a prompt that comes again would not be computed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

FILES = {"fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


class Engine:
    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, max_batch: int, max_tokens: int
    ) -> None:
        if precision not in FILES and precision != "gguf":
            raise SystemExit(f"OpenVINO GenAI reads no GGUF file in {precision}")
        file = Path(model) if precision == "gguf" else Path(files or ".") / f"{FILES[precision]}.gguf"
        if not file.is_file():
            raise SystemExit(f"there is no {file.name} in --peer-models; benchmarks/peer_models.py makes it")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, max_batch * max_tokens
        self.pipeline = openvino_genai.LLMPipeline(
            str(file), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )
        self.about = {"held": FILES.get(precision, file.stem), "version": openvino_genai.__version__}

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(tokens) for tokens in self.pipeline.generate(inputs, config).tokens]
