"""Random small configurations and batches, the same at every run."""

import random

import torch
import transformers

import modernbert
from tests.conftest import IDS

LAYER_PATTERNS = ("every", "all_local", "all_global", "odd")


def random_config(seed: int) -> dict:
    """Keyword arguments that both libraries' configurations take; head sizes 16 to 128."""
    rng = random.Random(seed)
    heads, head_dim = rng.choice([(1, 128), (2, 64), (3, 16), (2, 32), (4, 16), (1, 80), (2, 48)])
    layers = rng.randint(1, 5)
    vocab = rng.choice([67, 128, 300])
    values = {
        "vocab_size": vocab,
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.choice([24, 64, 97]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "local_attention": rng.choice([2, 7, 16, 32, 128, 600]),
        "norm_bias": rng.random() < 0.4,
        "mlp_bias": rng.random() < 0.4,
        "attention_bias": rng.random() < 0.4,
        "decoder_bias": rng.random() < 0.7,
        "classifier_bias": rng.random() < 0.4,
        "norm_eps": rng.choice([1e-5, 1e-6]),
        "hidden_activation": rng.choice(["gelu", "gelu", "relu", "silu", "gelu_pytorch_tanh"]),
        "classifier_activation": rng.choice(["gelu", "gelu", "silu", "tanh"]),
        "initializer_range": 0.1,
        **IDS,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": rng.choice([160_000.0, 5_000.0])},
            "sliding_attention": {"rope_type": "default", "rope_theta": rng.choice([10_000.0, 900.0])},
        },
    }
    kinds = {
        "every": ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(layers)],
        "all_local": ["sliding_attention"] * layers,
        "all_global": ["full_attention"] * layers,
        "odd": [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)],
    }
    values["layer_types"] = kinds[LAYER_PATTERNS[seed % len(LAYER_PATTERNS)]]
    return values


def peer(cls_name: str, values: dict, seed: int = 0, **changes):
    """A model of transformers with random biases and norms, in evaluation mode; attention computed eagerly."""
    torch.manual_seed(seed)
    config_class = transformers.ModernBertDecoderConfig if "Decoder" in cls_name else transformers.ModernBertConfig
    config = config_class(**{**values, **changes}, attn_implementation="eager")
    model = getattr(transformers, cls_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_batch(values: dict, seed: int, side: str = "right"):
    """Ids, mask and labels (B, S); every row has a real token."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, 17, 40, 63, 64, 65, 129, 200, 300]) for _ in range(rng.randint(1, 5))]
    width = max(lengths) + rng.choice([0, 0, 3])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, values["vocab_size"], (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(width - length, width)] = 1
    ids[mask == 0] = values["pad_token_id"]
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100).masked_fill(mask == 0, -100)
    first_real = mask.argmax(1)
    labels[torch.arange(len(lengths)), first_real] = ids[torch.arange(len(lengths)), first_real]
    return ids, mask, labels


def pair(cls, seed, tmp_path, implementation="sdpa", **changes):
    """The values of a random configuration, and transformers' model and ours with the same weights."""
    values = random_config(seed)
    theirs = peer(cls, values, seed, **changes)
    theirs.save_pretrained(tmp_path)
    ours = getattr(modernbert, cls).from_pretrained(tmp_path, attn_implementation=implementation)
    return values, theirs, ours


def same_loss_and_gradients(a, b, theirs, ours):
    torch.testing.assert_close(b.loss, a.loss.float(), rtol=1e-6, atol=1e-6)
    a.loss.backward()
    b.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        scale = max(1.0, expected.abs().max().item())
        assert (parameter.grad - expected).abs().max().item() <= 1e-5 * scale, name
