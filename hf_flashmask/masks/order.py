"""Key columns in another order: neighbours that hide about the same rows hide whole tiles.

Attention does not depend on the order of its keys, so a mask whose columns were moved, with keys and values moved
alike, gives the same result. Columns that lose their readers one by one, in any order, as under a random eviction,
leave every tile partly visible; sorted, some tiles are hidden and some full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .column_mask import ColumnMask

# Wider windows sort better, but more of each of them lies on the diagonal, where every one of its tiles is partial.
MAX_WINDOW = 1024
MIN_WINDOW = 128


def sort_columns(mask: ColumnMask, window: int | None = None) -> tuple[ColumnMask, Tensor]:
    """See ``ColumnMask.sort_columns``."""
    if window is None:
        window = min(MAX_WINDOW, max(MIN_WINDOW, mask.kv_len // 8))
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive int, got {window!r}")
    windows = torch.arange(mask.kv_len, device=mask.device) // window
    order = (windows * (mask.q_len + 1) + _seen_until(mask)).argsort(dim=-1, stable=True)
    bounds = mask.bounds_without_causal()
    bounds = bounds.gather(-1, order.unsqueeze(2).expand_as(bounds))
    return ColumnMask(bounds, causal=False, q_len=mask.q_len), order


def _seen_until(mask: ColumnMask) -> Tensor:
    """The row from which on no row sees a column: int32 ``[B|1, Hm|1, Sk]``."""
    start, end = mask.masked_intervals()
    last = (start[:, :, 1] < mask.q_len).long().unsqueeze(2)  # of its one or two hidden intervals; unused ones are last
    start, end = start.gather(2, last).squeeze(2), end.gather(2, last).squeeze(2)
    return torch.where(end == mask.q_len, start, mask.q_len)
