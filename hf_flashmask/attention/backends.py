"""Which backend serves a call. An explicit choice is served or refused; "auto" chooses, and says so once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton")
# Wider tiles do not fit into registers.
TRITON_MAX_HEAD_DIM = 256


def choose(backend: str, q: Tensor, v: Tensor) -> str:
    """The backend that serves checked inputs when "auto", "torch" or "triton" is asked for: "torch" or "triton".

    The same for the same inputs, so that a backward gets what its forward got.

    Raises:
        NotImplementedError: "triton" was asked for and cannot serve the inputs.
    """
    if backend == "triton":
        obstacle = _triton_obstacle(q, v)
        if obstacle is not None:
            raise NotImplementedError(f"backend='triton' {obstacle}; use backend='auto' or 'torch'")
        return backend
    if backend == "torch" or q.device.type == "cpu":
        return "torch"
    obstacle = _triton_obstacle(q, v)
    if obstacle is None:
        _say_once(logging.INFO, f"flashmask: the Triton kernels serve {_name(q)}")
        return "triton"
    _say_once(logging.WARNING, f"flashmask: plain PyTorch (backend='torch') serves, since backend='triton' {obstacle}")
    return "torch"


def _triton_obstacle(q: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot serve, or None."""
    if not _has_triton():
        return "needs the triton package, which is not installed"
    if q.dtype == torch.float64:
        return "has no float64"
    if max(q.shape[3], v.shape[3]) > TRITON_MAX_HEAD_DIM:
        return f"serves head dims up to {TRITON_MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]}"
    if q.device.type == "cpu":
        if not _interpreted():
            return "needs a GPU, got CPU tensors"
        return "has no bfloat16 in Triton's interpreter" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"serves CUDA and ROCm devices, got {q.device.type}"
    capability = _capability(q.device)
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0 or newer, {_name(q)} has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Triton's interpreter runs the kernels on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def _name(q: Tensor) -> str:
    return torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else q.device.type


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)
