"""Text and token ids: tokenizers, chat templates, streaming detokenization, stop strings.

This package does not know models, weights or requests.
"""

from __future__ import annotations
