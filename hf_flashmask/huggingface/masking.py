"""Transformers' mask functions to column bounds.

Transformers describes a mask as a tree of closures over (batch, head, query, key). Every leaf that it ships lets a key
be seen by one interval of queries which holds the key's own position, or by none. Such intervals stay intervals under
"and" (intersection) and, because both hold the same position, under "or" (hull): the whole tree is evaluated to one
interval per key, exactly, in O(N), without reading a value back from the device. Other leaves are probed row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from hf_flashmask.masks import ColumnMask
from hf_flashmask.masks.convert import from_row_blocks
from hf_flashmask.masks.intervals import run_spans

from . import closures
from .closures import cells
from .packing import BuiltMask, Documents, check_size, documents_from_position_ids, take_position_ids
from .sequence_parallel import refuse_lost_mask
from .tree_mask import TreeMask

# What Transformers hands to mask interfaces that only tells which shortcuts they may take.
_NO_EFFECT = frozenset(
    {"allow_is_bidirectional_skip", "allow_is_causal_skip", "allow_torch_fix", "config", "dtype", "local_size"}
)

# Beyond any position, and far from overflow when shifted.
_FAR = 1 << 40


class Rows(NamedTuple):
    """Absolute query positions ``[first, end)`` that see each key: int64, broadcastable to ``[B, Sk]``.

    The numbers -_FAR and _FAR stand for themselves at every key: generation makes a mask a step, so operations count.
    """

    first: Tensor | int
    end: Tensor | int


class _Keys(NamedTuple):
    """The keys whose rows are asked for."""

    position: Tensor  # int64 [Sk], absolute
    origin: Tensor | None  # int64 [B|1, Sk]: where position 0 of the key's document lies; None: at 0
    remapped: bool = False  # by position_ids, which may begin at another number, so before the document


def flashmask_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | ColumnMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ColumnMask:
    """The mask interface of ``attn_implementation="flashmask"``; arguments as in ``transformers.masking_utils``.

    Always returns a mask, never None: what "no mask" means depends on the caller's alignment.

    Raises:
        NotImplementedError: an argument that this version does not know, or a custom mask function while torch.compile
            traces.
        ValueError: a mask that column bounds cannot hold.
    """
    position_ids = take_position_ids()
    unknown = [name for name in kwargs if name not in _NO_EFFECT]
    if unknown:
        raise NotImplementedError(
            f"flashmask does not know the mask argument {unknown[0]!r} and will not ignore it; "
            "use attn_implementation='sdpa', or install transformers==5.24.0 or a newer hf-flashmask"
        )
    refuse_lost_mask(attention_mask, mask_function)
    if isinstance(attention_mask, ColumnMask):
        check_size(attention_mask, q_length, kv_length)
        if isinstance(attention_mask, TreeMask):
            attention_mask = attention_mask.within(_row_window(mask_function))
        return attention_mask.to(device)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be 2-D or 4-D, got shape {tuple(attention_mask.shape)}")

    documents = None
    if (
        position_ids is not None
        and q_length > 1
        and _is(kv_offset, 0)
        and (isinstance(q_offset, Tensor) or not q_offset)
    ):
        kept = None if attention_mask is None else attention_mask[:, :q_length].to(torch.bool)
        documents = documents_from_position_ids(position_ids.to(device), q_length, kept)
    if documents is not None and (isinstance(q_offset, Tensor) or q_length < kv_length):
        documents = _in_a_static_cache(documents, q_offset, kv_length)
    kept = None
    if attention_mask is not None:
        # A static cache is longer than the tokens seen so far: what the mask does not reach is not there yet.
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        kept = attention_mask.to(device=device, dtype=torch.bool)
        kept = torch.nn.functional.pad(kept, (0, missing)) if missing else kept
        kept = kept[:, kv_offset : kv_offset + kv_length]
    seen_by_all = _seen_by_all(mask_function, q_offset, q_length, kv_offset, kv_length) if documents is None else 0
    if q_length == 1 and seen_by_all == kv_length:
        alone = _of_one_row(torch.ones(kv_length, dtype=torch.int32, device=device) if kept is None else kept)
        alone.full_prefix = kv_length if kept is None else 0
        return alone
    at = torch.arange(kv_length, device=device)
    keys = _Keys(at if _is(kv_offset, 0) else at + kv_offset, None if documents is None else documents.start)
    rows = _rows(mask_function, keys)
    if rows is None:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"mask function {_name(mask_function)} is not one of Transformers' own, so it must be probed, which "
                "torch.compile cannot trace; pass the mask as attention_mask=hf_flashmask.ColumnMask.from_dense(...)"
            )
        mask = _probe(
            mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, use_vmap, device
        )
        return BuiltMask.of(mask if documents is None else mask & documents.mask(q_length), documents is not None)
    if documents is not None:
        rows = Rows(_largest(rows.first, documents.start), _smallest(rows.end, documents.end))
    if q_length == 1:
        return _of_one_row(_seen_by(q_offset, rows, keys, kept), documents is not None)
    rows = rows if kept is None else _keep(rows, kept)
    lts, ute = (
        (t - q_offset).clamp(0, q_length) if isinstance(t, Tensor) else torch.full_like(keys.position, every)
        for t, every in ((rows.end, q_length), (rows.first, 0))
    )
    lts, ute = torch.broadcast_tensors(lts, ute)
    bounds = torch.stack((lts, ute), -2).to(torch.int32)  # [2, Sk] or [B, 2, Sk]
    bounds = bounds.view(-1, 1, 2, kv_length)
    built = BuiltMask(bounds, causal=False, q_len=q_length, documents_known=documents is not None)
    built.full_prefix = seen_by_all if kept is None else 0
    return built


def _in_a_static_cache(documents: Documents, q_offset: int | Tensor, kv_length: int) -> Documents:
    """The documents of a row that fills the beginning of a cache, which is longer and tells its filling by a tensor.

    A cache that holds tokens already has positions that this call does not show: nothing is told apart then.
    """
    missing = kv_length - documents.start.shape[1]
    start, end = (
        torch.nn.functional.pad(t, (0, missing), value=beyond) for t, beyond in zip(documents, (0, _FAR), strict=True)
    )
    if isinstance(q_offset, int):
        return Documents(start, end)
    empty = q_offset.to(start.device) == 0
    return Documents(torch.where(empty, start, 0), torch.where(empty, end, _FAR))


def _is(number: int | Tensor, value: int) -> bool:
    return isinstance(number, int) and number == value


def _of_one_row(seen: Tensor, documents_known: bool = False) -> BuiltMask:
    """From the keys ``[Sk]`` or ``[B, Sk]`` that one query sees. Its triangle hides nothing, so one bound says all."""
    bounds = seen.to(torch.int32).view(-1, 1, 1, seen.shape[-1])
    return BuiltMask(bounds, causal=True, q_len=1, documents_known=documents_known)


def _seen_by_all(
    function: Callable[..., Any], q_offset: int | Tensor, q_length: int, kv_offset: int, kv_length: int
) -> int:
    """How many of the first keys all queries see, where causality and windows alone tell, as in a growing cache."""
    if not isinstance(q_offset, int):
        return 0
    for part in _parts((function,)):
        code = getattr(part, "__code__", None)
        if code is closures.WINDOW and q_offset + q_length <= kv_offset + cells(part)["sliding_window"]:
            continue
        if code is not closures.CAUSAL:
            return 0
    return max(0, min(kv_length, q_offset + 1 - kv_offset))


def _seen_by(position: int | Tensor, rows: Rows, keys: _Keys, kept: Tensor | None) -> Tensor:
    """bool ``[Sk]`` or ``[B, Sk]``: the keys that the query at a position sees."""
    seen = [] if kept is None else [kept]
    if isinstance(rows.first, Tensor):
        seen.append(rows.first <= position)
    if isinstance(rows.end, Tensor):
        seen.append(rows.end > position)
    return functools.reduce(torch.bitwise_and, seen) if seen else torch.ones_like(keys.position, dtype=torch.bool)


# ---- the tree --------------------------------------------------------------------------------------------------


def _rows(function: Callable[..., Any], keys: _Keys) -> Rows | None:
    """The rows that a mask function lets see each key, or None when a leaf is not one of Transformers' own."""
    code = getattr(function, "__code__", None)
    j = keys.position
    if code is closures.CAUSAL:
        return Rows(j, _FAR)
    if code is closures.BIDIRECTIONAL:
        return Rows(-_FAR, _FAR)
    if code is None:
        return None
    if code is closures.AND:
        return _intersection(cells(function)["mask_functions"], keys)
    if code is closures.OR:
        parts = [_rows(part, keys) for part in cells(function)["mask_functions"]]
        known = [part for part in parts if part is not None]
        return None if len(known) < len(parts) else Rows(*_reduce(known, _smallest, _largest))
    for leaf, rule in _LEAVES:
        if code is leaf:
            return rule(cells(function), keys)
    return None


