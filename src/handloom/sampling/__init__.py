"""How the next token is chosen: options, parameters, score rules, random numbers, and the sampler that joins them."""
