"""A loaded model and everything one does with it.

This module does not know file formats, schedules or formulas: it puts the parts together.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, Literal, Never

import torch
from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.checkpoint import open_checkpoint
from handloom.checkpoint.quantize import Scheme
from handloom.checkpoint.types import Checkpoint
from handloom.collect import Collector, pieces_of_all, score_all
from handloom.engine import Engine
from handloom.engine.async_engine import AsyncEngine
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.runner import Runner
from handloom.errors import InvalidParam, InvalidPrompt
from handloom.live import LiveSequence, logit_lens, restore, step
from handloom.loading import (
    choose_context,
    choose_device,
    choose_dtype,
    choose_quantization,
    make_graphs,
    make_pool,
    refuse_others,
)
from handloom.model.families import read_config
from handloom.model.hooks import Activations, Function, Hooks, Points
from handloom.model.loading import Progress, load_transformer
from handloom.model.spec import ModelSpec
from handloom.model.transformer import Transformer
from handloom.one_process import OneProcess
from handloom.ops import Backend, choose_backend
from handloom.output import Output, Piece
from handloom.progress import requests_bar
from handloom.prompts import Prompt, as_list, read_call, to_sequence
from handloom.sampling.grammar import Grammars
from handloom.text.tokenizer import Tokenizer


class LM(OneProcess, instead="call LM.from_pretrained again, in the process that is to have it"):
    """A model with its tokenizer and KV cache. Make one with `from_pretrained`."""

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer | None,
        pool: PagePool,
        *,
        name: str,
        origin: str = "",
        generation_config: Mapping[str, Any] | None = None,
        max_context: int | None = None,
    ) -> None:
        self.transformer, self.tokenizer, self.pool = transformer, tokenizer, pool
        self.name, self.origin = name, origin
        self.generation_config = dict(generation_config or {})
        self.max_context = max_context or transformer.spec.max_context
        self.hooks = Hooks(transformer.spec)
        self.grammars = None if tokenizer is None else Grammars(tokenizer, transformer.spec.vocab_size)
        self.graphs: DecodeGraphs | None = None

    def __repr__(self) -> str:
        return f"LM({self.name!r}, {self.spec.model_type}, {self.dtype}, {self.device}, backend {self.backend.name})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        quantize: str | None = None,
        max_context: int | None = None,
        kv_cache_tokens: int | None = None,
        gpu_memory_fraction: float | None = None,
        capture: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        ignore_config_keys: Iterable[str] = (),
        progress: Progress | None = None,
        **others: Never,
    ) -> LM:
        """Load a model.

        Args:
            source: a Hub id, a folder, a .gguf file, "repo:file.gguf"; None for the default model.
            device: "auto" (a CUDA GPU if there is one, else the CPU) or a torch device.
            dtype: "auto" (the checkpoint's own; float32 where matrices are quantised), "float32", "bfloat16" or
                "float16": of activations, KV cache and all weights that are not held quantised.
            backend: "auto", or one of `handloom.ops.BACKENDS`.
            quantize: how matrices are held, see `handloom.checkpoint.quantize.Scheme`: "int8", "int4", "int8:64", …;
                None: as a quantised GGUF file has them, where the backend computes on such weights and no dtype is
                asked for; else in dtype.
            max_context: tokens a sequence may have; the model's own by default. Rotary models go past it.
            kv_cache_tokens: tokens the KV cache holds for all sequences together.
            gpu_memory_fraction: instead, how much of a GPU's memory may be in use; the cache takes what is left below.
            capture: whether a GPU makes decode steps by itself (CUDA graphs); None: where the backend can.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            ignore_config_keys: keys of config.json that may be left unread.
            progress: called with (bytes read, bytes in all) while weights load.

        Raises:
            ModelNotFound, HubError and its kinds, CheckpointError, UnsafeCheckpoint, ConfigError, UnsupportedModel,
            TokenizerError, OutOfMemory, InvalidParam, UnsupportedOption.
        """
        refuse_others(others)
        scheme = None if quantize is None else Scheme.parse(quantize)
        checkpoint = open_checkpoint(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        try:
            cache = (kv_cache_tokens, gpu_memory_fraction)
            lm = cls._from_checkpoint(
                checkpoint, device, dtype, backend, scheme, max_context, cache, ignore_config_keys, progress
            )
        finally:
            checkpoint.close()
        lm.graphs = make_graphs(lm.transformer, lm.pool, capture)
        return lm

    @classmethod
    def _from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: str | torch.device,
        dtype: str | torch.dtype,
        backend: str,
        scheme: Scheme | None,
        max_context: int | None,
        cache: tuple[int | None, float | None],
        ignore_config_keys: Iterable[str],
        progress: Progress | None,
    ) -> LM:
        family, spec = read_config(checkpoint.config, f"{checkpoint.name}: config.json", ignore_config_keys)
        where, context = choose_device(device), choose_context(spec, max_context)
        ops = choose_backend(where, backend, {layer.mixer.head_dim for layer in spec.layers})
        quantize = choose_quantization(scheme, checkpoint, ops, dtype, where)
        what = choose_dtype(dtype, torch.float32 if quantize else checkpoint.dtype)
        tokenizer = checkpoint.tokenizer()
        transformer = load_transformer(
            checkpoint, family, spec, ops, dtype=what, device=where, quantize=quantize, progress=progress
        )
        return cls(
            transformer,
            tokenizer,
            make_pool(transformer.spec, context, *cache, dtype=what, device=where),
            name=checkpoint.name,
            origin=checkpoint.origin,
            generation_config=checkpoint.generation_config,
            max_context=context,
        )

    # What it is --------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        return self.transformer.spec

    @property
    def backend(self) -> Backend:
        """What computes the model, and why it was chosen."""
        return self.transformer.backend

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, KV cache and the weights that are not quantised."""
        return self.transformer.dtype

    @property
    def held(self) -> dict[str, int]:
        """Bytes of weights in memory by how they are held: {"int8": 134529024, "float32": 142848}."""
        return self.transformer.weights.nbytes()

    # Text and ids ------------------------------------------------------------------------------

    def encode(self, prompt: Any) -> Sequence:
        """A new sequence from text, token ids or embeddings. Raises InvalidPrompt, ContextOverflow."""
        bos = self.spec.bos_token_id
        if self.tokenizer is not None and self.tokenizer.bos_token_id is not None:
            bos = self.tokenizer.bos_token_id
        return to_sequence(
            prompt,
            self.pool,
            self.tokenizer,
            vocab_size=self.spec.vocab_size,
            hidden_size=self.spec.hidden_size,
            max_context=self.max_context,
            bos=bos,
        )

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises InvalidPrompt without a tokenizer."""
        if self.tokenizer is None:
            raise InvalidPrompt("this checkpoint has no tokenizer: it has token ids, but no text")
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Seq[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, by the model's chat template; see `Tokenizer.apply_chat_template`."""
        if self.tokenizer is None:
            raise InvalidPrompt(
                "this checkpoint has no tokenizer, so it has no chat template: pass token ids to generate"
            )
        return self.tokenizer.apply_chat_template(messages, **options)

    # Generation --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | LiveSequence | Seq[Prompt | LiveSequence] | None = None,
        *,
        params: Seq[Mapping[str, Any]] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Generate from one prompt, giving an Output, or from a list of them, giving a list.

        With num_return_sequences > 1 it is a list in any case, in transformers' order: all outputs of the first prompt,
        then those of the next.

        A prompt is text, token ids, embeddings [n, hidden_size], or a LiveSequence, which is continued in place. A
        padded batch is taken as transformers' `generate` takes it: `generate(**tokenizer(texts, padding=True))`, with
        input_ids (or inputs, or inputs_embeds) and attention_mask; padding is taken off. Options are those of
        transformers' GenerationConfig (see handloom.sampling.params); params: further options of each prompt;
        streamer: one of transformers', or a list with one for each prompt.
        Everything is checked before anything runs. progress: whether a bar on standard error tells how many prompts
        are done; None: for a list, on a terminal.

        Raises: InvalidPrompt, ContextOverflow, InvalidParam, UnsupportedOption. A single prompt that fails
        while running raises its error; in a list the others live, and its Output carries the error.
        """
        asked, single = read_call(prompts, params, options, self.generation_config)
        collector = Collector(Engine(self))
        try:
            for prompt, own in asked:
                collector.add(prompt, **own)
            with requests_bar(len(collector.outputs), progress) as tell:
                for piece in collector.pieces():
                    tell(piece.token_id is not None, piece.finish_reason is not None)
        finally:
            collector.engine.close()
        if not single:
            return collector.outputs
        for output in collector.outputs:
            if output.error is not None:
                raise output.error
        return collector.outputs if len(collector.outputs) > 1 else collector.outputs[0]

    def stream(
        self,
        prompts: Prompt | LiveSequence | Seq[Prompt | LiveSequence] | None = None,
        *,
        params: Seq[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Like generate, yielding Pieces as they come; leaving the loop ends the requests and frees their pages.

        With a list, pieces of all prompts come interleaved; `piece.index` says whose, `piece.sample` which of several
        outputs. A failed prompt's last piece carries its error; with a single prompt it is raised. Of beam search come
        the tokens that cannot change any more: those that all beams have in common, the rest at its end.
        """
        asked, single = read_call(prompts, params, options, self.generation_config)
        collector = Collector(Engine(self))
        for prompt, own in asked:
            collector.add(prompt, **own)
        return collector.stream(single=single)

    def astream(
        self,
        prompts: Prompt | LiveSequence | Seq[Prompt | LiveSequence] | None = None,
        *,
        params: Seq[Mapping[str, Any]] | None = None,
        engine: AsyncEngine | None = None,
        **options: Any,
    ) -> AsyncGenerator[Piece]:
        """`stream` for asyncio: `async for piece in lm.astream(...)`; no event loop waits while the model runs.

        engine: one of this model's, whose other requests these join; else one of its own, gone afterwards.
        """
        asked, single = read_call(prompts, params, options, self.generation_config)
        return pieces_of_all(engine or AsyncEngine(self), asked, single=single, close=engine is None)

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        sanitize_control_tokens: bool = True,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Output:
        """The assistant's next message in a conversation. Raises what `render_chat` and `generate` raise.

        A control token (`<|im_end|>`) typed in messages or tools is text, unless sanitize_control_tokens=False."""
        options = {"num_return_sequences": 1, **options}
        if options["num_return_sequences"] not in (1, None):
            raise InvalidParam(
                f"num_return_sequences={options['num_return_sequences']!r}: a chat has one next message; use "
                "generate(lm.render_chat(messages)) for several"
            )
        own = {"tools": tools, "sanitize_control_tokens": sanitize_control_tokens}
        if clash := {"messages", *own} & (template_options or {}).keys():
            raise InvalidParam(f"template_options: {min(clash)!r} is reserved; it is an argument of its own")
        output = self.generate(self.render_chat(messages, **own, **(template_options or {})), **options)
        assert isinstance(output, Output)
        return output

    def score(self, texts: Prompt | Seq[Prompt], *, top_logprobs: int = 0) -> Any:
        """Log-likelihood of one text (or token ids), giving a Score, or of a list of them, giving a list.

        top_logprobs: also the n most likely tokens at each position. Raises InvalidPrompt, InvalidParam,
        NonFiniteLogits.
        """
        if isinstance(top_logprobs, bool) or not isinstance(top_logprobs, int) or not 0 <= top_logprobs <= 100:
            raise InvalidParam(f"top_logprobs is {top_logprobs!r}; expected an integer from 0 to 100")
        items, single = as_list(texts)
        scores = score_all(Engine(self), [self.encode(item) for item in items], top_logprobs)
        return scores[0] if single else scores

    def sequence(self, prompt: Prompt) -> LiveSequence:
        """A sequence to read, append to, rewind and fork. Raises InvalidPrompt, ContextOverflow."""
        return LiveSequence(self, self.encode(prompt))

    def restore(self, path: str | os.PathLike[str]) -> LiveSequence:
        """A sequence that `sequence.save(path)` wrote; it goes on bitwise as it would have.

        Raises CheckpointError (not such a file, damaged, another model's), ContextOverflow, OutOfPages.
        """
        return restore(self, path)

    def step(self, sequences: Seq[LiveSequence]) -> Tensor:
        """Next-token logits [n, vocab_size] float32 of n sequences, what is pending in them computed together.

        All in one forward pass (longer prompts in several). Raises InvalidPrompt, OutOfPages.
        """
        return step(self, sequences)

    def runner(self) -> Runner:
        """What runs one forward pass of this model, under the hooks that are open."""
        return Runner(self.transformer, self.pool, self.hooks)

    # Looking inside ----------------------------------------------------------------------------

    def hook_points(self) -> Points:
        """Names and shapes of the points that `capture` and `patch` take; see `handloom.model.hooks`."""
        return dict(self.hooks.points)

    @contextmanager
    def capture(
        self,
        points: str | Iterable[str],
        *,
        positions: Literal["all", "last"] = "all",
        sequence: LiveSequence | None = None,
    ) -> Iterator[Activations]:
        """Keep what passes these points while the block is open: `with lm.capture(point) as acts: ...; acts[point]`.

        points: names, in which `*` stands for any text; positions: see Activations; sequence: one only, else all that
        run meanwhile, in any call. It changes no value. Raises InvalidParam.
        """
        acts = Activations(positions)
        with self.hooks.opened(points, acts.add, changes=False, sequence=sequence):
            yield acts

    @contextmanager
    def patch(
        self, points: str | Iterable[str], function: Function, *, sequence: LiveSequence | None = None
    ) -> Iterator[None]:
        """Change what passes these points while the block is open: `with lm.patch(point, lambda x, at: x + v): ...`.

        function(values, at) is called for each sequence and pass with a copy of its values (shapes: hook_points; rows
        are the tokens at.positions) and returns new ones, or None after changing them in place. Other sequences are not
        touched. Tokens whose K and V are there already are not computed; those computed meanwhile keep theirs when the
        block ends, until something computes them again. Raises InvalidParam; where the function raises, the
        request that it was called for ends with RequestFailed, which has the cause, and others go on.
        """
        with self.hooks.opened(points, function, changes=True, sequence=sequence):
            yield

    def logit_lens(self, sequence: LiveSequence) -> Tensor:
        """Logits [layers + 1, vocab_size] float32 read from the residual stream after each layer; see handloom.live."""
        return logit_lens(self, sequence)
