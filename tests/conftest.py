"""Shared by all tests: no network, small models and the real data where it is there."""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take hours on cores that others use too
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core; tests of threads choose their own number
if not (list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run without a card
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell ran this in the background

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer as Backend

import modernbert
from modernbert import ModernBertConfig, ModernBertForMaskedLM
from modernbert.pipelines import small_model as small_model_folder
from modernbert.text.tokenizer import Tokenizer
from tests.heads import DECODER_HEADS, HEADS

hypothesis.settings.register_profile("here", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("here")

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"

IDS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "local_attention": 16,
    **IDS,
}


SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests that are marked slow, too")


def pytest_collection_modifyitems(config, items):
    skipped = {} if torch.cuda.is_available() else {"gpu": "no CUDA device"}
    if not config.getoption("--all"):
        skipped["slow"] = "slow: ./check --all runs it"
    for item in items:
        for name, reason in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def model_of(name, implementation="auto", **changes):
    """A random small model of a class, with changes to its configuration."""
    torch.manual_seed(0)
    cls = getattr(modernbert, name)
    return cls(cls.config_class(**{**SMALL, **changes}), implementation).eval()


@torch.no_grad()
def with_biases(model, std=0.1):
    """The model, with biases that are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=std)
    return model


def padded_batch(lengths, side="right", more=0, seed=0):
    """Random ids, and the mask (B, S) of texts of these lengths; `more` columns are padding in every row."""
    width = max(lengths) + more
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.zeros_like(mask)
    generator = torch.Generator().manual_seed(seed)
    ids[mask == 1] = torch.randint(3, SMALL["vocab_size"], (sum(lengths),), generator=generator)
    if side == "left":
        for grid in (ids, mask):
            grid.copy_(torch.stack([row.roll(width - n) for row, n in zip(grid, lengths, strict=True)]))
    return ids, mask


@contextlib.contextmanager
def threads(number, onednn=True):
    """PyTorch computes with so many threads, and with oneDNN or without it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    torch._C._set_mkldnn_enabled(onednn)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch._C._set_mkldnn_enabled(True)


@pytest.fixture
def one_thread(monkeypatch):
    """This process computes with one thread, and so do those that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threads(1):
        yield


@pytest.fixture
def small_decoder():
    """A causal language model large enough in its weights that its outputs differ clearly; windows of 8 tokens."""
    return random_decoder()


def random_decoder(implementation="auto", dtype=torch.float32, optimized=False, **changes):
    """The model of `small_decoder`, with changes to its configuration."""
    changes = {"initializer_range": 0.1, **changes}
    model = with_biases(model_of("ModernBertDecoderForCausalLM", implementation, **changes)).to(dtype)
    return model.optimize_for_inference() if optimized else model


@pytest.fixture
def small_config():
    return ModernBertConfig(**SMALL)


@pytest.fixture
def small_model(small_config):
    """A masked language model large enough in its weights that its outputs differ clearly."""
    return with_biases(ModernBertForMaskedLM(small_config.replace(initializer_range=0.3)).eval())


@pytest.fixture(scope="session")
def data():
    """The folder of real data that lies beside a checkout, or a skip."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def real_backend(data):
    return Backend.from_file(str(data / "tokenizer" / "tokenizer.json"))


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="modernbert")
    return caplog


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """A folder for each head: random weights, the small model's tokenizer, a context of 512 tokens."""
    root = tmp_path_factory.mktemp("small-heads")
    config = modernbert.AutoConfig.from_pretrained(small_model_folder()).replace(
        hidden_size=48, intermediate_size=64, num_attention_heads=3, initializer_range=0.3
    )
    tokenizer = Tokenizer.from_pretrained(small_model_folder())
    shared = {f.name for f in dataclasses.fields(modernbert.ModernBertDecoderConfig)} - {"rope_parameters"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in shared}
    decoder_config = modernbert.ModernBertDecoderConfig(**values)
    for head, cls in {**HEADS, **DECODER_HEADS}.items():
        torch.manual_seed(0)
        getattr(modernbert, cls)(decoder_config if head in DECODER_HEADS else config).save_pretrained(root / head)
        tokenizer.save_pretrained(root / head)
    torch.manual_seed(0)
    late = modernbert.MultiVectorEncoder(modernbert.ModernBertModel.from_pretrained(root / "Model"))
    late.save_pretrained(root / "MultiVector")
    tokenizer.save_pretrained(root / "MultiVector")
    return root


@pytest.fixture
def tree(tmp_path):
    """A copy of what a wheel is built from, without the weights of the small models."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = Path(modernbert.__file__).parent
    ignore = shutil.ignore_patterns("*.safetensors", "__pycache__", "_kernels.so")
    shutil.copytree(package, tmp_path / "src" / "modernbert", ignore=ignore)
    return tmp_path
