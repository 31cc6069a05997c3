"""The paper's twelve masks and "full", as the kernel benchmark measures them.

Each is a ``ColumnMask`` and, for FlexAttention, the mask_mod that a user of FlexAttention would write for it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from hf_flashmask import masks
from hf_flashmask.masks import ColumnMask

from .documents import documents, dropped, prefixes

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> visible

NUM_GLOBAL = 16
BUCKETS = 16


@dataclass(frozen=True)
class KernelMask:
    name: str
    mask: ColumnMask  # on the CPU, batch 1 and heads 1
    factory: Callable[..., MaskMod]  # of ``tensors``
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # What kernels without general masks need to know, None where it says nothing about this mask.
    is_causal: bool | None = None  # the whole mask is full (False) or the causal triangle (True)
    window: tuple[int, int] | None = None  # the whole mask is keys [i - left, i + right]
    lengths: tuple[int, ...] | None = None  # of packed documents

    def mask_mod(self, device: torch.device | str) -> MaskMod:
        return self.factory(**{name: t.to(device) for name, t in self.tensors.items()})


def build(name: str, seq_len: int) -> KernelMask:
    """A mask by its name, the same at every call.

    Raises:
        ValueError: there is no such mask.
    """
    if name not in _BUILDERS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {name!r}")
    return _BUILDERS[name](seq_len)


def _ids(lengths: tuple[int, ...] | list[int]) -> Tensor:
    """Number of the part that a token is in: int32 ``[S]``."""
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))


def _full(n: int) -> KernelMask:
    return KernelMask("full", masks.full(n), lambda: lambda b, h, q, k: (q >= 0) & (k >= 0), is_causal=False)


def _causal(n: int) -> KernelMask:
    return KernelMask("causal", masks.causal(n), lambda: lambda b, h, q, k: q >= k, is_causal=True)


def _sliding_window(n: int) -> KernelMask:
    w = max(1, n // 16)
    return KernelMask(
        "sliding_window",
        masks.sliding_window(n, w),
        lambda: lambda b, h, q, k: (q >= k) & (q - k < w),
        window=(w - 1, 0),
    )


def causal_document(lengths: tuple[int, ...]) -> KernelMask:
    """Packed causal documents of any lengths."""
    return KernelMask(
        "causal_document",
        masks.causal_document(lengths=lengths),
        lambda doc: lambda b, h, q, k: (q >= k) & (doc[q] == doc[k]),
        {"doc": _ids(lengths)},
        lengths=lengths,
    )


def _document(n: int) -> KernelMask:
    lengths = documents(n)
    return KernelMask(
        "document",
        masks.document(lengths=lengths),
        lambda doc: lambda b, h, q, k: doc[q] == doc[k],
        {"doc": _ids(lengths)},
        lengths=lengths,
    )


def _share_question(n: int) -> KernelMask:
    """Every document is one question and two to six answers, of random lengths."""
    rng, groups = random.Random(0), []
    for length in documents(n):
        parts = rng.randint(2, 6) + 1
        extra = Counter(rng.randint(0, parts - 1) for _ in range(length - parts))
        groups.append([1 + extra[part] for part in range(parts)])
    part = [length for group in groups for length in group]
    is_question = torch.tensor([i == 0 for group in groups for i in range(len(group))])
    return KernelMask(
        "share_question",
        masks.share_question(groups),
        lambda doc, part, question: (
            lambda b, h, q, k: (q >= k) & (doc[q] == doc[k]) & (question[k] | (part[q] == part[k]))
        ),
        {"doc": _ids(documents(n)), "part": _ids(part), "question": is_question[_ids(part)]},
    )


def _global_sliding(n: int) -> KernelMask:
    g, w = NUM_GLOBAL, max(1, n // 16)
    return KernelMask(
        "global_sliding",
        masks.global_sliding_window(n, g, w),
        lambda: lambda b, h, q, k: ((q - k <= w) & (k - q <= w)) | (q < g) | (k < g),
    )


def _causal_blockwise(n: int) -> KernelMask:
    lengths = documents(n)
    last = len(lengths) - 1
    return KernelMask(
        "causal_blockwise",
        masks.causal_blockwise(lengths=lengths),
        lambda doc: lambda b, h, q, k: (q >= k) & ((doc[q] == doc[k]) | (doc[q] == last)),
        {"doc": _ids(lengths)},
    )


def _prefix_lm_causal(n: int) -> KernelMask:
    prefix = n // 2
    return KernelMask(
        "prefix_lm_causal",
        masks.prefix_lm_causal(n, prefix),
        lambda: lambda b, h, q, k: (q >= k) | (k < prefix),
    )


def _prefix_lm_document(n: int) -> KernelMask:
    lengths = documents(n)
    doc = _ids(lengths)
    starts = torch.tensor([0, *accumulate(lengths)][:-1])
    in_prefix = torch.arange(n) - starts[doc] < torch.tensor(prefixes(n))[doc]
    return KernelMask(
        "prefix_lm_document",
        masks.prefix_lm_document(lengths=lengths, prefix_lengths=prefixes(n)),
        lambda doc, prefix: lambda b, h, q, k: (doc[q] == doc[k]) & ((q >= k) | prefix[k]),
        {"doc": doc, "prefix": in_prefix},
    )


def _qk_sparse(n: int) -> KernelMask:
    lengths, gone = documents(n), torch.tensor(dropped(n))
    doc = _ids(lengths)
    ends = torch.tensor(list(accumulate(lengths)), dtype=torch.int32)
    return KernelMask(
        "qk_sparse",
        masks.qk_sparse(lengths=lengths, dropped=dropped(n)),
        lambda first_row: lambda b, h, q, k: (q >= k) & (q >= first_row[k]),
        {"first_row": torch.where(gone, ends, 0)[doc]},
    )


def _hash_sparse(n: int) -> KernelMask:
    """The first key of every bucket is visible to the whole bucket: some kernels have no rule for empty rows."""
    generator = torch.Generator().manual_seed(1234)
    q_buckets, k_buckets = (torch.randint(0, BUCKETS, (n,), generator=generator) for _ in range(2))
    (q_bucket, q_at), (k_bucket, k_at) = q_buckets.sort(stable=True), k_buckets.sort(stable=True)
    first = k_bucket.diff(prepend=torch.tensor([-1])) != 0
    bounds = masks.hash_sparse(q_buckets, k_buckets).bounds.clone()  # LTS, UTE
    bounds[0, 0, 1, first] = torch.searchsorted(q_bucket, k_bucket[first]).to(torch.int32)
    tensors = {"qb": q_bucket, "kb": k_bucket, "q_at": q_at, "k_at": torch.where(first, -1, k_at)}
    return KernelMask(
        "hash_sparse",
        ColumnMask(bounds, causal=False),
        lambda qb, kb, q_at, k_at: lambda b, h, q, k: (qb[q] == kb[k]) & (q_at[q] >= k_at[k]),
        {name: t.to(torch.int32) for name, t in tensors.items()},
    )


def _random_eviction(n: int) -> KernelMask:
    """Every row of the second half evicts one random key, in the order of Paddle's benchmark.

    There, unlike in ``masks.random_eviction``, keys drawn before their time go to the last rows. NumPy's old generator
    gives the published mask.
    """
    rows = np.arange(n // 2, n)
    keys = np.random.RandomState(0).choice(n - 1, rows.size, replace=False)
    early = keys < rows - 1
    evicted_at = torch.full((n,), n, dtype=torch.int32)
    order = np.concatenate((keys[early], keys[~early]))
    evicted_at[torch.from_numpy(order)] = torch.from_numpy(rows.astype(np.int32))
    return KernelMask(
        "random_eviction",
        ColumnMask(evicted_at[None, None, None], causal=True),
        lambda until: lambda b, h, q, k: (q >= k) & (q < until[k]),
        {"until": evicted_at},
    )


_BUILDERS: dict[str, Callable[[int], KernelMask]] = {
    "full": _full,
    "causal": _causal,
    "sliding_window": _sliding_window,
    "causal_document": lambda n: causal_document(documents(n)),
    "document": _document,
    "share_question": _share_question,
    "global_sliding": _global_sliding,
    "causal_blockwise": _causal_blockwise,
    "prefix_lm_causal": _prefix_lm_causal,
    "prefix_lm_document": _prefix_lm_document,
    "qk_sparse": _qk_sparse,
    "hash_sparse": _hash_sparse,
    "random_eviction": _random_eviction,
}
MASKS = tuple(_BUILDERS)
