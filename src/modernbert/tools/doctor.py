"""What this installation has, what a model will run on here, and what would make it faster; whether anything is broken.

`examine` gives sections of plain values, what is wrong (`problems`) and what could be better (`advice`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from modernbert.auto import AutoConfig
from modernbert.config import Config, ModernBertConfig, ModernBertDecoderConfig
from modernbert.engines.cpu import library as cpu
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.guard import Frozen
from modernbert.errors import BackendError
from modernbert.io.hub import cache_folder
from modernbert.models.decoder import ModernBertDecoderModel
from modernbert.models.encoder import ModernBertModel
from modernbert.nn.linear import multiplies_bfloat16, onednn_computes
from modernbert.quantization.options import Record
from modernbert.tools.info import checkpoint_info

_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16",
)  # fmt: skip
# Environment variables that change how fast everything is, or what is found.
_VARIABLES = re.compile(r"OMP_|GOMP_|KMP_|MKL_|ONEDNN_|MODERNBERT_|HF_HUB|HF_HOME|CUDA_VISIBLE|TOKENIZERS_PARALLELISM")
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the self-test, beside states of about 1
_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}


class Report:
    """What is found, in sections, and what there is to say of it."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.advice: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**self.sections, "problems": self.problems, "advice": self.advice, "ok": not self.problems}


def examine(
    model: str | None = None, revision: str | None = None, cores: int = 1, quota: float | None = None
) -> Report:
    """Examine this installation and, if one is named, a model.

    Args:
        model: a folder or a repository on the Hub.
        revision: branch, tag or commit.
        cores: processors that this process may use.
        quota: cores' worth of time that its control groups allow, if they limit it.

    Raises:
        NotFoundError, CheckpointError, ConfigError: the model cannot be read.
    """
    report = Report()
    report.sections["package"] = {
        "modernbert": importlib.metadata.version("modernbert"),
        "at": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    report.sections["torch"] = _torch(report)
    report.sections["kernels"] = _kernels(report)
    report.sections["processor"] = _processor(report, cores, quota)
    report.sections["memory"] = _memory()
    report.sections["cards"] = _cards(report)
    report.sections["packages"] = _packages(report)
    report.sections["Hub cache"] = _hub_cache()
    if not report.problems:
        report.sections["self-test"] = _self_test(report)
    if model is not None:
        report.sections |= _model(report, model, revision)
    return report


def _torch(report: Report) -> dict[str, Any]:
    kind = "CPU alone"
    if torch.version.cuda is not None or torch.version.hip is not None:
        kind = f"ROCm {torch.version.hip}" if torch.version.hip is not None else f"CUDA {torch.version.cuda}"
    openmp = {Path(line.split()[-1]).name for line in _lines("/proc/self/maps") if re.search(r"lib[gi]?omp", line)}
    if len(openmp) > 1:
        report.advice.append(
            f"{' and '.join(sorted(openmp))} are loaded, and their threads wait for each other's cores"
        )
    return {
        "version": torch.__version__,
        "built for": kind,
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
        "OpenMP": ", ".join(sorted(openmp)) or "inside PyTorch",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _kernels(report: Report) -> dict[str, Any]:
    asked = os.environ.get("MODERNBERT_KERNELS", "")
    found: dict[str, Any] = {"file": str(cpu.FILE) if cpu.FILE.exists() else "not built"}
    try:
        library = cpu.library()
    except BackendError as error:
        report.problems.append(str(error))
        return found | {"serving": "none"}
    if library is not None:
        why = "MODERNBERT_KERNELS names them" if asked else "the best that this processor runs"
        found |= {"serving": library.name, "because": why, "bfloat16 products": library.multiplies_bfloat16}
    elif asked == "none":
        found |= {"serving": "none", "because": "MODERNBERT_KERNELS is none"}
        report.advice.append("MODERNBERT_KERNELS is none: unset it, and models run on compiled kernels")
    elif cpu.FILE.exists():
        found |= {"serving": "none", "because": "the file cannot be loaded"}
        report.problems.append(f"the kernels in {cpu.FILE} cannot be loaded: install the package again")
    else:
        compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
        found |= {"serving": "none", "because": "no C compiler was there when the package was installed"}
        first = "" if compiler else "install a C compiler (gcc or clang), then "
        report.advice.append(f"no kernels: {first}install the package again, which builds them")
    return found


def _processor(report: Report, cores: int, quota: float | None) -> dict[str, Any]:
    values: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    threads, usable = torch.get_num_threads(), cores if quota is None else max(1, min(cores, int(quota)))
    variables = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}
    if threads > usable:
        limit = f"{cores} processors" if quota is None or quota >= cores else f"{quota:g} cores' worth of time"
        report.advice.append(
            f"PyTorch takes {threads} threads, and this process may use {limit}: set OMP_NUM_THREADS={usable}"
        )
    elif threads < usable:
        physical = _physical_cores()
        if physical is None or threads < min(physical, usable):
            report.advice.append(
                f"PyTorch takes {threads} of {usable} processors: OMP_NUM_THREADS={usable} would use them all"
            )
    if variables.get("OMP_WAIT_POLICY", "").lower() == "active" and usable < (os.cpu_count() or 1):
        report.advice.append("OMP_WAIT_POLICY is active, and other processes share the cores: set it to passive")
    return {
        "name": values.get("model name") or platform.processor() or platform.machine(),
        "features": processor_features(),
        "bfloat16 products": "made for it" if multiplies_bfloat16() else "computed as float32",
        "processors": cores,
        "allowed": "no limit" if quota is None else f"{quota:g} cores' worth of time",
        "threads": threads,
        "variables": variables or "none that matter",
    }


def _physical_cores() -> int | None:
    pairs = set()
    place: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        place[name.strip()] = value.strip()
        if name.strip() == "core id":
            pairs.add((place.get("physical id"), value.strip()))
    return len(pairs) or None


def _memory() -> dict[str, Any]:
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if ":" in line}
    found: dict[str, Any] = {}
    for name, key in (("total", "MemTotal"), ("available", "MemAvailable")):
        if key in sizes:
            found[name] = f"{sizes[key] / 2**30:,.1f} GiB"
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max")
    if limit.isdecimal():
        found["allowed"] = f"{int(limit) / 2**30:,.1f} GiB"
    return found or {"total": "unknown on this system"}


