"""What the rest of handloom knows about a checkpoint, whatever its format on disk.

This module does not know any file format, where files come from, or what a weight means to a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from handloom.checkpoint.quantization import QuantizedRows
    from handloom.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as it lies in a file.

    Attributes:
        name: the weight's name in the Hub's (transformers') naming.
        shape: as the Hub's model code has it, outermost dimension first.
        storage: how the file holds it: `"F32"`, `"BF16"`, `"F16"`, `"Q4_1"`, `"F8_E4M3"`, ...
        nbytes: bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    nbytes: int


class Checkpoint(Protocol):
    """An open checkpoint: its configuration, and weights that are read one at a time, when asked for.

    Attributes:
        name: what the user asked for; used in messages.
        path: the folder, or the .gguf file, that is read.
        origin: one sentence for people: where the checkpoint came from and why it was chosen. Set by `open_checkpoint`.
        config: the content of config.json (built from the metadata for GGUF).
        generation_config: the content of generation_config.json, `{}` where there is none.
        tensors: every weight, by Hub name.
        dtype: the checkpoint's own floating dtype: the config's `dtype` (or `torch_dtype`), else that of
            most weights; float32 for quantised GGUF.
    """

    name: str
    path: Path
    origin: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    dtype: torch.dtype

    def read_into(self, name: str, out: torch.Tensor, *, transpose: bool = False) -> None:
        """Copy a weight into `out`, converting to its dtype and device. Safe to call from several threads.

        Args:
            name: a key of `tensors`.
            out: shape `tensors[name].shape` (the two dimensions swapped with `transpose`), any dtype and
                device; may be a view of a bigger tensor.
            transpose: write the transposed matrix; only for two dimensions.

        Raises:
            CheckpointError: no such weight, another shape, or a storage that cannot be read.
        """

    def read_rows(self, name: str, *, transpose: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A matrix a few rows at a time: their numbers int64 [n], and values [n, columns], overwritten by the next.

        In a floating dtype of the file's or float32. All rows at once where the file has them as columns; transpose: as
        for read_into, and raises as it does. Safe in threads.
        """

    def read_quantized(self, name: str, out: QuantizedRows, *, transpose: bool = False) -> None:
        """Copy a weight that the file holds in one of `quantization.FORMATS` into `out`, as it is. Safe in threads.

        transpose: as for read_into; the file must hold the rows of the result, since they are what is quantised.

        Raises:
            CheckpointError: no such weight, another shape or format, or a scale that is NaN or infinite.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None where it has no tokenizer files.

        Raises:
            TokenizerError: the files are there, but damaged or of an unknown kind.
        """

    def close(self) -> None:
        """Release the files. Reading afterwards is an error; closing twice is not."""
