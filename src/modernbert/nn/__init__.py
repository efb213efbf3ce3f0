"""The parts of a model, on packed texts: no part knows padding, kernels, files or caches.

The way of a batch, and an order to read in: `inputs` checks what a caller gives and `packing` packs it; `backbone`
embeds it, makes what the layers of a kind share (`execution`), and runs the `layers`. Beside them lies what layers are
made of: `rotary`, `attention/`, `linear`, `activations`, `pooling`, `losses`. Code that looks odd is mostly there for
equal bits: a text's results do not depend on its batch (docs/invariance.md).
"""
