"""One answer from the kernels of every kind of processor, bit for bit: all operations, and small models."""

import contextlib
import copy
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from modernbert import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertModel,
    quantize,
)
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.errors import BackendError
from tests.conftest import SMALL, padded_batch

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without the kernels")
COMPILER = os.environ.get("CC") or shutil.which("cc")
SOURCES = native.FILE.parent
FUZZ = Path(__file__).with_name("fuzz.c")
ROUNDS = "12"
ODD = {**SMALL, "hidden_size": 36, "num_attention_heads": 2, "intermediate_size": 98, "initializer_range": 0.2}


def kinds():
    """The kernels that run here."""
    found = []
    for name in native._NAMES:
        with contextlib.suppress(BackendError):
            found.append(native.Library(native.FILE, name).name)
    return found


def fused(names):
    """Those that multiply and add with one rounding: not the portable ones, where others have to imitate that."""
    return [name for name in names if name != "portable" or "exact" not in names]


@contextlib.contextmanager
def serving(kind):
    """The kernels of a kind instead of the best."""
    found = native.library()
    before = dict(vars(found))
    vars(found).update(vars(native.Library(native.FILE, kind)))
    try:
        yield
    finally:
        vars(found).update(before)


def digests(printed):
    """Of each kind the digests that fuzz.c prints: in float32 and with integers, and in bfloat16 without pairs."""
    rows = [line.split() for line in printed.splitlines()]
    assert all(right == "right" for _, right, *_ in rows), printed
    plain = {name: digest for name, _, digest, _, _ in rows}
    return plain, {name: digest for name, _, _, digest, multiplies in rows if multiplies == "0"}


def compile_with(command, out, more=()):
    """fuzz.c, with the kernels' sources or a library of them."""
    done = subprocess.run(
        [*command, "-std=gnu11", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{SOURCES}", "-o", out, FUZZ, *more],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What fuzz.c says of the kernels that are installed here."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    fuzz = compile_with([COMPILER], tmp_path_factory.mktemp("fuzz") / "fuzz", (native.FILE, "-lm", "-pthread"))
    done = subprocess.run([fuzz, ROUNDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return digests(done.stdout)


def test_operations_of_odd_sizes_have_the_same_bits_on_every_kind(here):
    for of_kind in here:
        names = fused(of_kind)
        assert len({of_kind[name] for name in names}) == 1, of_kind
        if len(names) < len(of_kind):  # one rounding more is noticed
            assert of_kind["portable"] != of_kind[names[0]]


@pytest.fixture(scope="module")
def models():
    """An encoder and a decoder, floats and 8 bits; pickled, as their weights have the layout of a kind."""
    torch.manual_seed(1)
    encoder = ModernBertModel(ModernBertConfig(**ODD)).eval()
    decoder = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**ODD)).eval()
    made = {"encoder": encoder, "decoder": decoder}
    made |= {f"{name} of 8 bits": quantize(copy.deepcopy(model), "int8") for name, model in made.items()}
    return {name: pickle.dumps(model) for name, model in made.items()}


@torch.inference_mode()
def computed(model):
    """Packed texts of several lengths; of a decoder also tokens one by one."""
    ids, mask = padded_batch((300, 1, 64, 130))
    if isinstance(model, ModernBertModel):
        return [model(ids, attention_mask=mask).last_hidden_state]
    out = model.generate(
        ids[2:3, :40], max_new_tokens=20, min_new_tokens=20, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return [model(ids, attention_mask=mask).logits, out.sequences, *out.scores]


@pytest.mark.parametrize("name", ["encoder", "decoder", "encoder of 8 bits", "decoder of 8 bits"])
def test_a_model_has_the_same_bits_on_every_kind(models, name):
    found = {}
    for kind in kinds():
        with serving(kind):
            model = pickle.loads(models[name]).optimize_for_inference()
            assert isinstance(model.base_model.runner.layers, CpuLayers)
            found[kind] = computed(model)
    first, *others = fused(found)
    for kind in others:
        assert all(torch.equal(a, b) for a, b in zip(found[kind], found[first], strict=True)), kind
    for kind in found:
        for a, b in zip(found[kind], found[first], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.1 if "8 bits" in name else 1e-4)


CROSS = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory):
    """fuzz.c and the kernels, compiled for 64-bit ARM."""
    out = tmp_path_factory.mktemp("arm") / "fuzz"
    return compile_with([CROSS, "-O2", "-static"], out, (*sorted(SOURCES.glob("*.c")), "-lm", "-pthread"))


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="no cross-compiler or no emulator of 64-bit ARM")
@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("cortex-a72", ["neon", "portable"]),
        ("neoverse-n1", ["neondot", "neon", "portable"]),
        ("max", ["neonbf16", "neondot", "neon", "portable"]),
    ],
)
def test_arm_has_the_same_bits(here, on_arm, processor, expected):
    done = subprocess.run([EMULATOR, "-cpu", processor, on_arm, ROUNDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = digests(done.stdout)
    assert list(found[0]) == expected
    for of_arm, of_here in zip(found, here, strict=True):
        assert set(of_arm.values()) == {of_here[kind] for kind in fused(of_here)}