def _cards(report: Report) -> dict[str, Any]:
    driver = next((line.split()[7] for line in _lines("/proc/driver/nvidia/version") if "NVRM" in line), None)
    found: dict[str, Any] = {"driver": driver} if driver else {}
    for index in range(torch.cuda.device_count()):
        about, device = torch.cuda.get_device_properties(index), torch.device("cuda", index)
        kernels = "Triton kernels" if gpu.serving(torch.bfloat16, device) else "PyTorch alone"
        size = f"{about.total_memory / 2**30:,.0f} GiB"
        found[f"cuda:{index}"] = f"{about.name}, {size}, capability {about.major}.{about.minor}, {kernels}"
        if kernels == "PyTorch alone" and importlib.util.find_spec("triton") is None:
            report.advice.append("triton is not installed: the extra gpu brings the kernels for cards")
    nodes = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    if nodes and not torch.cuda.is_available():
        why = "is built for CPUs alone" if torch.version.cuda is torch.version.hip is None else "cannot use it"
        report.advice.append(f"there is a card ({nodes[0]}), and this PyTorch {why}: install PyTorch for it")
    return found or {"found": "none"}


def _packages(report: Report) -> dict[str, Any]:
    """Every requirement by its extra: the version that is installed, and whether it is one that is supported."""
    found: dict[str, dict[str, str]] = {}
    for requirement, extra in _requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        said = version or "missing"
        if version and not requirement.specifier.contains(version, prereleases=True):
            said = f"{version}, outside {requirement.specifier}"
            needs = f"{requirement.name} {version} is installed, and {extra or 'the package'} needs"
            (report.problems if not extra else report.advice).append(f"{needs} {requirement.specifier}")
        elif not version and not extra:
            report.problems.append(f"{requirement.name} is missing: install the package again")
        found.setdefault(extra or "always", {})[requirement.name] = said
    return {
        extra: "not installed" if extra != "always" and set(names.values()) == {"missing"} else names
        for extra, names in found.items()
    }


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """What the package requires, and by which extra; what only its development needs is left out."""
    for line in importlib.metadata.requires("modernbert") or ():
        requirement = Requirement(line)
        extra = next(iter(re.findall(r"extra == ['\"]([\w-]+)['\"]", line)), "")
        here = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra != "dev" and requirement.name != "modernbert" and here:
            yield requirement, extra


def _hub_cache() -> dict[str, Any]:
    folder, offline = cache_folder()
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    return {
        "folder": str(folder),
        "repositories": models,
        "free": f"{free / 2**30:,.1f} GiB",
        "offline": offline,
    }


