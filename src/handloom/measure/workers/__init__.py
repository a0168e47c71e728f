"""Engines as `handloom bench cpu` runs them: `worker.py`, and an adapter per engine, each in a process of its own.

An adapter is a file with a class `Engine`: made with the keywords model, files, precision, threads, max_batch and
max_tokens, it has `about` (plain JSON: at least "held", how the weights are held, and "version") and
`run(prompts, new_tokens)`, which gives the greedy token ids of each prompt, eos or not. What it cannot do it says by
raising. Adapters import their engine at the top, and none but handloom's own needs handloom.

This package does not know what is measured.
"""
