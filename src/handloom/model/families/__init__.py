"""The table of model families. Adding one adds a file here and a line below.

This module does not know files, devices or weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from handloom.checkpoint.json_object import quote
from handloom.errors import UnsupportedModel
from handloom.model.families import gemma3_text, gpt2, llama
from handloom.model.families.config import ConfigReader
from handloom.model.families.family import Family
from handloom.model.spec import ModelSpec

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, gpt2.FAMILY, gemma3_text.FAMILY)}


def read_config(config: Mapping[str, Any], where: str, ignore_keys: Iterable[str] = ()) -> tuple[Family, ModelSpec]:
    """Find the family of a config.json and turn it into a spec.

    Raises UnsupportedModel for a model_type that is not in FAMILIES, ConfigError for a value out of
    bounds or a key that is not understood (`ignore_keys` excepts some), UnsafeCheckpoint for one that
    asks for code.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        custom = " Its custom code (auto_map) is never run." if "auto_map" in config else ""
        raise UnsupportedModel(
            f"{where}: model_type {quote(model_type)} is not one of {', '.join(sorted(FAMILIES))}.{custom}"
        )
    family = FAMILIES[model_type]
    reader = ConfigReader(config, where, ignore_keys)
    spec = family.read_spec(reader)
    reader.finish()
    return family, spec
