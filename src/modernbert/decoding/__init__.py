"""Generation of text: options, samplers, loops and streams, against a small protocol and without any model."""
