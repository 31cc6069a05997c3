"""``flashmask show``: masks of lengths, position_ids, a file or a model's layers, as text or a picture."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_flashmask import ColumnMask, masks
from hf_flashmask.bench.records import Refusal
from hf_flashmask.coverage.outcome import sentence

# Builders that document lengths are enough for.
OF_LENGTHS = ("causal_document", "document", "share_question", "causal_blockwise")


def from_lengths(lengths: Sequence[int], kind: str) -> dict[str, ColumnMask]:
    """Packed documents; for "share_question" a question and its answers."""
    given: Any = [list(lengths)] if kind == "share_question" else list(lengths)
    build = getattr(masks, kind)
    with _user_errors():
        return {kind: build(given) if kind == "share_question" else build(lengths=given)}


def from_position_ids(position_ids: Sequence[int]) -> dict[str, ColumnMask]:
    """Packed documents or a tree of shared beginnings: a token sees its ancestors."""
    with _user_errors():
        return {"position_ids": masks.prefix_tree(torch.tensor(list(position_ids)))}


def from_file(path: Path) -> dict[str, ColumnMask]:
    """A dense mask ``[Sq, Sk]`` or ``[B|1, H|1, Sq, Sk]``, bool or additive, saved by torch.save or numpy.save."""
    if not path.is_file():
        raise Refusal(f"there is no {path}" if not path.exists() else f"{path} is no file")
    if path.suffix not in (".pt", ".npy"):
        raise Refusal(f"{path}: a mask is read from .pt (torch.save) or .npy (numpy.save)")
    try:
        dense = _load(path)
    except Exception as error:  # readers raise what their parts raise on what is no such file
        raise Refusal(
            f"{path} cannot be read as a saved tensor ({sentence(error)}); save the mask with torch.save or numpy.save"
        ) from error
    if not isinstance(dense, Tensor) or dense.ndim not in (2, 4):
        shape = f" of shape {tuple(dense.shape)}" if isinstance(dense, Tensor) else ""
        raise Refusal(f"{path} must hold a tensor [Sq, Sk] or [B, H, Sq, Sk], got {type(dense).__name__}{shape}")
    if dense.layout != torch.strided or dense.is_meta:
        kind = "a meta tensor" if dense.is_meta else f"one of layout {dense.layout}"
        raise Refusal(f"{path} must hold a dense tensor with its values, got {kind}")
    with _user_errors():
        return {path.name: ColumnMask.from_dense(dense if dense.ndim == 4 else dense[None, None])}


def _load(path: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    import numpy as np

    return torch.from_numpy(np.load(path, allow_pickle=False))


def from_model(model_type: str, lengths: Sequence[int]) -> dict[str, ColumnMask]:
    """What a tiny random model of the type gives its layers, by layers, for one row of packed documents.

    Windows and chunks are a quarter of the row, so that they can be seen.

    Raises:
        Refusal: Transformers has no such type of text model, or flashmask does not serve it.
    """
    from hf_flashmask.coverage import build

    kinds = [kind for kind in ("causal", "masked", "seq2seq") if model_type in build.model_types(kind)]
    if not kinds:
        raise Refusal(
            f"this Transformers has no text model of type {model_type!r}; 'flashmask check --models' knows them all"
        )
    n = sum(lengths)
    quarter = max(1, n // 4)
    windows = dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention", "window_size"), quarter)
    room = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), max(128, n))
    first_error: Exception | None = None
    try:
        for config in build.candidates(model_type, windows | room):
            try:
                return _masks_of(build.build(config, kinds[0], "flashmask"), kinds[0], lengths)
            except Exception as error:
                first_error = first_error or error
    except build.NotBuildable as error:
        first_error = error
    raise Refusal(f"{model_type}: {first_error}") from first_error


def _masks_of(model: Any, kind: str, lengths: Sequence[int]) -> dict[str, ColumnMask]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    words = torch.randint(5, 80, positions.shape, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"input_ids": words}
    if len(lengths) > 1:
        given["position_ids"] = positions
    if kind == "seq2seq":
        given["decoder_input_ids"] = words
    names = {id(module): name for name, module in model.named_modules()}
    with _recorded() as seen, torch.no_grad():
        model(**given)
    if not seen:
        raise Refusal(f"no layer of {type(model).__name__} asks Transformers' attention interface")
    return _grouped([(names.get(id(module), type(module).__name__), mask) for module, mask in seen])


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[Any, ColumnMask]]]:
    """Attention modules with the masks that reach the kernels in the block, packed documents told apart."""
    from transformers import AttentionInterface

    from hf_flashmask.huggingface import NAME, attention

    seen: list[tuple[Any, ColumnMask]] = []
    modules: list[Any] = []
    serve, compute = attention.flashmask_attention_forward, attention.attention_of_heads

    def note_module(module: Any, *args: Any, **kwargs: Any) -> Any:
        modules.append(module)
        return serve(module, *args, **kwargs)

    def note_mask(q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, **options: Any) -> Any:
        seen.append((modules[-1], mask))
        return compute(q, k, v, mask, **options)

    AttentionInterface.register(NAME, note_module)
    attention.attention_of_heads = note_mask  # type: ignore[assignment]
    try:
        yield seen
    finally:
        AttentionInterface.register(NAME, serve)
        attention.attention_of_heads = compute


def _grouped(seen: Sequence[tuple[str, ColumnMask]]) -> dict[str, ColumnMask]:
    """Different masks, each under the names of its modules: ``model.layers.[0, 2].self_attn``."""
    groups: list[tuple[ColumnMask, list[str]]] = []
    for name, mask in seen:
        same = (g for g in groups if g[0].shape == mask.shape and torch.equal(g[0].to_dense(), mask.to_dense()))
        found = next(same, None)
        if found is None:
            groups.append((mask, [name]))
        else:
            found[1].append(name)
    return {_joined(names): mask for mask, names in groups}


def _joined(names: Sequence[str]) -> str:
    def pattern(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    parts = []
    for shape, group in itertools.groupby(sorted(dict.fromkeys(names), key=pattern), key=pattern):
        numbers = [re.findall(r"\d+", name) for name in group]
        for column in zip(*numbers, strict=True):
            values = list(dict.fromkeys(column))
            shape = shape.replace("*", values[0] if len(values) == 1 else f"[{', '.join(values)}]", 1)
        parts.append(shape)
    return ", ".join(parts)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """What a builder says of bad input is what the command says."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise Refusal(str(error)) from error


def text(found: dict[str, ColumnMask], size: int, *, batch: int = 0, head: int = 0) -> str:
    """For a terminal: every mask under its name, with its density."""
    parts = []
    for name, mask in found.items():
        block = max(1, -(-max(mask.q_len, mask.kv_len) // size))
        cell = "a token" if block == 1 else f"{block} x {block} tokens"
        with _user_errors():
            drawn = mask.draw(size, batch=batch, head=head)
        parts.append(f"{name}: {mask!r}\n{drawn}\n# visible, + in part, . hidden; a cell is {cell}")
    return "\n\n".join(parts)


def picture(found: dict[str, ColumnMask], path: Path, *, batch: int = 0, head: int = 0) -> None:
    """All masks side by side as a PNG, or what else the path's ending says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found), 5.6), dpi=150, layout="constrained")
    for ax, (name, mask) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        with _user_errors():
            mask.plot(batch=batch, head=head, title=name, ax=ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
