"""handloom: a hand-written loop that weaves tokens.

    import handloom as hl
    lm = hl.LM.from_pretrained()
    print(lm.generate("Once upon a time", max_new_tokens=64).text)

The names below are imported when first used, so that `handloom --help` does not wait for torch.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handloom.cache.batch import Work
    from handloom.conversation import Conversation
    from handloom.decoding.decoder import Decoder, FinishedEvent, TokenEvent
    from handloom.engine import Engine
    from handloom.engine.async_engine import AsyncEngine
    from handloom.errors import HandloomError
    from handloom.live import LiveSequence
    from handloom.lm import LM
    from handloom.model.hooks import Hook
    from handloom.output import Output, Piece, Score, Timing
    from handloom.sampling.watermark import SynthID, Watermark
    from handloom.sampling.watermark_detection import detect_synthid, detect_watermark

__all__ = [
    "LM",
    "AsyncEngine",
    "Conversation",
    "Decoder",
    "Engine",
    "FinishedEvent",
    "HandloomError",
    "Hook",
    "LiveSequence",
    "Output",
    "Piece",
    "Score",
    "SynthID",
    "Timing",
    "TokenEvent",
    "Watermark",
    "Work",
    "detect_synthid",
    "detect_watermark",
]
__version__ = "0.1.0"

_HOMES = {
    "LM": "lm",
    "AsyncEngine": "engine.async_engine",
    "Conversation": "conversation",
    "Decoder": "decoding.decoder",
    "Engine": "engine",
    "FinishedEvent": "decoding.decoder",
    "HandloomError": "errors",
    "Hook": "model.hooks",
    "LiveSequence": "live",
    "Output": "output",
    "Piece": "output",
    "Score": "output",
    "SynthID": "sampling.watermark",
    "Timing": "output",
    "TokenEvent": "decoding.decoder",
    "Watermark": "sampling.watermark",
    "Work": "cache.batch",
    "detect_synthid": "sampling.watermark_detection",
    "detect_watermark": "sampling.watermark_detection",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("handloom.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'handloom' has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # it would look through half a million objects a few times, none of which goes: a sixth of a second
    try:
        return getattr(import_module(f"handloom.{_HOMES[name]}"), name)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
