"""The suite `load`: a checkpoint of a shape with random weights on disk, loaded in fresh processes (loading.py)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from handloom.loading import PAGE_SIZE
from loading import How, load_case
from random_llama import config_of

if TYPE_CHECKING:
    from gpu import Session


def measure(session: Session) -> None:
    arguments = session.arguments
    dtype = str(session.dtype).removeprefix("torch.")
    rows, prompt, new = (2, 2 * PAGE_SIZE, 3) if arguments.small else (32, 1024, 32)
    rounds = 1 if arguments.small else arguments.rounds
    how = How(str(session.device), dtype, arguments.backend, torch.get_num_threads(), rows, prompt, new)
    for shape in arguments.shapes:
        results = session.results("load", f"llama {shape}, random")

        def one(shape: str = shape, results: object = results) -> None:
            with tempfile.TemporaryDirectory() as name:
                load_case(save(shape, session.dtype, session.device, Path(name)), how, rounds, results)

        session.case(results, "load", one)


def save(shape: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Path:
    """A checkpoint of that shape, without a tokenizer; its weights are drawn on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**{name: value for name, value in config_of(shape).items() if name != "model_type"})
    with device:
        model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    return folder
