"""Devices, dtypes, free memory, and a description of the machine for reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.errors import InputError

CPUINFO = Path("/proc/cpuinfo")

DTYPES = ("float32", "bfloat16", "float16", "float64")


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is no such device here. Another is never used in its place.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r:.80}") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device: expected cpu, cuda, cuda:N or mps, got {str(found)!r}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: mps was asked for, but PyTorch finds no Apple GPU here; use cpu")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {found} was asked for, but PyTorch finds no CUDA device here; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: {found} was asked for, but there is none after cuda:{torch.cuda.device_count() - 1}"
        )
    return found


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        InputError: it is none of float64, float32, bfloat16 and float16.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_memory(
    what: str,
    needed: int,
    device: torch.device,
    advice: str = "use a 16-bit dtype, a smaller model or shorter texts",
) -> None:
    """Refuse to make something that needs more bytes than the device has free.

    Raises:
        InputError: it does not fit; the message has both numbers.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"memory: {what} needs {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; {advice}"
        )


def free_memory(device: torch.device) -> int | None:
    """The device's free bytes, or None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return None


def machine() -> dict[str, str | int | None]:
    """Processor, cores, threads, GPU and versions of this machine; None for what it lacks."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "tinyllama": _version("tinyllama"),
    }


def _processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def described(value: Any) -> str:
    """Shape, dtype and device of a tensor, or the type of another value, for messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
