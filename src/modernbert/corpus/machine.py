"""What computes: the kind of machine and the versions that decide the bits of numbers, and what a process takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine_of(pipeline: Any) -> dict[str, Any]:
    """Dtype, kernels, kind of processor and versions, for a loaded pipeline."""
    import numpy
    import pyarrow
    import tokenizers
    import torch

    from modernbert import __version__
    from modernbert.engines.cpu.library import library
    from modernbert.tools.doctor import processor_features

    device, found = pipeline.device, library()
    kernels, processor, features = found.name if found else "none", platform.machine(), processor_features()
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        kernels, processor, features = "cuda", f"{about.name}, capability {about.major}.{about.minor}", []
    backend = next((m.backend for m in pipeline.model.modules() if hasattr(m, "backend")), None)
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": device.type,
        "kernels": kernels,
        "attention": getattr(backend, "name", None),
        "processor": processor,
        "features": features,
        "system": platform.system(),
        "versions": {
            "modernbert": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": numpy.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }


def memory_of(process: int) -> int:
    """Bytes of memory that a process holds, 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        return 0
