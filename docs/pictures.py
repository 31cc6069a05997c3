"""Draws the pages' pictures while MkDocs builds the site: ``pictures/NAME.png`` for every entry of ``PICTURES``."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from hf_flashmask import ColumnMask, masks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BELOW, ABOVE, TRIANGLE, INK = "#f2a65a", "#9cc3e6", "#d9dee3", "#333a41"


def gallery(n: int = 64) -> dict[str, ColumnMask]:
    """The paper's masks and ours, small."""
    parts = [24, 17, 23]
    buckets = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(0))
    depths = [*range(30), *range(12, 28), *range(20, 30), *range(8)]
    images = [-1] * 10 + [0] * 16 + [-1] * 8 + [1] * 16 + [-1] * 14
    return {
        "full": masks.full(n),
        "causal": masks.causal(n),
        "sliding_window": masks.sliding_window(n, 12),
        "causal_document": masks.causal_document(lengths=parts),
        "document": masks.document(lengths=parts),
        "share_question": masks.share_question([parts]),
        "global_sliding_window": masks.global_sliding_window(n, 6, 8),
        "causal_blockwise": masks.causal_blockwise(lengths=parts),
        "prefix_lm_causal": masks.prefix_lm_causal(n, 20),
        "prefix_lm_document": masks.prefix_lm_document(lengths=parts, prefix_lengths=[9, 6, 9]),
        "qk_sparse": masks.qk_sparse(lengths=parts, dropped=[False, True, False]),
        "hash_sparse": masks.hash_sparse(buckets, buckets),
        "random_eviction": masks.random_eviction(n, generator=torch.Generator().manual_seed(0)),
        "prefix_tree": masks.prefix_tree(torch.tensor(depths)),
        "image_blocks": masks.image_blocks(torch.tensor(images)),
        "padding": masks.padding(torch.tensor([[0] * 12 + [1] * 52])),
    }


def draw_gallery() -> Figure:
    figure = Figure(figsize=(9, 9.8), dpi=80, layout="constrained")
    for ax, (name, mask) in zip(figure.subplots(4, 4).flat, gallery().items(), strict=True):
        ax.imshow(
            mask.to_dense()[0, 0].numpy(),
            cmap="Blues",
            vmin=-0.15,
            vmax=1.4,
            interpolation="nearest",
        )
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{name}\n{mask.density():.0%} visible", fontsize=9)
    return figure


def draw_intervals(
    mask: ColumnMask, ax: Axes, title: str, column: int, names: tuple[str, ...]
) -> None:
    """The hidden rows of every column as bars: the triangle that ``causal`` stands for in grey, and the bounds of one
    column by their names."""
    start, end = (t[0, 0].tolist() for t in mask.masked_intervals())
    for j in range(mask.kv_len):
        for first, last in ((start[i][j], end[i][j]) for i in range(2)):
            above = last <= j
            color = TRIANGLE if above and mask.causal else ABOVE if above else BELOW
            ax.bar(j + 0.5, last - first, 0.9, bottom=first, color=color, linewidth=0)
            if j == column and first < last:
                for name, row in zip(
                    ("UTS", "UTE") if above else ("LTS", "LTE"), (first, last), strict=True
                ):
                    if name in names:
                        ax.plot([j, j + 1], [row, row], color=INK, linewidth=2.5)
                        box = {
                            "facecolor": "white",
                            "edgecolor": "none",
                            "alpha": 0.85,
                            "pad": 1.5,
                        }
                        at = (j + 1.4, min(row, mask.q_len - 0.7))
                        ax.annotate(
                            f"{name} = {row}", at, va="center", fontsize=9, color=INK, bbox=box
                        )
    ax.set(xlim=(0, mask.kv_len), ylim=(mask.q_len, 0), xlabel="key", ylabel="query")
    ax.set_title(title, fontsize=10)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_aspect("equal")


def draw_vectors() -> Figure:
    figure = Figure(figsize=(11, 4.2), dpi=90, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    parts = [9, 5, 10]
    draw_intervals(
        masks.causal_document(lengths=parts), left, "causal_document: LTS, causal", 3, ("LTS",)
    )
    draw_intervals(
        masks.document(lengths=parts), middle, "document: LTS and UTE", 10, ("LTS", "UTE")
    )
    named = ("LTS", "LTE", "UTS", "UTE")
    draw_intervals(
        masks.global_sliding_window(24, 3, 4),
        right,
        "global_sliding_window: all four",
        11,
        named,
    )
    return figure


def draw_tiles() -> Figure:
    mask = masks.share_question([[3100, 900, 700], [2000, 700, 792]])
    return mask.plot(title="two questions, two answers each")


def draw_tree() -> Figure:
    figure = Figure(figsize=(9, 4.8), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    masks.causal_document(lengths=[22, 21, 23]).plot(
        title="three rows that begin alike", ax=left
    )
    depths = [*range(22), *range(14, 21), *range(18, 23)]
    masks.prefix_tree(torch.tensor(depths)).plot(title="the same as one tree", ax=right)
    return figure


def draw_one(mask: Callable[[], ColumnMask], title: str) -> Callable[[], Figure]:
    return lambda: mask().plot(title=title)


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "gallery": draw_gallery,
    "vectors": draw_vectors,
    "tiles": draw_tiles,
    "tree": draw_tree,
    "packed": draw_one(
        lambda: masks.causal_document(lengths=[3145, 2203, 2844]),
        "three documents in a row of 8192",
    ),
    "pair": draw_one(lambda: masks.share_question([[12, 9, 8]]), "a prompt and two answers"),
    "group": draw_one(
        lambda: masks.share_question([[48, *[12] * 8]]), "a prompt and its eight completions"
    ),
    "passages": draw_one(
        lambda: masks.causal_blockwise(lengths=[900] * 8 + [300]),
        "eight passages and a question",
    ),
}


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def on_files(files: Any, *, config: Any) -> Any:
    """MkDocs' hook: adds the pictures to the site's files."""
    from mkdocs.structure.files import File

    for name, draw in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.png", content=png(draw())))
    return files
