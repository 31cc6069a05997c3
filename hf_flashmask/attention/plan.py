"""TileList: which tiles of the score matrix a kernel visits, as spans of tiles, made and kept on the device.

Knows no kernel language. The kernels that make a list are in ``triton/plan.py``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_flashmask.masks import ColumnMask

# Spans of a kind (partial, full) that a line has room for.
MAX_SPANS = 64


class TileList(NamedTuple):
    """For every line of tiles, a row or a column of the tile grid, the tiles that it visits.

    A span ``[first, last)`` is a run of tiles of one kind, ascending. A line with more than ``capacity`` spans of a
    kind is given as one partial span from its first to its last visited tile: still exact, since kernels mask partial
    tiles, only slower. Memory is O(lines), never per tile. A mask is one of the ``[B|1, Hm|1]`` of a ``ColumnMask``.
    """

    # int16, read as unsigned, [masks * lines * 2 * capacity + 1, 2]: a line's partial spans, then its full ones
    spans: Tensor
    counts: Tensor  # int32 [masks, lines, 2]: partial and full tiles
    order: Tensor  # int32 [masks, lines]: lines, heaviest first
    capacity: int

    @property
    def lines(self) -> int:
        return self.order.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.spans, self.counts, self.order))


T = TypeVar("T")
# What was planned lives as long as the bounds it was made from, so all layers and the backward share it.
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached(mask: ColumnMask, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, remembered for the mask's bounds tensor, its version and ``key``.

    A plan that a CUDA graph uses is made inside that graph's capture, so that a replay plans for the bounds it meets.
    Bounds that are written to are noticed by their version; those made in inference mode have none and must stay as
    they are.
    """
    capture = _capture_id() if mask.device.type == "cuda" else 0
    if capture is None:
        return make()
    plans = _plans.setdefault(mask.bounds, {})
    version = mask.version
    for known in [k for k in plans if k[0] == capture and k[1] != version]:
        del plans[known]
    full_key = (capture, version, mask.causal, mask.q_len, key)
    if full_key not in plans:
        # Outside inference mode: a later backward may use what an evaluation step made.
        with torch.inference_mode(False):
            plans[full_key] = make()
    result: T = plans[full_key]
    return result


def _capture_id() -> int | None:
    """0 when no CUDA graph is being captured, else a number that no other capture has; None if it cannot be known."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    query = _capture_query()
    if query is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = query(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if error == 0 and number.value else None


@functools.cache
def _capture_query() -> Any:
    """The driver's cuStreamGetCaptureInfo_v2, which torch does not expose; None on other platforms."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
