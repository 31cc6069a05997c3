"""Continuous batching: ``generate_batch``, ``ContinuousBatchingManager`` and ``transformers serve``.

A step packs the new tokens of many requests into one row, and Transformers' paged cache hands a layer the keys of those
requests one after another, cached ones first. The mask is one causal block a request, aligned to its last key: two
bounds a key where sdpa is given a dense mask of all new tokens by all keys. A step that only decodes, one new token a
request, may come with block tables instead (Transformers 5.24, full attention): its keys are read where they lie.

Read in Transformers 5.17, 5.23 and 5.24, which take an implementation that is no build of FlashAttention for one that
needs such a dense mask, and refuse it or swap it. Can go when they ask the registry instead of the name.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_flashmask.attention.paged import paged_attention
from hf_flashmask.masks import ColumnMask

from .naming import NAME, PAGED_NAME

# Since 5.24 models hand new keys to the paged cache themselves, as to any other; before, attention does.
_MODELS_UPDATE = hasattr(masking_utils, "PagedAttentionCache")


class PagedStep(ColumnMask):
    """A step of continuous batching, as the attention mask of its new tokens: what every layer needs to read the cache.

    It travels as the mask since some models (StableLM) pass no other arguments to attention.
    """

    __slots__ = ("given",)
    # What else continuous batching hands to models, where they pass it on: read from the step, or without effect here.
    ARGUMENTS = frozenset(
        {"block_table", "cache", "k_cache", "logits_indices", "logits_processor_args", "max_seqlen_k", "max_seqlen_q"}
        | {"read_index", "v_cache", "write_index"}
    )

    def __init__(self, bounds: Tensor, *, causal: bool, q_len: int, given: dict[str, Any]) -> None:
        super().__init__(bounds, causal=causal, q_len=q_len)
        self.given = given

    @classmethod
    def of(cls, given: dict[str, Any]) -> PagedStep:
        """From what continuous batching gives to a model.

        Raises:
            NotImplementedError: it has block tables, in a release of Transformers where they were not tried.
        """
        if given["block_table"] is not None and not _MODELS_UPDATE:
            raise NotImplementedError(
                "flashmask follows block tables from transformers 5.24 on; set max_blocks_per_request=0 in "
                "ContinuousBatchingConfig"
            )
        names = ("block_table", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index")
        q_len = given["input_ids"].shape[1]
        own = paged_mask(given["cu_seq_lens_q"], given["cu_seq_lens_q"], q_len, q_len)
        return cls(own.bounds, causal=False, q_len=q_len, given={name: given[name] for name in names})

    def _moved(self, bounds: Tensor) -> PagedStep:
        return PagedStep(bounds, causal=self.causal, q_len=self.q_len, given=self.given)

    @torch.compiler.disable  # as Transformers' own: the cache is written in place through views of one tensor
    def read(
        self, module: torch.nn.Module, key: Tensor, value: Tensor, sliding_window: int | None
    ) -> tuple[Tensor, Tensor, ColumnMask]:
        """Let the cache have the new keys and values, and read those of all the step's requests.

        Args:
            key, value: ``[1, Hkv, Sq, D]``, ``[1, Hkv, Sq, Dv]``, of the new tokens; from 5.24 on of all.
            sliding_window: what the layer asks for; the cache may keep no more than a window either.

        Returns:
            ``[1, Hkv, Sk, D]``, ``[1, Hkv, Sk, Dv]`` and their mask, Sq x Sk.

        Raises:
            NotImplementedError: keys that were cached elsewhere too, or a cache of another release of Transformers.
        """
        key, value, kept = self._through_cache(module, key, value)
        cu_seqlens_k = self.given["cu_seq_lens_k"]
        if isinstance(cu_seqlens_k, dict):
            cu_seqlens_k = cu_seqlens_k["full_attention" if kept is None else "sliding_attention"]
        windows = [window for window in (sliding_window, kept) if window is not None]
        return key, value, self._mask(cu_seqlens_k, key.shape[2], min(windows, default=None))

    @torch.compiler.disable
    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor | None:
        """Attention of a step with block tables, the new keys and values written to their pages first; else None.

        Args:
            query: ``[1, Hq, R, D]``, a token of each of R requests; key, value: ``[1, Hkv, R, D]``.
            options: ``softmax_scale``, ``softcap`` and ``sinks``.

        Returns:
            ``[1, R, Hq, D]``.
        """
        if self.given["block_table"] is None:
            return None
        allocator = self.given["cache"].layer_to_allocator[module.layer_idx]
        block_table = self.given["block_table"][allocator.index]
        _check_keys(module, key, block_table.shape[0])
        k_pages, v_pages = allocator.get_cache_for_block_table(module.layer_idx)
        mask, rows = self._decoding(allocator, block_table, k_pages.shape[1])
        for pages, new in ((k_pages, key), (v_pages, value)):
            pages.flatten(0, 1).index_copy_(0, rows, new[0].transpose(0, 1).to(pages.dtype))
        q = query[0].transpose(0, 1)[:, None].to(k_pages.dtype)
        return paged_attention(q, k_pages, v_pages, block_table, mask, **options).transpose(0, 1)

    def _decoding(self, allocator: Any, block_table: Tensor, page: int) -> tuple[ColumnMask, Tensor]:
        """The mask of a decoding step, and which rows of all pages its new keys go to; shared by an allocator's layers.

        Requests without keys are padding: they see nothing and write where nothing is read.
        """
        key = ("decoding", _capturing(block_table), allocator.index)
        if key not in self._cache:
            cu_seqlens_k = self.given["cu_seq_lens_k"][allocator.layer_type]
            seqlens_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
            j = torch.arange(block_table.shape[1] * page, device=seqlens_k.device)
            bounds = (j < seqlens_k[:, None]).to(torch.int32)  # the one query is hidden from row 0 or from row 1 on
            last = (seqlens_k.to(torch.int64) - 1).clamp(min=0)[:, None]
            rows = (block_table.gather(1, last // page) * page + last % page)[:, 0]
            rows = torch.where(seqlens_k > 0, rows, allocator.write_trash_index)
            self._cache[key] = ColumnMask(bounds[:, None, None], causal=True, q_len=1), rows
        made: tuple[ColumnMask, Tensor] = self._cache[key]
        return made

    def _through_cache(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """Keys and values of all the step's requests, and the window that the cache keeps of them."""
        cache, layer = self.given["cache"], module.layer_idx
        indices = {name: self.given[name] for name in ("read_index", "write_index")}
        if _MODELS_UPDATE:
            allocator = cache.layer_to_allocator[layer]
            # No index means that there is nothing to read but the new ones.
            _check_keys(module, key, indices["read_index"][allocator.index].numel() or self.q_len)
            return key, value, getattr(allocator, "sliding_window", None)
        _check_keys(module, key, self.q_len)
        takes = _arguments(type(cache).update)
        if "kwargs" in takes:  # 5.23; the cache replaces entries by those of the layer
            cu_seqlens_k = self.given["cu_seq_lens_k"]
            step = {**indices, "cu_seq_lens_k": cu_seqlens_k, "max_length_k": dict.fromkeys(cu_seqlens_k)}
            key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=step)
            return key, value, getattr(cache.layer_to_allocator[layer], "sliding_window", None)
        if takes >= set(indices) and hasattr(cache, "sliding_windows"):  # 5.17
            key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, **indices)
            window = cache.sliding_windows[layer]  # 1 says none
            return key.transpose(0, 1)[None], value.transpose(0, 1)[None], None if window == 1 else window
        raise NotImplementedError(
            f"this release of transformers has another PagedAttentionCache.update({', '.join(sorted(takes))}) than "
            "hf_flashmask knows; install transformers==5.24.0 or a newer hf-flashmask, or use "
            "attn_implementation='sdpa'"
        )

    def _mask(self, cu_seqlens_k: Tensor, kv_len: int, window: int | None) -> ColumnMask:
        """Shared by all layers of a kind."""
        key = ("paged", _capturing(cu_seqlens_k), id(cu_seqlens_k), kv_len, window)
        if key not in self._cache:
            self._cache[key] = paged_mask(self.given["cu_seq_lens_q"], cu_seqlens_k, self.q_len, kv_len, window)
        mask: ColumnMask = self._cache[key]
        return mask


