"""handloom: a hand-written loop that weaves tokens."""
