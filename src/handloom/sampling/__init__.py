"""How the next token is chosen: parameters, score rules, random numbers, and the sampler that joins them."""
