"""The machine and the software on which a measurement was made."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

_PACKAGES = ("flashmoe_mlx", "mlx", "numpy", "hydra-core", "huggingface-hub", "tokenizers")


def environment() -> dict[str, Any]:
    """Return the properties of the machine and the software that a record keeps beside its measurements."""
    device = mx.default_device()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "mlx_device": str(device),
        "mlx_device_info": dict(mx.device_info(device)),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "command": sys.orig_argv,
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, as in a plain checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
