"""A short selection of the tests, run as if on other processors: what PyTorch, oneDNN and our own kernels may use.

To run everything as another processor, set the same variables before `pytest`; `PROCESSORS` has them.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# What one x86-64 machine can play: its newest instructions are left unused. Each of the three chooses for itself.
NONE = {"MODERNBERT_KERNELS": "none", "OMP_NUM_THREADS": "1"}
PROCESSORS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MODERNBERT_KERNELS": "avx2"},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MODERNBERT_KERNELS": "avx512"},
    "no vectors, no kernels": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", **NONE},
    "portable kernels": {"ATEN_CPU_CAPABILITY": "default", "MODERNBERT_KERNELS": "portable"},
}
LINEAR = ("blocks-2-(33, 5)-dtype0", "onednn-2-(33, 5)-dtype1", "onednn-2-(48, 97)-dtype0")
SELECTION = [
    "tests/models/test_invariance.py::test_models_of_odd_sizes_give_a_text_the_same_bits_alone_and_on_any_number_of_threads",
    "tests/decoding/test_cache.py::test_a_text_s_scores_do_not_depend_on_its_batch_bit_for_bit",
    *(f"tests/nn/test_linear.py::test_a_row_is_the_same_whatever_the_number_of_rows[{case}]" for case in LINEAR),
    "tests/parity/test_encoder.py::test_position_ids",
    "tests/parity/test_decoder.py::test_where_one_id_pads_and_ends_texts_the_token_before_counts",
    "tests/engines/cpu/test_training.py::test_a_layer_and_its_gradients_are_those_of_its_modules_in_double",
    "tests/engines/cpu/test_training.py::test_a_step_of_an_optimizer_is_that_of_pytorch",
    "tests/models/test_optimized.py::test_training_an_optimized_model_trains_the_plain_one",
    "tests/quantization/test_weight.py::test_the_kernels_compute_the_definition",
    "tests/quantization/test_models.py::test_a_text_is_its_own_bit_for_bit",
]
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86-64 processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_selection_passes_on_another_processor(processor):
    variables = PROCESSORS[processor]
    needs = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}
    kernels = variables["MODERNBERT_KERNELS"]
    if kernels in needs and not needs[kernels]():
        pytest.skip(f"this processor has no {kernels}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECTION]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "2", **variables, "MODERNBERT_FUZZ": "4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
