"""Pictures of ``bench infer`` and ``bench serving``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .plot_style import INK, METHODS, OURS, Row, Untimed, latest, lengths_axis, origin, plain, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECODING = {
    "decode": "one new token",
    "decode_padded": "one new token, left padding",
    "decode_static": "one new token, cache half full",
    "tree": "tree of eight drafted tokens",
}
_MODELS = {
    "generate_dynamic": "generate,\ndynamic cache",
    "generate_static": "generate,\nstatic cache",
    "prefill_documents": "prefill,\ndocuments",
    "prefill_window": "prefill,\nsliding window",
}
_INFER_SETUP = ("gpu", "heads", "kv_heads", "head_dim")
_SERVING_SETUP = (
    "gpu", "layers", "hidden", "heads", "kv_heads", "intermediate", "dtype", "requests", "new_tokens", "step_tokens",
    "prompt_tokens",
)  # fmt: skip
_BATCH_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def infer(rows: Sequence[Row]) -> Figure:
    """Attention over caches: its share of a copy's bandwidth and its speed against others; bars of whole models."""
    from matplotlib.figure import Figure

    rows = timed(latest(rows, _INFER_SETUP), "ms")
    # The latest measurement counts, should there be several.
    found = {(r["case"], int(r["batch"]), int(r["kv_len"]), r["method"]): r for r in rows}
    cases = [case for case in _DECODING if any(key[0] == case and key[3] == "flashmask" for key in found)]
    models = [case for case in _MODELS if any(key[0] == case for key in found)]
    if not cases and not models:
        raise Untimed
    heights = [*([2.9, 2.9] if cases else []), *([2.9] if models else [])]
    figure = Figure(figsize=(max(7.0, 3.7 * len(cases)), sum(heights) + 1.0), dpi=120, layout="constrained")
    parts = iter(figure.subfigures(1 + bool(models) if cases else 1, 1, height_ratios=_ratios(heights), squeeze=False))
    if cases:
        upper = next(parts)[0]
        batches = sorted({key[1] for key in found if key[0] in cases})
        grid = upper.subplots(2, len(cases), squeeze=False)
        for column, case in zip(grid.T, cases, strict=True):
            own = {key[1:]: row for key, row in found.items() if key[0] == case}
            _shares(column[0], own, batches)
            _speeds(column[1], own, batches)
            column[0].set_title(_DECODING[case], fontsize=11, color=INK)
            column[1].set_xlabel("keys in the cache", color=INK)
        grid[0][0].set_ylabel("share of a copy's bandwidth", color=INK)
        grid[1][0].set_ylabel("speed-up", color=INK)
        handles = grid[0][0].get_legend_handles_labels()[0]
        upper.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    if models:
        _model_bars(next(parts)[0], rows, models)
    row = rows[-1]
    shape = f"{row['heads']} query heads, {row['kv_heads']} key heads of {row['head_dim']}"
    figure.suptitle(f"flashmask in inference: {shape}\n{origin(rows)}", fontsize=12)
    return figure


def _ratios(heights: Sequence[float]) -> list[float]:
    """Heights of the subfigures: both rows of panels are one."""
    return [sum(heights[:2]), heights[2]] if len(heights) == 3 else [sum(heights)]


