"""The house: floors, exported names, file sizes, and what the library never imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modernbert

SRC = Path(modernbert.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# Room -> floor. A module imports only from floors below its own, or from its own room.
FLOORS = {
    "errors": 0,
    "files": 0,
    "records": 1,
    "hub": 1,
    "config": 2,
    "encoding": 2,
    "checkpoint": 3,
    "tokenizer": 3,
    "nn": 3,
    "decoding": 4,
    "engines": 5,
    "models": 6,
    "quantization": 7,
    "bench": 8,
    "auto": 8,
    "training": 8,
    "explain": 8,
    "pretraining": 9,
    "pipelines": 9,
    "finetuning": 10,
    "cli": 11,
    "__main__": 12,
}


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_module_imports_only_from_lower_floors(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "modernbert" or len(parts) == 1 or parts[1] == here or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there in FLOORS, f"{path} imports {name}, which is in no room of the house"
        assert FLOORS[there] < FLOORS[here], f"{path} (floor {FLOORS[here]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_the_library_never_imports_transformers(path):
    assert not any(name.split(".")[0] == "transformers" for name in imported(path))


def test_only_hub_talks_to_the_hub():
    users = {room(p) for p in FILES if any(n.split(".")[0] == "huggingface_hub" for n in imported(p))}
    assert users == {"hub"}


def test_exported_names():
    assert modernbert.__all__ == [
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
        "BitsAndBytesConfig",
        "DecoderCache",
        "GenerateOutput",
        "ModernBertConfig",
        "ModernBertDecoderConfig",
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderForSequenceClassification",
        "ModernBertDecoderModel",
        "ModernBertForMaskedLM",
        "ModernBertForMultipleChoice",
        "ModernBertForQuestionAnswering",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertModel",
        "QuantizationConfig",
        "SentenceEncoder",
        "TextStreamer",
        "Tokenizer",
        "__version__",
        "finetune",
        "pipeline",
        "quantize",
    ]
    for name in modernbert.__all__:
        assert getattr(modernbert, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="Nonsense"):
        modernbert.Nonsense  # noqa: B018


def test_importing_is_lazy_and_help_needs_no_torch():
    code = "import modernbert, modernbert.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys\nfrom modernbert.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
