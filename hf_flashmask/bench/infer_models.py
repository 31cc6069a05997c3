"""Whole models of ``flashmask bench infer``: ``generate`` and long prefills, flashmask against sdpa."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Documents of a prefill, in 32ths of it.
DOCUMENTS = (19, 7, 1, 5)


@dataclass(frozen=True)
class Shape:
    """Of a Llama with random weights: that of Llama-3-8B, with fewer layers."""

    layers: int = 8
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocab_size: int = 128256
    window: int = 4096  # of the prefill under a window, as Mistral's


def build(shape: Shape, device: str, dtype: torch.dtype, *, windowed: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    options: dict[str, Any] = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 1 << 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    config = MistralConfig(sliding_window=shape.window, **options) if windowed else LlamaConfig(**options)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


class Generate:
    """Greedy ``generate``: a prefill of ``prompt`` tokens and ``new`` more, without stopping."""

    def __init__(self, model: Any, cache: str, batch: int, prompt: int, new: int) -> None:
        self._model, self._cache, self._new = model, cache, new
        device = model.device
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(5, model.config.vocab_size, (batch, prompt), generator=generator).to(device)
        self._keep = torch.ones_like(self._ids)

    def __call__(self, implementation: str) -> tuple[float, Tensor]:
        """(seconds, the first step's logits)."""
        self._model.set_attn_implementation(implementation)
        begin = _now(self._model.device)
        out = self._model.generate(
            self._ids, attention_mask=self._keep, do_sample=False, max_new_tokens=self._new, min_new_tokens=self._new,
            cache_implementation=None if self._cache == "dynamic" else self._cache, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        seconds = _now(self._model.device) - begin
        if out.sequences.shape[1] != self._ids.shape[1] + self._new:
            raise RuntimeError(f"generate stopped early: {tuple(out.sequences.shape)}")
        return seconds, out.logits[0]


class Prefill:
    """One forward of a long row that is packed, or under a window: the mask is made in it, by each its own way."""

    def __init__(self, model: Any, seq_len: int, *, documents: bool) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(5, model.config.vocab_size, (1, seq_len), generator=generator).to(model.device)
        lengths = [seq_len * part // sum(DOCUMENTS) for part in DOCUMENTS] if documents else [seq_len]
        lengths[-1] += seq_len - sum(lengths)
        self._positions = torch.cat([torch.arange(n) for n in lengths])[None].to(model.device)

    def __call__(self, implementation: str) -> tuple[float, Tensor]:
        """(seconds, the last token's logits)."""
        self._model.set_attn_implementation(implementation)
        begin = _now(self._model.device)
        with torch.no_grad():
            out = self._model(self._ids, position_ids=self._positions, use_cache=False, logits_to_keep=1)
        return _now(self._model.device) - begin, out.logits[:, -1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


Run = Callable[[str], tuple[float, Tensor]]
