"""Encoder, decoder and their heads, made of the parts in `nn`.

What a model is, from the bottom:

    PreTrainedModel (base)          loads and saves itself, resizes, prunes, trains, is frozen for inference
      Model (forward)               the one forward: a caller's batch in, named outputs out
        EncoderWithHead (heads), Decoder (decoder)
      BareModel (base)              a PreTrainedModel that is an `nn.backbone.Backbone` itself

Read `forward` first, then `heads` and `decoder`.
"""
