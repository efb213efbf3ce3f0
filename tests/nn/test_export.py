"""The plain path as a tracer sees it: once the texts' places are known, nothing depends on values of tensors."""

import pytest
import torch

from modernbert import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderModel, ModernBertModel
from modernbert.nn.packing import PackedInputs
from tests.conftest import SMALL


@pytest.mark.parametrize(
    ("cls", "config"), [(ModernBertModel, ModernBertConfig), (ModernBertDecoderModel, ModernBertDecoderConfig)]
)
@torch.no_grad()
def test_the_layers_are_exported_for_texts_of_known_lengths(cls, config):
    torch.manual_seed(0)
    model = cls(config(**SMALL, initializer_range=0.2)).eval()
    inputs = PackedInputs.of_rows([[3, 4, 5, 6, 7] * 20, [8, 9, 10]])
    shared = model.share(inputs, model.embeddings(inputs.ids_T, None))

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids_T):
            return self.model.run_layers(self.model.embeddings(ids_T, None), shared)

    exported = torch.export.export(Layers(), (inputs.ids_T,)).module()
    for ids_T in (inputs.ids_T, inputs.ids_T.flip(0)):
        packed = PackedInputs.of_rows([ids_T[:100].tolist(), ids_T[100:].tolist()])
        torch.testing.assert_close(exported(ids_T), model.encode(packed).last_TM, rtol=1e-5, atol=1e-5)
