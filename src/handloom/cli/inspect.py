"""`handloom inspect`: what a checkpoint is, from its config and the headers of its files; no weight is read.

This module does not know config.json or any file format.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from handloom.cli import common
from handloom.cli.arguments import Dtype, Json, ModelArgument, Quantize, Quiet, Revision

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from handloom.checkpoint.types import Checkpoint
    from handloom.model.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU"}
NORMS = {"rms": "RMSNorm", "rms_unit_offset": "RMSNorm, weight + 1", "layer": "LayerNorm"}


def inspect(
    model: ModelArgument = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's architecture, its size in the file and in memory, and how fast this machine could decode it.

    The decode limit is memory bandwidth, measured now, over the bytes that one token needs at batch 1.
    """
    with common.waiting("starting", quiet or json):
        import torch

        from handloom import machine
        from handloom.checkpoint import open_checkpoint
        from handloom.checkpoint.quantize import Scheme
        from handloom.loading import choose_device, choose_dtype, choose_quantization
        from handloom.model.families import read_config
        from handloom.model.loading import plan
        from handloom.ops import choose_backend
    checkpoint = open_checkpoint(model, revision=revision)
    try:
        family, spec = read_config(checkpoint.config, f"{checkpoint.name}: config.json")
        device, scheme = choose_device("auto"), None if quantize is None else Scheme.parse(quantize)
        how = choose_quantization(scheme, checkpoint, choose_backend(device), dtype, device)
        held = choose_dtype(dtype, torch.float32 if how else checkpoint.dtype)
        planned = plan(checkpoint, family, spec, held, how)
        per_token = machine.bytes_per_token(spec, {name: sum(counts.values()) for name, counts in planned.items()})
        with common.waiting("measuring memory bandwidth", quiet or json):
            bandwidth = machine.read_bandwidth(device=device, nbytes=per_token)
        found = _describe(checkpoint, spec, held)
    finally:
        checkpoint.close()
    formats: Counter[str] = Counter()
    for counts in planned.values():
        formats.update(counts)
    found["held"] |= {"bytes": formats.total()} | ({"formats": dict(formats.most_common())} if how else {})
    in_cache = machine.kv_bytes_read(spec, held, spec.max_context)
    found["decode_limit"] = {
        "device": str(device),
        "bandwidth": bandwidth,
        "machine_busy": machine.is_busy(),
        "bytes_per_token": per_token,
        "tokens_per_second": bandwidth / per_token,
        "tokens_per_second_full_context": bandwidth / (per_token + in_cache),
    }
    if json:
        common.emit_json(found, indent=2)
    else:
        _show(found)


def _describe(checkpoint: Checkpoint, spec: ModelSpec, held: torch.dtype) -> dict[str, Any]:
    """Everything but the speed, as plain JSON; sizes in bytes."""
    from handloom.model.spec import kv_values_per_token, num_parameters

    storages: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        storages[tensor.storage] += tensor.nbytes
    parameters = num_parameters(spec)
    return {
        "model": checkpoint.name,
        "origin": checkpoint.origin,
        "family": spec.model_type,
        "layers": len(spec.layers),
        "layer_kinds": _layer_kinds(spec),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_context": spec.max_context,
        "positions": _positions(spec),
        "final_norm": _norm(spec.final_norm),
        "tied_head": spec.tied_head,
        "embedding_scale": spec.embedding_scale,
        "logits_softcap": spec.logits_softcap,
        "parameters": parameters,
        "file": {"dtypes": dict(storages.most_common()), "tensors": len(checkpoint.tensors), "bytes": storages.total()},
        "held": {"dtype": str(held).removeprefix("torch.")},
        "kv_bytes_per_token": kv_values_per_token(spec) * held.itemsize,
    }


def _positions(spec: ModelSpec) -> str:
    if spec.learned_positions:
        return f"learned, {spec.learned_positions}"
    return "rotary" if any(layer.mixer.rope for layer in spec.layers) else "none"


def _layer_kinds(spec: ModelSpec) -> list[dict[str, Any]]:
    """Equal layers together, in the order in which each kind first appears."""
    where: dict[LayerSpec, list[int]] = {}
    for i, layer in enumerate(spec.layers):
        where.setdefault(layer, []).append(i)
    return [{"count": len(indices), "indices": indices, **_layer(layer)} for layer, indices in where.items()]


