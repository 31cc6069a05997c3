"""``flashmask env``: versions, devices, which backend serves what and why, and its tiles."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import hf_flashmask
from hf_flashmask.attention.backends import choose, choose_backward
from hf_flashmask.bench.measure import table

PACKAGES = ("torch", "transformers", "triton", "trl", "peft", "accelerate", "datasets", "matplotlib")
# Those that this package, or what it stands on, reads and that change what runs.
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
BACKENDS = ("hopper", "triton", "torch")
HEAD_DIMS = (64, 128, 256)
LENGTH = 8192  # long enough for every choice that depends on it


def report() -> str:
    """The whole text, for a terminal or an issue."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    sections = [_versions()]
    for device in devices:
        sections += [_device(device), _choices(device), *_tiles(device)]
    return "\n\n".join(sections)


def _versions() -> str:
    rows = [
        ("hf-flashmask", f"{hf_flashmask.__version__} ({Path(hf_flashmask.__file__).parent})"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
    ]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}") or "none"))
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    return _aligned(rows)


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"device: CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    shared = f", {shared_memory // 1024} KiB of shared memory a block" if (shared_memory := _shared(found)) else ""
    return (
        f"device {device.index}: {found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors{shared}"
    )


def _shared(properties: object) -> int:
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32, torch.bfloat16)


def _choices(device: torch.device) -> str:
    """What "auto" takes, and what each backend says when it is asked for by name."""
    rows = []
    for dtype in _dtypes(device):
        for head_dim in HEAD_DIMS:
            q = torch.empty(1, LENGTH, 1, head_dim, dtype=dtype, device=device)
            passes = choose("auto", q, q, q), choose_backward("auto", q, q, q, deterministic=False)
            rows.append((_name(dtype), str(head_dim), *passes))
    taken = f"what auto takes at {LENGTH} tokens:\n" + table(("dtype", "head dim", "forward", "backward"), rows)
    sample = torch.empty(1, LENGTH, 1, 128, dtype=_dtypes(device)[0], device=device)
    asked = []
    for backend in BACKENDS:
        try:
            choose(backend, sample, sample, sample)
            asked.append((backend, "can serve"))
        except NotImplementedError as error:
            asked.append((backend, str(error)))
    return f"{taken}\n\n{_name(sample.dtype)}, head dim 128, asked for by name:\n{_aligned(asked)}"


def _tiles(device: torch.device) -> Iterator[str]:
    """Tile shapes of the kernels that could serve the device."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        from hf_flashmask.attention import torch_blocks

        yield (
            f"tiles: runs of visible keys, {torch_blocks._BLOCK_M} x {torch_blocks._BLOCK_N} where mixed "
            f"(backend='torch'; its matmul path {torch_blocks._MATMUL_BLOCK_N} keys)"
        )
        return
    from hf_flashmask.attention.triton import configs
    from hf_flashmask.attention.triton.launch import _device as limits

    capability, room = limits(device)
    rows = []
    for dtype in _dtypes(device):
        for head_dim in HEAD_DIMS:
            chosen = [
                configs.candidates(kernel, capability, room, head_dim, head_dim, dtype.itemsize)[0]
                for kernel in ("forward", "dq", "dkdv")
            ]
            shapes = [f"{c.block_m} x {c.block_n}, {c.num_warps} warps, {c.num_stages} stages" for c in chosen]
            rows.append((f"{_name(dtype)} {head_dim}", *shapes))
    yield "tiles of backend='triton', queries x keys:\n" + table(("dtype, head dim", "forward", "dQ", "dK, dV"), rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
