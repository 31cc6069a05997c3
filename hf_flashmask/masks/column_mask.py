"""ColumnMask: an attention mask as one or two hidden row intervals per key column.

Source: FlashMask, arXiv 2410.01359, section 3; the layout of ``startend_row_indices`` is Paddle's
``flashmask_attention``, so indices made for either run unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Which of (LTS, LTE, UTS, UTE) the bound vectors are, by (causal, number of vectors).
BOUND_NAMES = {
    (True, 1): ("LTS",),
    (True, 2): ("LTS", "LTE"),
    (False, 2): ("LTS", "UTE"),
    (False, 4): ("LTS", "LTE", "UTS", "UTE"),
}


def version_of(t: Tensor) -> int | None:
    """Rises when a tensor is written to; None where it is not counted, in inference mode and while tracing."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


class ColumnMask:
    """Which query rows each key column hides. Immutable; travels through models in place of a 4D mask.

    Args:
        bounds: int32 ``[B|1, Hm|1, C, Sk]``; Hm is 1, the number of key/value heads or of query heads. With row ``i``
            an absolute query index, starts inclusive and ends exclusive (an empty interval has start >= end; values
            out of range are clipped), column ``j`` hides

            - causal, C = 1: ``[LTS, Sq)`` and the causal triangle
            - causal, C = 2: ``[LTS, LTE)`` and the causal triangle
            - not causal, C = 2: ``[LTS, Sq)`` and ``[0, UTE)``
            - not causal, C = 4: ``[LTS, LTE)`` and ``[UTS, UTE)``, in either order
        causal: also hide ``i < j - (Sk - Sq)`` (aligned to the bottom right corner).
        q_len: number of query rows Sq; default Sk.

    Raises:
        TypeError, ValueError: ``bounds`` or ``q_len`` is not as described.
    """

    __slots__ = ("__weakref__", "_bounds", "_cache", "_causal", "_full_prefix", "_q_len")

    def __init__(self, bounds: Tensor, *, causal: bool, q_len: int | None = None) -> None:
        if not isinstance(bounds, Tensor):
            raise TypeError(f"bounds must be a torch.Tensor, got {type(bounds).__name__}")
        if bounds.dtype != torch.int32:
            raise TypeError(f"bounds must be int32, got {bounds.dtype}; convert with bounds.to(torch.int32)")
        if bounds.ndim != 4 or 0 in bounds.shape:
            raise ValueError(f"bounds must be a non-empty [B|1, Hm|1, C, Sk] tensor, got shape {tuple(bounds.shape)}")
        if (bool(causal), bounds.shape[2]) not in BOUND_NAMES:
            allowed = "1 or 2" if causal else "2 or 4"
            raise ValueError(
                f"causal={bool(causal)} takes {allowed} bound vectors (bounds [B, Hm, C, Sk], startend_row_indices "
                f"[B, Hm, Sk, C]), got C={bounds.shape[2]}"
            )
        q_len = bounds.shape[3] if q_len is None else q_len
        if isinstance(q_len, (Tensor, float, bool)) or q_len < 1:
            raise ValueError(f"q_len must be a positive int, got {q_len!r}")
        self._bounds = bounds
        self._causal = bool(causal)
        self._q_len = q_len
        self._cache: dict[Any, Any] = {}
        self._full_prefix: tuple[int, int | None] = (0, None)

    # ---- making one --------------------------------------------------------------------------------------------

    @classmethod
    def from_startend_row_indices(
        cls, startend_row_indices: Tensor, *, causal: bool, q_len: int | None = None
    ) -> ColumnMask:
        """From Paddle's int32 ``[B, Hm, Sk, C]`` layout; see the class for the meaning of C and ``causal``."""
        idx = startend_row_indices
        if not isinstance(idx, Tensor):
            raise TypeError(f"startend_row_indices must be a torch.Tensor, got {type(idx).__name__}")
        if idx.dtype != torch.int32:
            raise TypeError(f"startend_row_indices must be int32, got {idx.dtype}; convert with .to(torch.int32)")
        if idx.ndim != 4:
            raise ValueError(f"startend_row_indices must be [B, Hm, Sk, C], got shape {tuple(idx.shape)}")
        # A copy, even where one bound a column makes none necessary: indices may be written to later, a mask may not.
        bounds = idx.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return cls(bounds, causal=causal, q_len=q_len)

    @classmethod
    def from_dense(cls, mask: Tensor) -> ColumnMask:
        """From a dense mask ``[B|1, H|1, Sq, Sk]``: bool (True = visible) or additive float.

        Exact, with the fewest bound vectors that are. Works in blocks of rows: no tensor larger than the input is
        made. Reads the mask's values, so it synchronises with its device.

        Raises:
            ValueError: a float mask has other values than 0 (visible) and -1e4 or less (masked: its softmax weight
                is zero); or a column has more than two masked intervals (the message names the first one).
        """
        from .convert import from_dense

        return from_dense(mask)

    @classmethod
    def from_masked_intervals(cls, start: Tensor, end: Tensor, *, q_len: int) -> ColumnMask:
        """From any number K of masked row intervals per column, int ``[B|1, Hm|1, K, Sk]`` each.

        Raises:
            ValueError: they do not merge into two intervals or fewer in some column.
        """
        from .convert import from_masked_intervals

        return from_masked_intervals(start, end, q_len=q_len)

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> Tensor:
        """int32 ``[B|1, Hm|1, C, Sk]``, not to be written to."""
        return self._bounds

    @property
    def causal(self) -> bool:
        return self._causal

    @property
    def full_prefix(self) -> int:
        """So many of the first columns are known, without a look at the bounds, to be visible to every row.

        What makes a mask may set it and answers for it: kernels believe it. Whatever is derived from a mask starts at
        0, nothing known, again; so does one whose bounds were written to.
        """
        columns, version = self._full_prefix
        return columns if version == self.version else 0

    @full_prefix.setter
    def full_prefix(self, columns: int) -> None:
        tracing = torch.compiler.is_compiling()  # where lengths are symbols, and comparing them costs a recompilation
        if isinstance(columns, (bool, Tensor)) or not (tracing or 0 <= columns <= self.kv_len):
            raise ValueError(f"full_prefix must be an int from 0 to the {self.kv_len} columns, got {columns!r}")
        self._full_prefix = (columns, self.version)

    @property
    def version(self) -> int | None:
        """Rises when the bounds are written to, against the rules: what was worked out from them no longer holds.

        None where tensors have none: in inference mode, and while ``torch.compile`` traces.
        """
        return version_of(self._bounds)

    @property
    def q_len(self) -> int:
        return self._q_len

    @property
    def kv_len(self) -> int:
        return self._bounds.shape[3]

    @property
    def startend_row_indices(self) -> Tensor:
        """int32 ``[B|1, Hm|1, Sk, C]``, contiguous: Paddle's layout, a copy."""
        return self._bounds.transpose(2, 3).clone(memory_format=torch.contiguous_format)

    @property
    def shape(self) -> torch.Size:
        """Shape of the 4D mask that this stands for: ``[B|1, Hm|1, Sq, Sk]``."""
        batch, heads, _, kv_len = self._bounds.shape
        return torch.Size((batch, heads, self._q_len, kv_len))

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self._bounds.device

    def to(self, *args: Any, **kwargs: Any) -> ColumnMask:
        """Moves to a device. As for a tensor; a dtype is accepted and ignored, since bounds are always int32.

        The same device gives the same mask, so that all layers on it share what was planned for it.
        """
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or torch.device(device) == self.device:
            return self
        key = ("to", torch.device(device), self.version)
        if key not in self._cache:
            # Outside inference mode: a later training step may use what an evaluation step moved.
            with torch.inference_mode(False):
                self._cache[key] = self._moved(self._bounds.to(device, non_blocking=non_blocking))
                self._cache[key].full_prefix = self.full_prefix
        moved: ColumnMask = self._cache[key]
        return moved

    def cuda(self, device: Any = None) -> ColumnMask:
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def cpu(self) -> ColumnMask:
        return self.to("cpu")

    def contiguous(self) -> ColumnMask:
        """Itself when the bounds are contiguous, as caches of a fixed size ask for."""
        if self._bounds.is_contiguous():
            return self
        return self._moved(self._bounds.contiguous())

    def outside_inference_mode(self) -> ColumnMask:
        """The same of a mask that was made in inference mode, whose bounds no backward may keep. Made once."""
        if "outside" not in self._cache:
            with torch.inference_mode(False):
                self._cache["outside"] = self._moved(self._bounds.clone())
                self._cache["outside"].full_prefix = self.full_prefix
        outside: ColumnMask = self._cache["outside"]
        return outside

    def clone(self) -> ColumnMask:
        return self._moved(self._bounds.clone())

    def _moved(self, bounds: Tensor) -> ColumnMask:
        """The same mask over a copy of its bounds."""
        return ColumnMask(bounds, causal=self._causal, q_len=self._q_len)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._bounds, self._causal, self._q_len)

    # ---- its intervals -----------------------------------------------------------------------------------------

    def masked_intervals(self) -> tuple[Tensor, Tensor]:
        """The hidden rows of every column, with ``causal`` folded in.

        Returns:
            ``(start, end)``: int32 ``[B|1, Hm|1, 2, Sk]``, disjoint, ascending and clipped to ``[0, Sq]``; unused
            intervals are ``(Sq, Sq)``. Computed once.
        """
        key = ("intervals", self.version)
        if key not in self._cache:
            # Outside inference mode: a later backward may use what an evaluation step computed first.
            with torch.inference_mode(False):
                start, end, _ = intervals.merge(*self._raw_intervals(), self._q_len)
                self._cache[key] = (start, end)
        return self._cache[key]

    def _raw_intervals(self) -> tuple[Tensor, Tensor]:
        vectors = dict(zip(BOUND_NAMES[self._causal, self._bounds.shape[2]], self._bounds.unbind(2), strict=True))
        lts = vectors["LTS"]
        lte = vectors.get("LTE", torch.full_like(lts, self._q_len))
        uts = vectors.get("UTS", torch.zeros_like(lts))
        if self._causal:
            diagonal = torch.arange(self.kv_len, dtype=torch.int32, device=self.device) - (self.kv_len - self._q_len)
            ute = diagonal.expand_as(lts)
        else:
            ute = vectors["UTE"]
        return torch.stack((lts, uts), 2), torch.stack((lte, ute), 2)

    def visible_rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """How many rows of ``[first, last)`` see each column: int32 ``[B|1, Hm|1, Sk]``."""
        last = self._q_len if last is None else last
        return (last - first) - intervals.covered(*self.masked_intervals(), first, last)

    def masked_rows(self, first: int, last: int) -> Tensor:
        """The dense rows ``[first, last)``: bool ``[B|1, Hm|1, last - first, Sk]``, True = hidden."""
        start, end = self.masked_intervals()
        row = torch.arange(first, last, dtype=torch.int32, device=self.device)[:, None]
        hidden = (row >= start[:, :, 0, None]) & (row < end[:, :, 0, None])
        return hidden | ((row >= start[:, :, 1, None]) & (row < end[:, :, 1, None]))

    def to_dense(self) -> Tensor:
        """bool ``[B|1, Hm|1, Sq, Sk]``, True = visible. O(Sq x Sk) memory: for tests and small masks."""
        return ~self.masked_rows(0, self._q_len)

    # ---- combining and slicing ---------------------------------------------------------------------------------

    def __and__(self, other: ColumnMask) -> ColumnMask:
        """Visible where both are. Raises ValueError when a column would need more than two intervals."""
        if not isinstance(other, ColumnMask):
            return NotImplemented
        if (self.q_len, self.kv_len) != (other.q_len, other.kv_len):
            raise ValueError(
                f"masks of different sizes: {self.q_len} x {self.kv_len} and {other.q_len} x {other.kv_len}"
            )
        if self.device != other.device:
            raise ValueError(f"masks on {self.device} and {other.device}; move one with .to()")
        try:
            batch, heads = torch.broadcast_shapes(self.shape[:2], other.shape[:2])
        except RuntimeError:
            raise ValueError(
                f"masks of different batches or heads: {tuple(self.shape[:2])} and {tuple(other.shape[:2])}; each must "
                "be 1 or that of the other"
            ) from None
        parts = [
            [t.expand(batch, heads, -1, -1) for t in pair]
            for pair in (self.masked_intervals(), other.masked_intervals())
        ]
        start, end = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        return ColumnMask.from_masked_intervals(start, end, q_len=self._q_len)

    def __getitem__(self, index: Any) -> ColumnMask:
        """Slices of batch, heads, query rows and key columns, e.g. ``mask[:, :, -4:, :128]``; step 1 only."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = index[:at] + (slice(None),) * (5 - len(index)) + index[at + 1 :]
        index = index + (slice(None),) * (4 - len(index))
        if len(index) != 4 or not all(isinstance(s, slice) and s.step in (None, 1) for s in index):
            raise NotImplementedError(
                f"a ColumnMask takes up to four slices of step 1, got {index!r}; use to_dense() for other indexing"
            )
        batch, heads, rows, columns = (slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
        q_len = rows.stop - rows.start
        if q_len == self._q_len and columns.stop - columns.start == self.kv_len:
            return ColumnMask(self._bounds[batch, heads], causal=self._causal, q_len=q_len)
        # A triangle that would no longer end in the bottom right corner becomes an interval of its own.
        causal = self._causal and (self.kv_len - columns.stop) == (self._q_len - rows.stop)
        bounds = self._bounds if causal else self.bounds_without_causal()
        bounds = bounds[batch, heads, :, columns].clamp(0, self._q_len) - rows.start
        return ColumnMask(bounds.contiguous(), causal=causal, q_len=q_len)

    def bounds_without_causal(self) -> Tensor:
        """The bounds of the same mask with ``causal=False``: a causal triangle is one of them, [UTS = 0, UTE)."""
        if not self._causal:
            return self._bounds
        lts = self._bounds[:, :, 0]
        ute = self._raw_intervals()[1][:, :, 1]
        one = self._bounds.shape[2] == 1
        return torch.stack((lts, ute) if one else (lts, self._bounds[:, :, 1], torch.zeros_like(lts), ute), 2)

    def sort_columns(self, window: int | None = None) -> tuple[ColumnMask, Tensor]:
        """The mask with its columns sorted by the row from which on they are hidden, and the order.

        ``flashmask_attention(..., sort_keys=True)`` does so, and moves keys and values alike. The ``tile_sparsity`` of
        what is returned, against that of the mask, says what there is to win.

        Args:
            window: columns move only within windows of so many, for a causal mask to stay near its diagonal. Default:
                an eighth of them, but 128 to 1024.

        Returns:
            ``(mask, order)``: column ``c`` of the new mask, which is not causal by itself, is column ``order[..., c]``
            of this one; int64 ``[B|1, Hm|1, Sk]``. Equal columns keep their order.
        """
        from .order import sort_columns

        return sort_columns(self, window)

    # ---- how much it hides -------------------------------------------------------------------------------------

    def visible_pairs(self) -> int:
        """Visible (row, column) pairs, summed over the mask's own batch and heads. Synchronises."""
        return int(self.visible_rows().sum(dtype=torch.int64))

    def density(self) -> float:
        """Visible pairs over all pairs, exactly, from O(N) bounds."""
        batch, heads, q_len, kv_len = self.shape
        return self.visible_pairs() / (batch * heads * q_len * kv_len)

    def tile_map(self, block_m: int = 128, block_n: int = 128) -> Tensor:
        """State of every tile: int8 ``[B|1, Hm|1, ceil(Sq / block_m), ceil(Sk / block_n)]``.

        0 = hidden (a kernel skips it), 1 = partial, 2 = fully visible; exact. Tiles at the edge count only the rows and
        columns that exist.
        """
        if block_m < 1 or block_n < 1:
            raise ValueError(f"block_m and block_n must be positive, got {block_m} and {block_n}")
        batch, heads, q_len, kv_len = self.shape
        padding = -kv_len % block_n
        states = []
        for first in range(0, q_len, block_m):
            last = min(first + block_m, q_len)
            visible = torch.nn.functional.pad(self.visible_rows(first, last), (0, padding))
            seen = visible.view(batch, heads, -1, block_n).sum(-1)
            area = torch.full_like(seen[0, 0], (last - first) * block_n)
            area[-1] -= (last - first) * padding
            states.append((seen > 0).to(torch.int8) + (seen == area).to(torch.int8))
        return torch.stack(states, 2)

    def tile_sparsity(self, block_m: int = 128, block_n: int = 128) -> float:
        """Share of tiles that a kernel skips, as the paper's "block sparsity"."""
        return float((self.tile_map(block_m, block_n) == 0).double().mean())

    # ---- showing it --------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        batch, heads, q_len, kv_len = self.shape
        names = ", ".join(BOUND_NAMES[self._causal, self._bounds.shape[2]])
        kind = "causal " if self._causal else ""
        return f"ColumnMask({kind}{names}; B={batch}, Hm={heads}, Sq={q_len}, Sk={kv_len}, device={self.device})"

    def draw(self, size: int = 32, *, batch: int = 0, head: int = 0) -> str:
        """The mask as text, at most ``size`` characters a side: ``#`` visible, ``+`` partly, ``.`` hidden."""
        from .draw import draw

        return draw(self, size, batch=batch, head=head)

    def plot(self, *, batch: int = 0, head: int = 0, title: str | None = None, ax: Axes | None = None) -> Figure:
        """The mask as a matplotlib figure: keys on top, queries down; hidden, partial and full tiles."""
        from .draw import plot

        return plot(self, batch=batch, head=head, title=title, ax=ax)


def _rebuild(bounds: Tensor, causal: bool, q_len: int) -> ColumnMask:
    return ColumnMask(bounds, causal=causal, q_len=q_len)
