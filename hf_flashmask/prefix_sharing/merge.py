"""Rows of a batch as prefix tries in depth-first order: pure tensor arithmetic on the rows' device.

Sorting rows puts those that begin alike side by side, longest common beginnings first, so the sorted rows, each without
what it shares with the row before it, are a trie in depth-first pre-order. Rows are compared token by token: no hashes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask
from hf_flashmask.masks.intervals import row_blocks


class MergedRows(NamedTuple):
    """Rows ``[N, L]`` as one row of T tokens, in which everything that several rows begin with stands once."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]: the positions that the tokens have in their rows
    mask: ColumnMask  # a token sees its row up to itself
    places: Tensor  # int64 [N, L]: where every token of the rows went; 0 for padding
    real: Tensor  # bool [N, L]: False for padding
    rows_tokens: int  # tokens of the rows, padding left out

    def restore(self, hidden: Tensor) -> Tensor:
        """``[1, T, H]`` of the merged row as ``[N, L, H]`` of the rows; zeros for padding. Differentiable."""
        rows = hidden[0].index_select(0, self.places.flatten()).view(*self.places.shape, -1)
        return rows.masked_fill(~self.real.unsqueeze(-1), 0)

    def reaching(self, position: Tensor) -> MergedRows:
        """One more token at this position, which nothing sees and no row has: for what looks at the largest one."""
        total = self.input_ids.shape[1]
        more = (
            self.input_ids[:, :1],
            position.to(self.position_ids).view(1, 1),
            self.mask.bounds.new_tensor(total + 1),
        )
        return self._replace(
            input_ids=torch.cat((self.input_ids, more[0]), 1),
            position_ids=torch.cat((self.position_ids, more[1]), 1),
            mask=ColumnMask(torch.cat((self.mask.bounds, more[2].view(1, 1, 1, 1)), -1), causal=True),
        )


def merge_rows(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> MergedRows:
    """Merge rows that begin alike. O(N^2 L) time in chunks, one transfer of four numbers to the host.

    Args:
        input_ids: int ``[N, L]``.
        attention_mask: ``[N, L]``, non-zero for tokens and 0 for padding, on either or both sides; None = no padding.
        position_ids: int ``[N, L]`` or ``[1, L]``; default 0, 1, ... over padding too, as models have it that are given
            none. Tokens at different positions are never merged.

    Raises:
        ValueError: tensors are not as described.
        NotImplementedError: a row has padding between its tokens, or positions that do not rise by one (a packed row).
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be a non-empty [N, L] tensor, got shape {tuple(input_ids.shape)}")
    n_rows, length = input_ids.shape
    device = input_ids.device
    for name, t in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if t is not None and (t.ndim != 2 or t.shape[1] != length or t.shape[0] not in (1, n_rows)):
            raise ValueError(f"{name} must be [{n_rows}, {length}] like input_ids, got shape {tuple(t.shape)}")
    at = torch.arange(length, device=device)
    if attention_mask is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        real = (attention_mask != 0).to(device).expand(n_rows, length)

    # Rows moved to the left: token t of a row is its t-th real one.
    lengths = real.sum(1)
    first = real.view(torch.uint8).argmax(1)
    source = (first[:, None] + at).clamp_(max=length - 1)
    inside = at < lengths[:, None]
    holes = inside > real.gather(1, source)
    wrong, first_position = holes, first
    if position_ids is not None:
        positions = position_ids.to(device, torch.int64).expand(n_rows, length).gather(1, source)
        first_position = positions[:, 0]
        wrong = holes | (inside & (positions != first_position[:, None] + at))

    rank, order, shared = _sort(input_ids.gather(1, source), inside, first_position)
    added = lengths[order] - shared
    ends = added.cumsum(0)
    start = ends - added
    total, rows_tokens, n_wrong = torch.stack((ends[-1], lengths.sum(), wrong.sum())).tolist()
    if n_wrong and bool(holes.any()):
        raise NotImplementedError("a row has padding between its tokens; padding must be before or after them")
    if n_wrong:
        raise NotImplementedError(
            "position_ids do not rise by one along a row, so the row is packed already; prompts are shared between "
            "rows, give one sequence a row"
        )
    if total == 0:
        raise ValueError("attention_mask is 0 everywhere: there are no tokens")

    row = torch.arange(n_rows, device=device)
    parted = shared[:, None] <= at
    # A token is seen until a later row parts before or at it. From the last row to the second, after one that is none.
    later = -row % n_rows
    start_later = start.index_fill(0, row[:1], total)[later]
    until = torch.where(parted[later], start_later[:, None], total).cummin(0).values
    # Place p of the merged row has token p - offset of the row that brought it.
    offset = start - shared
    tables = torch.stack((order * length + first[order], first_position[order], (n_rows - 1 - row) * length)) - offset
    brought_by = torch.repeat_interleave(added, output_size=total)
    token, position, end = tables[:, brought_by] + torch.arange(total, device=device)
    bounds = until.view(-1)[end].to(torch.int32).view(1, 1, 1, total)
    # A row has its t-th token from the last row so far that had parted by then.
    owner = (parted * row[:, None]).cummax(0).values
    t = (at - first[:, None]).clamp_(min=0)
    places = torch.where(real, offset[owner[rank].gather(1, t)] + t, 0)
    return MergedRows(
        input_ids.reshape(-1)[token][None], position[None], ColumnMask(bounds, causal=True), places, real, rows_tokens
    )


def _sort(tokens: Tensor, inside: Tensor, first_position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in lexicographic order: the place of each in it, the rows in it, and how many tokens each of those begins
    with as the one before it; int64 ``[N]`` all.

    Rows that begin at different positions have nothing in common: positions rise by one along a row (others are
    refused), so their first one stands for all. It comes before the tokens, and behind them numbers that no other row
    has and that are less than any token, so that two rows always differ somewhere and a row stands before those that
    it begins.
    """
    n_rows, length = tokens.shape
    end = ~torch.arange(n_rows, device=tokens.device)[:, None]
    parts = (first_position[:, None], torch.where(inside, tokens, end), end.expand(n_rows, 1 + length % 2))
    symbols = torch.cat(parts, 1).to(torch.int32)
    # The comparison is all the work, so it takes two symbols at a time.
    pairs = symbols.view(torch.int64)
    differ_at = torch.empty(n_rows, n_rows, dtype=torch.int64, device=tokens.device)
    # A byte a pair of rows and column, so larger blocks than usual: launches are what takes time.
    for a, b in row_blocks(n_rows, n_rows * length // 16):
        differ = pairs[a:b, None] != pairs
        torch.argmax(differ.view(torch.uint8), -1, out=differ_at[a:b])
    differ_at *= 2
    of_pair = symbols.gather(1, differ_at)
    differ_at += of_pair == of_pair.T
    # [i, j]: what row i goes on with where it parts from row j; all the same on the diagonal.
    symbol = symbols.gather(1, differ_at)
    rank = (symbol < symbol.T).sum(0)
    order = torch.empty_like(rank).scatter_(0, rank, torch.arange(n_rows, device=tokens.device))
    shared = differ_at[order.roll(1), order].sub_(1).clamp_(min=0)
    shared[:1] = 0  # nothing stands before the first
    return rank, order, shared