def _capturing(t: Tensor) -> bool:
    """A CUDA graph must make its mask itself: it is replayed with other lengths in the same tensors."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_keys(module: torch.nn.Module, key: Tensor, expected: int) -> None:
    if key.shape[2] != expected:
        raise NotImplementedError(
            f"{type(module).__name__}: a step of continuous batching should bring {expected} keys here, but "
            f"{key.shape[2]} came: this model fills another cache than the paged one; use model.generate for it"
        )


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def paged_mask(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, kv_len: int, window: int | None = None
) -> ColumnMask:
    """One causal block a request, aligned to the last query and key of each; made on the device, without reading it.

    Args:
        cu_seqlens_q, cu_seqlens_k: int ``[R + 1]``. A request has at least as many keys as queries; rows and keys
            behind the last one are padding and see nothing.
        window: keys that a query sees, its own included.
    """
    j = torch.arange(kv_len, device=cu_seqlens_k.device)
    starts_q, ends_k = cu_seqlens_q.to(torch.int64), cu_seqlens_k[1:].to(torch.int64)
    request = torch.searchsorted(ends_k, j, right=True)  # R for padding
    # What request R would be: no queries, behind the last.
    ends_q = torch.cat((starts_q[1:], starts_q[-1:]))
    first = j + (ends_q - torch.cat((ends_k, ends_k[-1:])))[request]
    lts = ends_q[request] if window is None else torch.minimum(ends_q[request], first + window)
    ute = torch.maximum(starts_q[request], first)
    bounds = torch.stack((lts, ute)).clamp(0, q_len).to(torch.int32)
    return ColumnMask(bounds[None, None], causal=False, q_len=q_len)


# ---- what Transformers must be told -------------------------------------------------------------------------------


def install(mask_function: Any) -> None:
    """Let continuous batching run "flashmask" as it is, without a dense mask, and with block tables. Idempotent.

    Steps go to every name that ``mask_function`` is registered under. CUDA graphs and asynchronous batches stay as for
    sdpa: only if they are asked for.
    """
    from transformers.generation.continuous_batching import cache, continuous_api, input_outputs

    for module in (continuous_api, cache):
        stock = module.is_flash_attention_requested
        if not hasattr(stock, "_hf_flashmask"):
            setattr(module, "is_flash_attention_requested", _counts_as_flash(stock))  # noqa: B010  (for mypy)
    if _MODELS_UPDATE:
        from transformers.generation.continuous_batching import initialization

        available = initialization.ensure_decode_fast_path_is_available
        if not hasattr(available, "_hf_flashmask"):
            initialization.ensure_decode_fast_path_is_available = _with_block_tables(available)
    ios = input_outputs.ContinuousBatchingIOs
    if not hasattr(ios.get_model_kwargs, "_hf_flashmask"):
        ios.get_model_kwargs = _with_step(ios.get_model_kwargs, mask_function)  # type: ignore[method-assign]


def _counts_as_flash(stock: Any) -> Any:
    @functools.wraps(stock)
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation or getattr(config, "_attn_implementation", None)
        if version is None and name in (NAME, PAGED_NAME):
            return True
        return stock(config, requested_attention_implementation, version)

    is_flash_attention_requested._hf_flashmask = True  # type: ignore[attr-defined]
    return is_flash_attention_requested


def _with_block_tables(stock: Any) -> Any:
    @functools.wraps(stock)
    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, user_requested: bool) -> None:
        from transformers.generation.continuous_batching import initialization

        # On a CPU pages are gathered, the unused too: only if asked for.
        if getattr(config, "_attn_implementation", None) in (NAME, PAGED_NAME) and (
            user_requested or torch.cuda.is_available()
        ):
            allocators = initialization.ATTN_TYPE_TO_ALLOCATOR
            if all(allocators[kind].supports_block_table for kind in initialization.group_layers_by_attn_type(config)):
                return
        stock(config, cb_config, user_requested)

    ensure_decode_fast_path_is_available._hf_flashmask = True  # type: ignore[attr-defined]
    return ensure_decode_fast_path_is_available


def _with_step(stock: Any, mask_function: Any) -> Any:
    from transformers import AttentionMaskInterface

    @functools.wraps(stock)
    def get_model_kwargs(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = stock(self, *args, **kwargs)
        if AttentionMaskInterface._global_mapping.get(self.config._attn_implementation) is mask_function:
            given["attention_mask"] = PagedStep.of(given)
        return given

    get_model_kwargs._hf_flashmask = True  # type: ignore[attr-defined]
    return get_model_kwargs
