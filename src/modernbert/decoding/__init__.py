"""Generation of text: options, samplers, loops, streams of text, the cache, and `generate`."""
