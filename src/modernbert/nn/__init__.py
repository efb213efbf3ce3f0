"""Functions of tensors: packing, linear layers, rotary embeddings, attention, losses. They know no config."""
