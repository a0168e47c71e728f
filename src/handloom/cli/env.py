"""`handloom env`: what a bug report or a benchmark has to state about this machine.

This module does not know how any of it is chosen or measured.
"""

from __future__ import annotations

import os
from typing import Any

from handloom.cli import common
from handloom.cli.arguments import Json


def env(json: Json = False) -> None:
    """Show versions, device, backend, memory, the Hub's state and the default model, and why each was chosen."""
    with common.waiting("looking around", quiet=json):
        found = _look()
    if json:
        common.emit_json(found, indent=2)
    else:
        _show(found)


def _look() -> dict[str, Any]:
    from handloom import machine
    from handloom.loading import choose_device
    from handloom.ops import choose_backend

    device = choose_device("auto")
    reason = "a CUDA GPU is there" if device.type == "cuda" else "torch sees no CUDA GPU"
    backend = choose_backend(device)
    return {
        **machine.describe(),
        "device": {"name": str(device), "reason": reason},
        "backend": {"name": backend.name, "reason": backend.reason},
        **_models(),
    }


def _models() -> dict[str, Any]:
    """The Hub, and what `LM.from_pretrained()` would load; nothing is downloaded to find out."""
    from huggingface_hub import constants

    from handloom.checkpoint import hub, open_checkpoint
    from handloom.checkpoint.shipped import SHIPPED
    from handloom.checkpoint.source import DEFAULT_REPO, PROBE_SECONDS, VARIABLE
    from handloom.errors import HandloomError

    unreachable = hub.why_unreachable(hub.HubSource(DEFAULT_REPO), PROBE_SECONDS)
    state = {"endpoint": constants.ENDPOINT, "reachable": unreachable is None, "reason": unreachable}
    try:
        checkpoint = open_checkpoint(local_files_only=True)
    except HandloomError as error:
        model: dict[str, Any] = {"name": None, "origin": str(error)}
    else:
        model = {"name": checkpoint.name, "origin": checkpoint.origin}
        checkpoint.close()
    if unreachable is None and not os.environ.get(VARIABLE) and (model["name"] is None or model["name"] in SHIPPED):
        model = {"name": DEFAULT_REPO, "origin": f"no model was named; to be downloaded from {constants.ENDPOINT}"}
    return {"hub": state, "default_model": model}


def _show(found: dict[str, Any]) -> None:
    cpu, memory, hub = found["cpu"], found["memory"], found["hub"]
    limit = "" if memory["limit"] is None else f", limited to {common.size(memory['limit'])}"
    rows = {
        **{name: version or "not installed" for name, version in found["versions"].items() if name != "cuda"},
        "system": found["os"],
        "processor": cpu["name"],
        "cores": f"{cpu['usable_cores']:g} of {cpu['cores']} usable, torch runs {cpu['threads']} threads",
        "memory": f"{common.size(memory['total'])}, {common.size(memory['available'])} available{limit}",
        "gpus": "\n".join(_gpu(gpu, found["versions"]["cuda"]) for gpu in found["gpus"]) or "none",
        "device": f"{found['device']['name']}: {found['device']['reason']}",
        "backend": f"{found['backend']['name']}: {found['backend']['reason']}",
        "hub": f"{hub['endpoint']}: " + ("reachable" if hub["reachable"] else hub["reason"]),
        "default model": f"{found['default_model']['name'] or 'none'}: {found['default_model']['origin']}",
    }
    common.show_table(common.facts(rows))


def _gpu(gpu: dict[str, Any], cuda: str | None) -> str:
    return (
        f"{gpu['name']}, {common.size(gpu['memory'])}, compute {gpu['capability']}, driver {gpu['driver']}, CUDA {cuda}"
    )