def _layer(layer: LayerSpec) -> dict[str, Any]:
    mixer, mlp = layer.mixer, layer.mlp
    return {
        "attention": "full" if mixer.window is None else "sliding window",
        "window": mixer.window,
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "scale": mixer.scale,
        "softcap": mixer.softcap,
        "rope": _rope(mixer.rope),
        "qk_norm": _norm(mixer.qk_norm) if mixer.qk_norm else None,
        "biases": {"qkv": mixer.qkv_bias, "out": mixer.out_bias, "mlp": mlp.bias},
        "intermediate_size": mlp.intermediate_size,
        "activation": ACTIVATIONS[mlp.activation],
        "gated": mlp.gated,
        "norm": _norm(layer.norm),
        "residual": layer.residual,
    }


def _norm(norm: NormSpec) -> str:
    return f"{NORMS[norm.kind]}, eps {norm.eps:g}"


def _rope(rope: RopeSpec | None) -> str | None:
    if rope is None:
        return None
    scaling = "" if rope.scaling == "none" else f", {rope.scaling} scaling ×{rope.factor:g}"
    return f"theta {rope.theta:g}, {rope.rotary_dim} dims{scaling}"


# As a table ------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    limit, file, held = found["decode_limit"], found["file"], found["held"]
    rate = f"{limit['tokens_per_second']:.1f} tok/s"
    full = f"{limit['tokens_per_second_full_context']:.1f} with the context full"
    rows = {
        "model": found["model"],
        "origin": found["origin"],
        "family": found["family"],
        "layers": _grouped(found["layer_kinds"]),
        "hidden size": f"{found['hidden_size']}",
        "vocabulary": f"{found['vocab_size']:,}",
        "context": f"{found['max_context']:,} tokens",
        "positions": found["positions"],
        "final norm": found["final_norm"],
        "head": "tied to the embedding" if found["tied_head"] else "of its own",
        **({"embedding scale": f"{found['embedding_scale']:g}"} if found["embedding_scale"] != 1 else {}),
        **({"logits softcap": f"{found['logits_softcap']:g}"} if found["logits_softcap"] else {}),
        "parameters": f"{found['parameters']:,}",
        "in the file": f"{common.size(file['bytes'])} in {file['tensors']} tensors: {_shares(file)}",
        "in memory": f"{common.size(held['bytes'])} as {_as(held)}",
        "KV cache": f"{common.size(found['kv_bytes_per_token'])} per token",
        "decode limit": f"{rate} at batch 1, {full}",
        "": f"{limit['bandwidth'] / 1e9:.1f} GB/s read on {limit['device']} (measured), "
        f"{limit['bytes_per_token'] / 1e6:.1f} MB per token"
        + ("; the machine is busy, so the true limit is higher" if limit["machine_busy"] else ""),
    }
    common.show_table(common.facts(rows))
    common.show_table(_layer_table(found["layer_kinds"]))


def _as(held: dict[str, Any]) -> str:
    if "formats" not in held:
        return str(held["dtype"])
    return ", ".join(f"{name} ({common.size(nbytes)})" for name, nbytes in held["formats"].items())


def _grouped(kinds: list[dict[str, Any]]) -> str:
    """ "18: 15 sliding window + 3 full"."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        counts[kind["attention"]] += kind["count"]
    total = sum(counts.values())
    return f"{total}" if len(counts) == 1 else f"{total}: " + " + ".join(f"{n} {name}" for name, n in counts.items())


def _shares(file: dict[str, Any]) -> str:
    return ", ".join(f"{name} {100 * nbytes / file['bytes']:.0f}%" for name, nbytes in file["dtypes"].items())


def _layer_table(kinds: list[dict[str, Any]]) -> Table:
    """One column per kind of layer."""
    from rich import box
    from rich.table import Table

    table = Table("layers", *(_indices(kind["indices"]) for kind in kinds), box=box.SIMPLE_HEAD, pad_edge=False)
    rows = {
        "attention": lambda k: k["attention"] + (f" of {k['window']}" if k["window"] else ""),
        "heads": lambda k: f"{k['num_heads']}, {k['num_kv_heads']} for K and V",
        "head dim": lambda k: f"{k['head_dim']}",
        "scale": lambda k: f"{k['scale']:.4g}" + (f", softcap {k['softcap']:g}" if k["softcap"] else ""),
        "rope": lambda k: k["rope"] or "none",
        "q, k norm": lambda k: k["qk_norm"] or "none",
        "MLP": lambda k: f"{k['intermediate_size']}, {'gated ' if k['gated'] else ''}{k['activation']}",
        "biases": lambda k: ", ".join(name for name, there in k["biases"].items() if there) or "none",
        "norm": lambda k: k["norm"],
        "residual": lambda k: {"pre": "norm before each half", "sandwich": "norms before and after"}[k["residual"]],
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, kinds))
    return table


def _indices(indices: list[int]) -> str:
    """Runs of indices: "0–4, 6–10"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)
