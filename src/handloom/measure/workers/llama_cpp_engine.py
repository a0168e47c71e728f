"""llama.cpp as `handloom bench cpu` runs it, by llama-cpp-python; see this folder's __init__.py.

A context with one stream of KV per prompt, made anew where the size of the batch changes; the argmax of the logits is
numpy's. Its defaults: K and V in float16, micro-batches of 512 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FILES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_1"}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


class Engine:
    """extra_buffers: whether weights may be laid out anew for the CPU's instructions."""

    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, extra_buffers: bool = True, **room: int
    ) -> None:
        file = Path(model) if precision == "gguf" else Path(files or ".") / f"{FILES[precision]}.gguf"
        if not file.is_file():
            raise SystemExit(f"there is no {file.name} in --peer-models; benchmarks/peer_models.py makes it")
        llama_cpp.llama_log_set(_silent, None)
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = extra_buffers
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file.name}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads, self.max_tokens, self.num_streams = threads, room["max_tokens"], 0
        self.context: Any = None
        self.about = {"held": FILES.get(precision, file.stem), "version": llama_cpp.__version__}

    def _make_context(self, batch: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max, options.n_ctx = batch, batch * -(-self.max_tokens // 256) * 256
        options.n_threads = options.n_threads_batch = self.threads
        self.context, self.num_streams = llama_cpp.llama_init_from_model(self.model, options), batch
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {batch} prompts")
        self.room = llama_cpp.llama_n_batch(self.context)
        self.batch = llama_cpp.llama_batch_init(self.room, 0, 1)

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        if len(prompts) != self.num_streams:
            self._make_context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens: list[list[int]] = [[] for _ in prompts]
        work = [(t, at, i, at + 1 == len(ids)) for i, ids in enumerate(prompts) for at, t in enumerate(ids)]
        for step in range(new_tokens):
            for first in range(0, len(work), self.room):
                self._decode(work[first : first + self.room], tokens)
            work = [(own[-1], len(prompts[i]) + step, i, True) for i, own in enumerate(tokens)]
        return tokens

    def _decode(self, work: list[tuple[int, int, int, bool]], tokens: list[list[int]]) -> None:
        """Run (token, position, stream, whether logits are wanted); append the most likely tokens."""
        batch = self.batch
        batch.n_tokens = len(work)
        for i, (token, position, stream, wanted) in enumerate(work):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if code := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {code}")
        for i, (_, _, stream, wanted) in enumerate(work):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self.context, i)
                tokens[stream].append(int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()))
