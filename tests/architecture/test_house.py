"""The house: floors, circles, budgets, exported names, and what the library never imports.

CONTRIBUTING.md has the one table of floors, and the order of files in the rooms that are read top-down.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

import modernbert
import modernbert.corpus
import modernbert.indexing
import modernbert.tools
import modernbert.training

SRC = Path(modernbert.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()

# Room -> floor and lines. A module imports only from floors below its own, or from its own room.
ROOMS = {
    room: (int(floor), int(lines.replace(",", "")))
    for floor, rooms, lines in re.findall(r"^\| (\d+) \| ([^|]+) \| ([\d,]+) \|", GUIDE, re.MULTILINE)
    for room in re.findall(r"`(\w+)/?`", rooms)
}
# Room -> its files, each of which imports only those before it.
ORDERS = {
    room: re.findall(r"`([\w/]+)`", files)
    for room, files in re.findall(r"^- \*\*`(\w+)/`, in order\*\*: ([^.]+)\.", GUIDE, re.MULTILINE)
}
NN_MAY_KNOW = {"nn", "config", "errors", "checks"}


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions and for types alone too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports; a package only where it is imported for itself."""
    found = imported(path) & MODULES
    return {name for name in found if not any(other.startswith(f"{name}.") for other in imported(path))}


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
        assert there in ROOMS, f"{path} imports {name}, which is in no room of the house"
        assert ROOMS[there][0] < ROOMS[here][0], f"{path} (floor {ROOMS[here][0]}) imports {name}"
        assert here != "nn" or there in NN_MAY_KNOW, f"{path} imports {name}"


@pytest.mark.parametrize("room", ORDERS)
def test_a_room_is_read_top_down(room):
    order = ORDERS[room]
    files = {str(p.relative_to(SRC / room).with_suffix("")) for p in (SRC / room).rglob("*.py")}
    assert {file for file in files if not file.endswith("__init__")} == set(order)
    for place, file in enumerate(order):
        known = {f"modernbert.{room}.{other}".replace("/", ".") for other in order[:place]}
        known |= {name.rpartition(".")[0] for name in known}
        for name in ours(SRC / room / f"{file}.py"):
            assert not name.startswith(f"modernbert.{room}.") or name in known, f"{room}/{file} imports {name}"


def test_no_circle_of_imports():
    graph = networkx.DiGraph((module_of(path), name) for path in FILES for name in ours(path))
    assert [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_its_budget(room):
    files = [path for path in FILES if path.relative_to(SRC).parts[0].removesuffix(".py") == room]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert lines <= ROOMS[room][1], f"{room} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_the_library_never_imports_transformers(path):
    assert not any(name.split(".")[0] == "transformers" for name in imported(path))


def test_only_hub_talks_to_the_hub():
    users = {module_of(p) for p in FILES if any(n.split(".")[0] == "huggingface_hub" for n in imported(p))}
    assert users == {"modernbert.io.hub"}


def test_exported_names():
    assert modernbert.__all__ == [
        "AddedToken",
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
        "BatchEncoding",
        "BitsAndBytesConfig",
        "DecoderCache",
        "DynamicCache",
        "FeatureExtractionPipeline",
        "FillMaskPipeline",
        "GenerateOutput",
        "GenerationConfig",
        "LogitsProcessor",
        "LogitsProcessorList",
        "ModernBertConfig",
        "ModernBertDecoderConfig",
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderForSequenceClassification",
        "ModernBertDecoderModel",
        "ModernBertDecoderPreTrainedModel",
        "ModernBertForMaskedLM",
        "ModernBertForMultipleChoice",
        "ModernBertForQuestionAnswering",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertModel",
        "ModernBertPreTrainedModel",
        "MultiVectorEncoder",
        "MultiVectorSettings",
        "OnePass",
        "Pipeline",
        "PreTrainedConfig",
        "PreTrainedModel",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerBase",
        "PreTrainedTokenizerFast",
        "PretrainedConfig",
        "QuantizationConfig",
        "QuestionAnsweringPipeline",
        "SentenceEncoder",
        "SparseEncoder",
        "SparseVector",
        "StoppingCriteria",
        "StoppingCriteriaList",
        "TextClassificationPipeline",
        "TextGenerationPipeline",
        "TextIteratorStreamer",
        "TextStreamer",
        "TokenClassificationPipeline",
        "Tokenizer",
        "ZeroShotClassificationPipeline",
        "__version__",
        "export",
        "finetune",
        "logging",
        "maxsim",
        "patch",
        "pipeline",
        "quantize",
        "set_seed",
        "unpatch",
        "validate",
    ]
    with pytest.raises(AttributeError, match="Nonsense"):
        modernbert.Nonsense  # noqa: B018


@pytest.mark.parametrize(
    "package",
    [modernbert, modernbert.corpus, modernbert.indexing, modernbert.tools, modernbert.training],
    ids=lambda p: p.__name__,
)
def test_exported_names_are_described(package):
    for name in package.__all__:
        exported = getattr(package, name)
        assert exported.__doc__, f"{name} has no docstring"
        for owner in exported.__mro__ if isinstance(exported, type) else ():
            if owner.__module__.startswith("modernbert."):
                for part, value in vars(owner).items():
                    if not part.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                        assert inspect.getdoc(getattr(exported, part)), f"{name}.{part} has no docstring"


def test_importing_is_lazy_and_help_needs_no_torch():
    code = "import modernbert, modernbert.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys\nfrom modernbert.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_first_vector_imports_little_beside_pytorch():
    """What takes the time until then are imports: of other packages only these, and of ours no room without a use."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        "from modernbert import pipeline\npipeline('sentence-embedding')('A text.')\n"
        "print(*sorted({name for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    new = done.stdout.split()
    others = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) - {"modernbert"}
    assert others <= {"numpy", "safetensors", "tokenizers", "torch"}, others
    assert not {"torch._dynamo", "torch._inductor"} & set(new)
    rooms = {name.split(".")[1] for name in new if name.count(".") > 0 and name.startswith("modernbert.")}
    assert not rooms & {"training", "serving", "retrieval", "interop", "indexing", "corpus", "cli", "tools"}


def test_importing_and_loading_do_without_the_compiler_of_pytorch():
    code = (
        "import sys, torch\nbefore = 'torch._dynamo' in sys.modules\n"
        "from modernbert import pipeline\npipeline('fill-mask')('A [MASK].')\n"
        "assert before or 'torch._dynamo' not in sys.modules"  # it takes a second to import
    )
    subprocess.run([sys.executable, "-c", code], check=True)
