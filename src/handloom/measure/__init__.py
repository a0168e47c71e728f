"""Measuring: how fast a model runs, how fast it could run, and whether transformers computes the same.

`stats` turns repeated timings into numbers, `speed` times generation, `limits` says what the machine allows,
`peer` is transformers on the same checkpoint, `parity` compares the two.
"""
