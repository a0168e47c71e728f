"""handloom: a hand-written loop that weaves tokens.

import handloom as hl
lm = hl.LM.from_pretrained()
print(lm.generate("Once upon a time", max_new_tokens=64).text)
"""

from __future__ import annotations

from handloom.engine import Engine
from handloom.errors import HandloomError
from handloom.live import LiveSequence
from handloom.lm import LM
from handloom.output import Output, Piece, Score, Timing

__all__ = ["LM", "Engine", "HandloomError", "LiveSequence", "Output", "Piece", "Score", "Timing"]
__version__ = "0.1.0"
