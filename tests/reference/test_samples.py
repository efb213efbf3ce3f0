"""Every code sample of the reference pages about what this release serves, run with only the import changed.

The pages lie beside a checkout; without them these tests skip. The samples' model ids resolve in a Hub cache that is
made here: a small random model with the real tokenizer.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM, ModernBertForMaskedLM
from modernbert.text.tokenizer import Tokenizer
from tests.conftest import SPECIAL_TOKENS
from tests.hub_server import write_cache

PAGES = Path(__file__).parents[3] / "shared" / "reference"


def unprompted(code: str) -> str:
    """A sample without its prompts and outputs."""
    if ">>>" not in code:
        return code
    lines = [line[4:] for line in code.splitlines() if line.startswith((">>> ", "... "))]
    return "\n".join(lines)


def samples():
    found = []
    for page in sorted(PAGES.glob("0*.txt")):
        text = page.read_text()
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
        # The page of the v4 release has lost its fences: a sample goes from its imports to the next heading.
        blocks += re.findall(
            r"^Copied\n((?:import torch\n)?from transformers.*?)"
            r"(?=^ModernBert\w*\n|^Example of |^Usage tips|^Pytorch\n|^class |\Z)",
            text,
            re.S | re.M,
        )
        if not blocks:  # the decoder's earlier page marks its samples by their prompts alone
            blocks = re.findall(r"^(import torch\nfrom transformers.*?)(?=^ModernBert\w*\n)", text, re.S | re.M)
            ends = r"(?=^Example of |^Usage tips|^Pytorch\n|^class |^ModernBert|\Z)"
            blocks += re.findall(rf"^(>>> (?:import|from) .*?){ends}", text, re.S | re.M)
        for i, block in enumerate(blocks):
            code = unprompted(block)
            names = {n for line in re.findall(r"from transformers import (.*)", code) for n in re.split(r",\s*", line)}
            if "transformers run --task fill-mask" in code:
                found.append(pytest.param("bash", code, id=f"{page.stem[:3]}-{i}-command"))
            elif names:
                found.append(pytest.param("python", code, id=f"{page.stem[:3]}-{i}-{'-'.join(sorted(names))}"))
    return found


SAMPLES = samples()


@pytest.fixture(scope="session")
def environment(tmp_path_factory, data):
    """Variables that point the samples at a Hub cache with the model of their id."""
    root = tmp_path_factory.mktemp("hub")
    config = ModernBertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ModernBertForMaskedLM(config).save_pretrained(root / "model")
    tokenizer = Tokenizer.from_pretrained(data / "tokenizer", model_max_length=8192, **SPECIAL_TOKENS)
    tokenizer.save_pretrained(root / "model")
    files = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    write_cache(root / "cache", "answerdotai/ModernBERT-base", files)
    config = ModernBertDecoderConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ModernBertDecoderForCausalLM(config).save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    files = {path.name: path.read_bytes() for path in (root / "decoder").iterdir()}
    for name in ("jhu-clsp/ettin-decoder-17m", "blab-jhu/test-32m-dec"):
        write_cache(root / "cache", name, files)
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "HF_HUB_CACHE": str(root / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
    }


@pytest.mark.skipif(not PAGES.is_dir(), reason=f"no reference pages at {PAGES}")
def test_there_are_samples():
    assert len(SAMPLES) >= 30
    for page in ("003", "004"):
        of_page = [str(p.values[1]) for p in SAMPLES if str(p.id).startswith(page)]
        assert len(of_page) == 5
        assert sum("text-generation" in code for code in of_page) == 1
    assert sum("command" in str(p.id) for p in SAMPLES) >= 1


@pytest.mark.parametrize(("kind", "code"), SAMPLES)
def test_sample(kind, code, environment):
    code = code.replace("transformers run", "modernbert run").replace(
        "from transformers import", "from modernbert import"
    )
    # One page lost the mask to its markup; the sample means the sentence of the other page.
    code = code.replace('"The capital of France is ."', '"The capital of France is [MASK]."')
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if kind == "bash":
        assert "photosynthesis" in done.stdout
    elif "print(" in code:
        assert re.search(r"(predicted token is|Predicted word): .+", done.stdout), done.stdout
