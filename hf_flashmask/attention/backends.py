"""Which backend serves a call. An explicit choice is served or refused; "auto" chooses, and says so once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton", "hopper")
# Wider tiles do not fit into registers.
TRITON_MAX_HEAD_DIM = 256
HOPPER_MAX_HEAD_DIM = 256
HOPPER_AUTO_LENGTH = 1024  # shorter rows were not measured
HOPPER_FORWARD_LENGTH = {64: 8192, 128: HOPPER_AUTO_LENGTH, 256: HOPPER_AUTO_LENGTH}  # the forward's, by head dim


def choose(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend of the forward of checked inputs when any but "reference" is asked for; the same for the same inputs.

    It is one of "torch", "triton" and "hopper". Inside "triton", a forward of up to 16 queries is done by the kernels
    that split the keys (``triton/decode.py``), whether a gradient is wanted or not: the backward needs out and lse, no
    more, and a model says the same in evaluation and in training.

    Raises:
        NotImplementedError: the one asked for cannot serve the inputs.
    """
    if backend in ("triton", "hopper"):
        obstacle = _triton_obstacle(q, v) if backend == "triton" else _hopper_obstacle(q, k, v)
        if obstacle is not None:
            raise NotImplementedError(f"backend='{backend}' {obstacle}; use backend='auto' or 'torch'")
        return backend
    if backend == "torch" or q.device.type == "cpu":
        return "torch"
    obstacle = _triton_obstacle(q, v)
    if obstacle is not None:
        _say_once(
            logging.WARNING, f"flashmask: plain PyTorch (backend='torch') serves, since backend='triton' {obstacle}"
        )
        return "torch"
    if _hopper_pays(q, v) and _hopper_obstacle(q, k, v) is None:
        _say_once(logging.INFO, f"flashmask: the Hopper kernels serve {_name(q)}")
        return "hopper"
    _say_once(logging.INFO, f"flashmask: the Triton kernels serve {_name(q)}")
    return "triton"


def choose_backward(backend: str, q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool) -> str:
    """The backend of the backward: that of the forward, but for "triton" and "hopper", which save the same.

    Hopper's adds up dq in whatever order tiles come, so Triton's serves where the same bits are asked for. "auto" takes
    Hopper's where it was measured to be faster: at head dim 64 in shorter rows than its forward.
    """
    chosen = choose(backend, q, k, v)
    if deterministic and chosen == "hopper":
        return "triton"
    if backend == "auto" and chosen == "triton" and not deterministic and _hopper_backward_pays(q, v):
        return "hopper" if _hopper_obstacle(q, k, v) is None else chosen
    return chosen


def _hopper_pays(q: Tensor, v: Tensor) -> bool:
    """Where the Hopper forward was measured to be faster than the portable one (H200, Triton 3.6).

    At head dim 128 it is 1.03 to 1.4 times as fast (1K to 8K tokens), at 256 1.2 to 1.5 times (the same), at 64 1.04 to
    1.13 times (8K; 0.8 to 1.07 below).
    """
    return q.shape[3] == v.shape[3] and q.shape[1] >= HOPPER_FORWARD_LENGTH.get(q.shape[3], math.inf)


def _hopper_backward_pays(q: Tensor, v: Tensor) -> bool:
    """The same of the backward, by head dim: at 8K tokens 1.3 to 1.6 times as fast at 64, 1.2 to 1.4 at 128, 1.5 to 1.8
    at 256.
    """
    return q.shape[3] == v.shape[3] and q.shape[3] in (64, 128, 256) and q.shape[1] >= HOPPER_AUTO_LENGTH


def _hopper_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Hopper kernels cannot serve, or None."""
    if not _has_gluon():
        return "needs Triton 3.6 or newer with Gluon, which is not installed"
    if q.device.type != "cuda" or _capability(q.device) != (9, 0):
        return f"serves compute capability 9.0 (Hopper), got {_name(q)}"
    if _interpreted():
        return "does not run in Triton's interpreter (TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"serves float16 and bfloat16, got {q.dtype}"
    d, dv = q.shape[3], v.shape[3]
    if max(d, dv) > HOPPER_MAX_HEAD_DIM or d % 8 or dv % 8:
        return f"serves head dims that are multiples of 8 up to {HOPPER_MAX_HEAD_DIM}, got {d} and {dv}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not describable(t):
            return (
                f"needs {name} aligned to 16 bytes in every stride and with no broadcast dimension, got strides "
                f"{t.stride()}; {name}.contiguous() helps"
            )
    return None


def describable(t: Tensor) -> bool:
    """Whether a TMA descriptor can address a tensor ``[B, S, H, D]``: 16-byte alignment, no broadcast dimension."""
    strides = [t.stride(d) * t.element_size() for d in range(3) if t.shape[d] > 1]
    return (
        t.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides) and t.shape[3] * t.element_size() >= 16
    )


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


def moves_with_triton(x: Tensor) -> bool:
    """Whether rows of ``x`` are moved by a Triton kernel, at the speed of memory, whichever backend attends."""
    return _triton_obstacle(x, x) is None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gluon() -> bool:
    try:
        return importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is not None
    except ModuleNotFoundError:  # what a name with no such parent raises
        return False


def _interpreted() -> bool:
    """Triton's interpreter runs the kernels on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def _name(q: Tensor) -> str:
    return _device_name(q.device) if q.device.type == "cuda" else q.device.type


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)