@torch.no_grad()
def _self_test(report: Report) -> dict[str, Any]:
    """Small models of random numbers, by the kernels and by plain PyTorch."""
    found: dict[str, Any] = {}
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        for cls, made in (
            (ModernBertModel, ModernBertConfig(**_SMALL, **_TOKENS, num_hidden_layers=2)),
            (ModernBertDecoderModel, ModernBertDecoderConfig(**_SMALL, **_TOKENS, num_hidden_layers=2)),
        ):
            torch.manual_seed(0)
            exact = cls(made, "eager").eval()
            lengths = torch.tensor([0, 150, 157, 200])
            ids = torch.randint(3, made.vocab_size, (200,), generator=generator)
            wanted = exact(ids, cu_seqlens=lengths.int()).last_hidden_state
            for device in devices:
                for dtype, limit in _LIMITS.items():
                    fast = cls(made).eval()
                    fast.load_state_dict(exact.state_dict())
                    fast = fast.to(device=device, dtype=dtype).optimize_for_inference()
                    given = fast(ids.to(device), cu_seqlens=lengths.int().to(device)).last_hidden_state
                    gap = float((given.cpu().float() - wanted).abs().max())
                    kind = "decoder" if cls is ModernBertDecoderModel else "encoder"
                    name = f"{kind}, {str(dtype).removeprefix('torch.')}, {device}"
                    right = gap <= limit
                    found[name] = f"{'OK' if right else 'WRONG'}, {_runs_on(fast)}, within {gap:.1e} of plain PyTorch"
                    if not right:
                        report.problems.append(
                            f"{name} differs by {gap:.1e} from plain PyTorch, and {limit:g} is allowed"
                        )
    return found


def _runs_on(model: Any) -> str:
    """The engine and the attention of an optimized bare model."""
    frozen, library = model.runner, cpu.library()
    layers = frozen.layers if isinstance(frozen, Frozen) else None
    attention = "native" if layers is not None and model.attn_implementation == "auto" else model.backend.name
    if layers is None:
        products = "kernels for products" if cpu.serving(model.dtype, model.device) else "PyTorch"
        return f"{products}, module by module, {attention} attention"
    if model.device.type == "cuda":
        return f"Triton kernels, {model.backend.name} attention"
    return f"{library.name if library else 'PyTorch'} kernels, whole layers, {attention} attention"


def _model(report: Report, name: str, revision: str | None) -> dict[str, Any]:
    """What a model is, and what runs it here."""
    found = checkpoint_info(name, [], revision)
    about = {key: found["model"][key] for key in ("name", "class", "kind", "parameters", "dtype")}
    about["tokenizer"] = found["tokenizer"]["ids"]
    if "adapter" in found:
        about["adapter"] = found["adapter"]
    if "not served" in found:
        report.problems.append(f"{name} asks for {', '.join(found['not served'])}, which is not served")
    if not isinstance(about["tokenizer"], int):
        report.problems.append(f"{name} has no tokenizer.json: pipelines and commands need one")
    config = AutoConfig.from_pretrained(name, revision=revision)
    record = Record.of(config)
    if "self-test" not in report.sections:  # what is broken would break here, too
        return {"model": about}
    kernels = cpu.library()
    if record is not None:
        return {
            "model": about,
            "runs on": {"cpu": f"{record.scheme}, {kernels.name if kernels else 'PyTorch'} kernels"},
        }
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    runs = {
        f"{device}, {str(dtype).removeprefix('torch.')}": _trial(config, device, dtype)
        for device in devices
        for dtype in (torch.float32, torch.bfloat16)
    }
    _advise(report, about["dtype"], devices, found["model"]["parameters"])
    return {"model": about, "runs on": runs}


@torch.no_grad()
def _trial(config: Config, device: str, dtype: torch.dtype) -> str:
    """What runs one layer of such a model, with random numbers and few ids, after `optimize_for_inference`."""
    cls: Any = ModernBertDecoderModel if isinstance(config, ModernBertDecoderConfig) else ModernBertModel
    changes = {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 128, **_TOKENS, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        made = cls(config.replace(**changes, pruned_heads={})).eval().to(device=device, dtype=dtype)
        return _runs_on(made.optimize_for_inference())


def _advise(report: Report, stored: str, devices: list[str], parameters: int) -> None:
    library = cpu.library()
    fast = library.multiplies_bfloat16 if library is not None else onednn_computes(torch.bfloat16) == torch.bfloat16
    if len(devices) > 1:
        report.advice.append(f'there is a card: device="{devices[1]}", and dtype="bfloat16" where it may round')
    if fast and stored != "BF16":
        read_as = f"{stored}, read as float32" if stored == "F16" else stored
        report.advice.append(
            f'weights are {read_as}, and this processor multiplies bfloat16: dtype="bfloat16" is about twice as fast, '
            f"with half the memory ({parameters * 2 / 2**20:,.0f} MiB)"
        )
    elif stored == "BF16" and not fast and len(devices) == 1:
        report.advice.append(
            'weights are BF16, which this processor computes as float32: dtype="float32" is as fast, and exact'
        )
    if library is not None and "vnni" in "".join(_processor_flags()):
        report.advice.append(
            "this processor multiplies 8-bit integers (VNNI): `modernbert quantize` makes an int8 model"
        )
    report.advice.append("outside of pipelines, call model.optimize_for_inference() before serving")


def _processor_flags() -> set[str]:
    line = next((line for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def processor_features() -> list[str]:
    """What the processor can do that kernels are chosen by, such as "avx512_bf16"."""
    flags = _processor_flags()
    return [name for name in _FEATURES if name in flags]
