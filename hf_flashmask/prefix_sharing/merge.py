"""Rows of a batch as prefix tries in depth-first order: pure tensor arithmetic on the rows' device.

Sorting rows puts those that begin alike side by side, longest common beginnings first, so the sorted rows, each without
what it shares with the row before it, are a trie in depth-first pre-order. Rows are compared token by token: no hashes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = (attention_mask != 0).to(device).expand(n_rows, length)
    positions = at.expand(n_rows, length) if position_ids is None else position_ids.to(device).expand(n_rows, length)

    # Rows moved to the left: token t of a row is its t-th real one.
    lengths = real.sum(1)
    first = real.to(torch.int8).argmax(1)
    source = (first[:, None] + at).clamp(max=length - 1)
    tokens, positions = input_ids.gather(1, source), positions.gather(1, source)
    inside = at < lengths[:, None]
    holes = (real != ((at >= first[:, None]) & (at < (first + lengths)[:, None]))).any()
    jumps = (inside & (positions != positions[:, :1] + at)).any()

    order, shared = _sort(tokens, positions[:, 0], lengths)
    lengths, tokens, positions = lengths[order], tokens[order], positions[order]
    added = lengths - shared
    start = added.cumsum(0) - added
    facts = torch.stack((added.sum(), lengths.sum(), holes.long(), jumps.long()))
    total, rows_tokens, any_holes, any_jumps = (int(x) for x in facts.tolist())
    if any_holes:
        raise NotImplementedError("a row has padding between its tokens; padding must be before or after them")
    if any_jumps:
        raise NotImplementedError(
            "position_ids do not rise by one along a row, so the row is packed already; prompts are shared between "
            "rows, give one sequence a row"
        )
    if total == 0:
        raise ValueError("attention_mask is 0 everywhere: there are no tokens")

    # Where row s puts its t-th token, if it is new; a place beyond the end takes the others.
    new = (at >= shared[:, None]) & (at < lengths[:, None])
    place = torch.where(new, start[:, None] + at - shared[:, None], total).flatten()

    def packed(values: Tensor) -> Tensor:
        return values.new_zeros(total + 1).scatter_(0, place, values.reshape(-1))[:total]

    # A token is seen until a later row parts before or at it.
    parts = torch.where(shared[:, None] <= at, start[:, None], total)
    until = parts.flip(0).cummin(0).values.flip(0)
    until = torch.cat((until[1:], torch.full_like(until[:1], total)))
    bounds = packed(until).to(torch.int32).view(1, 1, 1, total)
    # The row that brought the t-th token of row s: the last one so far that had parted by then.
    row = torch.arange(n_rows, device=device)[:, None]
    owner = torch.where(shared[:, None] <= at, row, 0).cummax(0).values
    index = torch.empty_like(owner)
    index[order] = start[owner] + at - shared[owner]
    index = index.gather(1, (at - first[:, None]).clamp(min=0)).masked_fill(~real, 0)
    return MergedRows(
        packed(tokens)[None], packed(positions)[None], ColumnMask(bounds, causal=True), index, real, rows_tokens
    )


def _sort(tokens: Tensor, first_position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in lexicographic order, and how many tokens each begins with as the one before it: int64 ``[N]`` both.

    Positions rise by one along a row (others are refused), so rows at different ones differ from their first token on.
    """
    n_rows, length = tokens.shape
    common = torch.empty(n_rows, n_rows, dtype=torch.int64, device=tokens.device)
    # The comparison is all the work. A column in which rows always differ spares asking whether they do anywhere.
    left, right = (F.pad(tokens, (0, 1), value=end) for end in (0, 1))
    # A byte a pair and column, so larger blocks than usual: launches are what takes time.
    for a, b in row_blocks(n_rows, n_rows * length // 16):
        differ = left[a:b, None] != right
        torch.argmax(differ.view(torch.uint8), -1, out=common[a:b])
    common = common.minimum(torch.minimum(lengths[:, None], lengths))
    common.masked_fill_(first_position[:, None] != first_position, 0)

    goes_on = common < lengths[:, None]
    # [i, j]: what row i goes on with after what it has in common with row j; -1 at its end.
    token = torch.where(goes_on, tokens.gather(1, common.clamp(max=length - 1)), -1)
    position = torch.where(goes_on, first_position[:, None], -1)
    row = torch.arange(n_rows, device=tokens.device)
    before = (token < token.T) | ((token == token.T) & (position < position.T))
    before |= (token == token.T) & (position == position.T) & (row[:, None] < row)
    order = torch.empty_like(row)
    order[before.sum(0)] = row
    return order, torch.cat((torch.zeros_like(row[:1]), common[order[:-1], order[1:]]))
