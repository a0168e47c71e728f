"""The paged KV cache: pages, the sequences that hold them, and batches made of sequences."""