def _batch_style(batch: int, batches: Sequence[int]) -> dict[str, object]:
    """The more rows, the darker."""
    from matplotlib import colormaps

    at = batches.index(batch)
    color = colormaps["viridis_r"](0.15 + 0.8 * at / max(1, len(batches) - 1))
    marker = _BATCH_MARKERS[at % len(_BATCH_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.7, "label": f"batch {batch}"}


def _shares(ax: Axes, own: dict[tuple[int, int, str], Row], batches: Sequence[int]) -> None:
    for batch in batches:
        points = sorted(
            (kv_len, float(row["gb_per_s"]) / float(row["copy_gb_per_s"]))
            for (b, kv_len, method), row in own.items()
            if b == batch and method == "flashmask"
        )
        ax.plot(*(zip(*points, strict=True) if points else ([], [])), **_batch_style(batch, batches))  # type: ignore[arg-type]
    ax.axhline(1.0, color="#8a949e", linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    lengths_axis(ax, sorted({key[1] for key in own}))
    ax.set_ylim(0, 1.15)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    plain(ax)


def _speeds(ax: Axes, own: dict[tuple[int, int, str], Row], batches: Sequence[int]) -> None:
    others: set[str] = set()
    top = 1.0
    for batch in batches:
        points = []
        for kv_len in sorted({key[1] for key in own}):
            times = {m: float(r["ms"]) for (b, n, m), r in own.items() if (b, n) == (batch, kv_len)}
            rest = {m: ms for m, ms in times.items() if m != "flashmask"}
            if "flashmask" in times and rest:
                fastest = min(rest, key=rest.__getitem__)
                others.add(fastest)
                points.append((kv_len, rest[fastest] / times["flashmask"]))
        top = max([top, *(speed for _, speed in points)])
        ax.plot(*(zip(*points, strict=True) if points else ([], [])), **_batch_style(batch, batches))  # type: ignore[arg-type]
    ax.axhline(1.0, color="#8a949e", linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    lengths_axis(ax, sorted({key[1] for key in own}))
    ax.set_ylim(0, 1.12 * top)
    names = ", ".join(METHODS[m][0] if m in METHODS else m for m in sorted(others))
    ax.annotate(
        f"over {names}" if len(others) < 2 else f"over the fastest of {names}",
        (0.03, 0.06),
        xycoords="axes fraction",
        fontsize=9,
        color=INK,
    )
    ax.yaxis.set_major_formatter("{x:.1f}x")
    plain(ax)


def _model_bars(figure: object, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Whole models: tokens a second beside sdpa's."""
    ax: Axes = figure.subplots()  # type: ignore[attr-defined]
    found = {(r["case"], r["method"]): r for r in rows if r["case"] in models}
    used = [method for method in METHODS if any(key[1] == method for key in found)]
    for i, case in enumerate(models):
        base = found.get((case, "sdpa"))
        methods = [method for method in used if (case, method) in found]
        for j, method in enumerate(methods):
            row = found[case, method]
            label, color, hatch, _ = METHODS[method]
            speed = float(row["tokens_per_s"])
            height = speed / float(base["tokens_per_s"]) if base is not None else 1.0
            at = i + (j - (len(methods) - 1) / 2) * 0.32
            ax.bar(at, height, 0.3, color=color, hatch=hatch, edgecolor="white", linewidth=0, label=label)
            ax.annotate(
                f"{height:.2f}x\n{speed:,.0f}/s", (at, height), ha="center", va="bottom", fontsize=8.5, color=INK
            )
    facts = {case: next(row for key, row in found.items() if key[0] == case) for case in models}
    names = [f"{_MODELS[case]}, {int(row['kv_len']):,} tokens" for case, row in facts.items()]
    ax.set_xticks(range(len(models)), names, fontsize=9.5)
    middle, half = (len(models) - 1) / 2, max(len(models), len(_MODELS)) / 2 + 0.1
    ax.set_xlim(middle - half, middle + half)
    ax.margins(y=0.22)
    ax.set_ylabel("speed-up over sdpa;\ntokens a second", color=INK)
    ax.set_title(
        f"whole models of {rows[-1]['layers'] or next(iter(facts.values()))['layers']} layers", fontsize=11, color=INK
    )
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles.keys(), frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(ax)
    ax.tick_params(axis="x", length=0)


def serving(rows: Sequence[Row]) -> Figure:
    """New tokens a second of every method, with and without CUDA graphs."""
    from matplotlib.figure import Figure

    rows = timed(latest(rows, _SERVING_SETUP), "tokens_per_s")
    found = {(r["method"], r["cuda_graphs"]): r for r in rows}
    figure = Figure(figsize=(max(6.6, 1.5 * len(found) + 2.2), 4.4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for at, ((method, _), row) in enumerate(found.items()):
        speed = float(row["tokens_per_s"])
        _, color, hatch, _ = METHODS.get(method, (method, OURS, "", ""))
        ax.bar(at, speed, 0.6, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        memory = f"\n{int(row['peak_mib']) / 1024:.1f} GiB" if row["peak_mib"] else ""
        ax.annotate(f"{speed:,.0f}{memory}", (at, speed), ha="center", va="bottom", fontsize=9.5, color=INK)
    captured = {"decode": "\nCUDA graphs of decoding", "all": "\nCUDA graphs"}
    names = [METHODS.get(method, (method,))[0] + captured.get(graphs, "") for method, graphs in found]
    ax.set_xticks(range(len(found)), names)
    ax.set_ylabel("new tokens a second; growth of peak memory", color=INK)
    ax.margins(y=0.15)
    plain(ax)
    ax.tick_params(axis="x", length=0)
    row = rows[-1]
    what = (
        f"{row['requests']} prompts of {int(row['prompt_tokens']):,} tokens together, {row['new_tokens']} new ones each"
    )
    shape = f"Llama of {row['layers']} layers x {row['hidden']}, {row['dtype']}"
    figure.suptitle(f"Continuous batching, {shape}\n{what}\n{origin(rows)}", fontsize=10.5)
    return figure
