"""Decoding modes: each decides which tokens of which sequences must run next, and what becomes of the logits."""