def _row_window(function: Callable[..., Any]) -> int | None:
    """The window of a causal mask function, None without one.

    Raises:
        NotImplementedError: it is more than causality and windows, so it cannot be applied to a tree.
    """
    code = getattr(function, "__code__", None)
    if code is closures.CAUSAL:
        return None
    if code is closures.WINDOW:
        window: int = cells(function)["sliding_window"]
        return window
    if code is closures.AND:
        windows = [_row_window(part) for part in cells(function)["mask_functions"]]
        return min((window for window in windows if window is not None), default=None)
    raise NotImplementedError(
        f"merged rows cannot be attended to under mask function {_name(function)}; run this model without share_prompts"
    )


def _parts(functions: Iterable[Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    """The functions of an "and", those of an "and" among them in its place (5.24 nests them)."""
    for function in functions:
        if getattr(function, "__code__", None) is closures.AND:
            yield from _parts(cells(function)["mask_functions"])
        else:
            yield function


def _intersection(functions: tuple[Callable[..., Any], ...], keys: _Keys) -> Rows | None:
    functions = tuple(_parts(functions))
    # Positions that were remapped per document only mean something inside the document, i.e. beside the packed leaf.
    packed = any(getattr(f, "__code__", None) is closures.PACKED for f in functions)
    parts = []
    for function in functions:
        if closures.REMAP is not None and getattr(function, "__code__", None) is closures.REMAP:
            if not packed:
                return None
            held = cells(function)
            j = keys.position
            part = _rows(held["mask_function"], _Keys(j, j - held["position_ids"].to(j.device, torch.int64), True))
        else:
            part = _rows(function, keys)
        if part is None:
            return None
        parts.append(part)
    return Rows(*_reduce(parts, _largest, _smallest))


_Limit = Tensor | int  # of Rows


def _reduce(
    parts: list[Rows], first: Callable[[_Limit, _Limit], _Limit], end: Callable[[_Limit, _Limit], _Limit]
) -> tuple[_Limit, _Limit]:
    a, b = parts[0]
    for part in parts[1:]:
        a, b = first(a, part.first), end(b, part.end)
    return a, b


def _largest(a: _Limit, b: _Limit) -> _Limit:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    # A number is beyond all positions, on the one side or the other.
    number, other = (b, a) if isinstance(a, Tensor) else (a, b)
    return number if number == _FAR else other


def _smallest(a: _Limit, b: _Limit) -> _Limit:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    number, other = (b, a) if isinstance(a, Tensor) else (a, b)
    return number if number == -_FAR else other


def _keep(rows: Rows, kept: Tensor) -> Rows:
    return Rows(torch.where(kept, rows.first, _FAR), torch.where(kept, rows.end, -_FAR))


def _window(held: dict[str, Any], keys: _Keys) -> Rows:
    return Rows(-_FAR, keys.position + held["sliding_window"])


def _window_both_ways(held: dict[str, Any], keys: _Keys) -> Rows:
    return Rows(keys.position - held["sliding_window"], keys.position + held["sliding_window"] + 1)


def _chunked(held: dict[str, Any], keys: _Keys) -> Rows:
    size, start = held["chunk_size"], held["left_padding"].to(keys.position.device, torch.int64)[:, None]
    if keys.origin is not None:
        # Chunks are counted from the document's position 0, wherever its row put it.
        start = start + keys.origin if keys.remapped else torch.maximum(start, keys.origin)
    first = start + torch.div(keys.position - start, size, rounding_mode="floor") * size
    return Rows(first, first + size)


def _changes(values: Tensor) -> Tensor:
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    return new


def _packed(held: dict[str, Any], keys: _Keys) -> Rows:
    # Document numbers only grow along a row (a cumulative sum), so equal numbers are neighbours.
    first, end = run_spans(_changes(held["packed_sequence_mask"].to(keys.position.device)))
    return Rows(first[:, keys.position], end[:, keys.position])


def _blockwise(held: dict[str, Any], keys: _Keys) -> Rows | None:
    ids = held["block_sequence_ids"].to(keys.position.device)
    new = _changes(ids)
    first, end = run_spans(new)
    # One run a block is what makes it an interval: block numbers at the runs' first tokens must differ.
    token = torch.arange(ids.shape[1], device=ids.device)
    marks = torch.where(new & (ids >= 0), ids, -1 - token).sort(-1).values
    consecutive = (marks[:, 1:] != marks[:, :-1]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(consecutive, "flashmask under torch.compile: a block of block_sequence_ids is in pieces")
    elif not bool(consecutive):
        return None
    at = keys.position
    return _keep(Rows(first[:, at], end[:, at]), ids[:, at] >= 0)


def _padding(held: dict[str, Any], keys: _Keys) -> Rows:
    kept = held["padding_mask"].to(keys.position.device, torch.bool)[:, keys.position]
    return _keep(Rows(-_FAR, _FAR), kept)


# Pairs, not a dict: torch.compile cannot guard a dict with code objects for keys.
_LEAVES: tuple[tuple[CodeType | None, Callable[[dict[str, Any], _Keys], Rows | None]], ...] = (
    (closures.WINDOW, _window),
    (closures.WINDOW_BOTH_WAYS, _window_both_ways),
    (closures.CHUNKED, _chunked),
    (closures.BLOCKWISE, _blockwise),
    (closures.PADDING, _padding),
    (closures.PACKED, _packed),
)


# ---- anything else ---------------------------------------------------------------------------------------------


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _probe(
    function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device | str,
) -> ColumnMask:
    """Evaluate every entry as Transformers does, a block of rows at a time: O(Sq x Sk) time, O(Sk) memory."""

    def masked(first: int, last: int) -> Tensor:
        visible: Any = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=last - first,
            kv_length=kv_length,
            q_offset=q_offset + first,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return ~visible

    shape = (batch_size, 1, q_length, kv_length)
    return from_row_blocks(shape, masked, torch.device(device), what=f"the mask of {_name(function)}")
