"""One call of a backbone on merged rows, its results taken apart again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hf_flashmask.huggingface.tree_mask import TreeMask, TreeRows

from .merge import MergedRows, merge_rows


def run_merged(
    backbone: Any, forward: Callable[..., Any], given: dict[str, Any], last_position: bool
) -> tuple[Any, int, int]:
    """(what ``forward`` gives for the rows, tokens of the rows, tokens computed).

    ``last_position`` is what ``reads_last_position(backbone)`` says; it walks the model, so it is asked once.
    """
    input_ids, position_ids = given["input_ids"], given.get("position_ids")
    rows = merge_rows(input_ids, given.get("attention_mask"), position_ids)
    n_rows_tokens, n_merged_tokens = rows.rows_tokens, rows.input_ids.shape[1]
    if last_position:
        last = input_ids.new_tensor(input_ids.shape[1] - 1) if position_ids is None else position_ids.max()
        rows = rows.reaching(last)
    with _noise_of_rows(backbone, input_ids.shape[1], rows.input_ids.shape[1]):
        out = forward(
            **{
                **given,
                "input_ids": rows.input_ids,
                "attention_mask": TreeMask(rows.mask.bounds, causal=True, tree_rows=TreeRows(rows.places, rows.real)),
                "position_ids": rows.position_ids,
                "use_cache": False,
            }
        )
    if isinstance(out, tuple):
        out = _restored(rows, out)
    else:
        out.last_hidden_state = rows.restore(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = _restored(rows, out.hidden_states)
    return out, n_rows_tokens, n_merged_tokens


def _restored(rows: MergedRows, out: Any) -> Any:
    """Every hidden state in nested tuples. Nothing else of three dimensions is in them: what else there could be is
    refused (router logits) or has four (attention weights, refused too)."""
    if isinstance(out, tuple):
        return tuple(_restored(rows, part) for part in out)
    return rows.restore(out) if isinstance(out, Tensor) and out.ndim == 3 else out


def reads_last_position(backbone: nn.Module) -> bool:
    """Whether RoPE takes its frequencies from the largest position of a batch, that of padding too."""
    for module in backbone.modules():
        kinds = vars(module).get("rope_type")  # by type of layer in some models
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return True
    return False


@contextlib.contextmanager
def _noise_of_rows(backbone: Any, row_len: int, merged_len: int) -> Iterator[None]:
    """NEFTune as large as on rows: its hook divides ``neftune_noise_alpha`` by the root of the length that it sees."""
    noisy: Any = backbone.get_input_embeddings()
    alpha = getattr(noisy, "neftune_noise_alpha", None)
    if alpha is None:
        yield
        return
    noisy.neftune_noise_alpha = alpha * (merged_len / row_len) ** 0.5
    try:
        yield
    finally:
        noisy.neftune_noise_alpha = alpha
