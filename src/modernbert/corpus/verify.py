"""A look at an output: are its shards whole, and are its answers those that this machine gives."""
