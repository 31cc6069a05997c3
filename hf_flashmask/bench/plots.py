"""``flashmask bench plot``: pictures of what the other benchmarks wrote, from the CSV file alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots_inference, plots_lengths, sparsity
from .convergence import gap
from .plot_style import INK, METHODS, OURS, Row, Untimed, origin, plain, timed
from .records import Refusal, read, understood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES = {"fwd": "forward", "bwd": "backward"}
_COLORS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo")
_GAP = 0.9  # between groups of bars, in bars


def plot(path: Path, out: Path) -> None:
    """Draw a file of any ``bench`` command that writes one; which, its columns tell.

    Raises:
        Refusal: the file comes from no benchmark, or nothing in it was timed.
    """
    rows = read(path)
    columns = rows[0].keys()
    draw = next((draw for column, draw in _KINDS.items() if column in columns), None)
    if draw is None:
        raise Refusal(f"{path} comes from no benchmark that has a picture")
    try:
        with understood(path):
            figure = draw(rows)
    except Untimed:
        raise Refusal(f"nothing in {path} was timed; its notes say why") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and hatch of every peer, ours first."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    peers.sort(key=lambda peer: peer != "flashmask")
    styles, others = {}, 0
    for peer in peers:
        if peer == "flashmask":
            styles[peer] = (OURS, "")
        else:
            styles[peer] = (_COLORS[others % len(_COLORS)], _HATCHES[(others + 1) // 2 % len(_HATCHES)])
            others += 1
    return styles


def _kernels(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = timed(rows, "ms")
    shapes = sorted({(int(row["seq_len"]), int(row["head_dim"])) for row in rows})
    # The latest measurement counts, should there be several.
    found = {(int(r["seq_len"]), int(r["head_dim"]), r["pass"], r["mask"], r["peer"]): float(r["tflops"]) for r in rows}
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    styles = _styles(rows)
    most = max(sum(key[:3] == (*shape, which) for key in found) for shape in shapes for which in PASSES)
    width = max(5.5, 0.125 * (most + _GAP * len(masks)) + 1.2)
    height = 3.1 * len(shapes) + 1.3
    figure = Figure(figsize=(2 * width, height), dpi=120, layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False)
    for line, shape in zip(axes, shapes, strict=True):
        for ax, which in zip(line, PASSES, strict=True):
            values = {
                mask: {p: found[(*shape, which, mask, p)] for p in styles if (*shape, which, mask, p) in found}
                for mask in masks
            }
            _bars(ax, values, styles)
            ax.set_title(f"{PASSES[which]}, {shape[0]:,} tokens, head dim {shape[1]}", fontsize=11, color=INK)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=peer) for peer, (c, h) in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)
    figure.suptitle(f"Attention kernels, TFLOP/s of visible pairs (higher is better)\n{origin(rows)}", fontsize=13)
    return figure


def _bars(ax: Axes, values: Mapping[str, Mapping[str, float]], styles: Mapping[str, tuple[str, str]]) -> None:
    """One group of bars a mask, as wide as there are peers with such a mask."""
    left, centers = 0.0, []
    for group in values.values():
        for i, (peer, tflops) in enumerate(group.items()):
            color, hatch = styles[peer]
            ax.bar(left + i + 0.5, tflops, 0.94, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        centers.append(left + max(1, len(group)) / 2)
        left += max(1, len(group)) + _GAP
    names = [name.replace("_", " ") for name in values]
    ax.set_xticks(centers, names, rotation=32, ha="right", rotation_mode="anchor", fontsize=9)
    ax.set_xlim(-_GAP, left)
    ax.set_ylabel("TFLOP/s", color=INK)
    plain(ax)
    ax.tick_params(axis="x", length=0)


def _sparsity(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    rows = timed(rows, "ms")
    figure = Figure(figsize=(10.5, 4.9), dpi=150, layout="constrained")
    for ax, (which, title) in zip(figure.subplots(1, 2), PASSES.items(), strict=True):
        tiles, ms = sparsity.points(rows, which)
        ax.scatter(tiles, ms, s=26, color=OURS, zorder=3, label="one mask")
        if len(set(tiles)) > 1:
            line = sparsity.fit(tiles, ms)
            ends = [0.0, max(tiles)]
            label = f"{line.slope * 1e3:.3g} µs a tile + {line.intercept:.2g} ms, R² = {line.r_squared:.4f}"
            ax.plot(ends, [line.slope * t + line.intercept for t in ends], color="#d55e00", linewidth=1.6, label=label)
        ax.set_title(title, fontsize=11, color=INK)
        ax.set_xlabel("tiles of 128 x 128 with a visible pair, a head", color=INK)
        ax.set_ylabel("ms", color=INK)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        plain(ax)
        ax.legend(frameon=False, loc="upper left", fontsize=9.5)
    row = rows[0]
    shape = f"{int(row['seq_len']):,} tokens, {row['heads']} heads of {row['head_dim']}, batch {row['batch']}"
    figure.suptitle(
        f"Packed causal documents of rising sparsity: {row['peer']}, {shape}\n{origin(rows)}", fontsize=11.5
    )
    return figure


# Curves lie on each other, so each is thinner than the one below it.
_CURVES = {
    "sdpa": {"color": "#e69f00", "linewidth": 7.0, "alpha": 0.45},
    "eager": {"color": "#009e73", "linewidth": 3.4, "alpha": 0.8, "marker": "s", "markersize": 4},
    "sdpa math": {"color": "#cc79a7", "linewidth": 2.0, "marker": "^", "markersize": 5},
    "flashmask": {"color": OURS, "linewidth": 1.8, "marker": "o", "markersize": 4},
    "flashmask again": {"color": INK, "linewidth": 1.2, "linestyle": (0, (2, 3))},
}


def _convergence(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The latest run counts, should there be several: rows of its setup, and the last of each method.
    setup = ("gpu", "torch", "commit", "layers", "hidden", "heads", "intermediate", "row_len", "steps", "lr", "dtype")
    row = rows[-1]
    rows = [r for r in rows if all(r[name] == row[name] for name in setup)]
    curves: dict[str, dict[int, float]] = {}
    checksums: dict[str, str] = {}
    for r in rows:
        curves.setdefault(r["method"], {})[int(r["step"])] = float(r["loss"])
        checksums[r["method"]] = r["checksum"]

    figure = Figure(figsize=(8.6, 7.6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
    for name, style in _CURVES.items():
        if name in curves:
            top.plot(list(curves[name]), list(curves[name].values()), label=name, **style)  # type: ignore[arg-type]
    top.set_ylabel("training loss", color=INK)
    top.legend(frameon=False, fontsize=10, handlelength=3.5)

    base = curves.get("sdpa", {})
    for name in ("eager", "sdpa math", "flashmask"):
        if name in curves and base:
            away = {step: abs(loss - base[step]) for step, loss in curves[name].items()}
            # A logarithm has no place for 0: such steps show no point.
            style = _CURVES[name] | {"linewidth": 1.6, "alpha": 1.0}
            label = f"{name}, at most {max(away.values()):.1e}"
            shown = [value if value > 0 else float("nan") for value in away.values()]
            bottom.plot(list(away), shown, label=label, **style)  # type: ignore[arg-type]
    bottom.set_yscale("log")
    bottom.set_ylabel("|difference from sdpa|", color=INK)
    bottom.set_xlabel("step", color=INK)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if base and len(curves) > 1:
        bottom.legend(frameon=False, fontsize=10, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    for ax in (top, bottom):
        plain(ax)
    ours, again = ("flashmask", "flashmask again")
    if ours in curves and again in curves:
        same = curves[ours] == curves[again] and checksums[ours] == checksums[again]
        top.set_title(f"flashmask twice: {'' if same else 'NOT '}bit-identical", fontsize=10.5, color=INK)
    shape = f"Llama, {row['layers']} layers x {row['hidden']}, {row['dtype']}, rows of {int(row['row_len']):,} tokens"
    figure.suptitle(f"Packed training under several exact attentions: {shape}\n{origin(rows)}", fontsize=11.5)
    return figure


# Of TRL's trainers: what a task is called in the picture.
_TASKS = {"sft": "packed SFT", "lora": "packed SFT, LoRA", "dpo": "DPO", "reward": "reward model"}


def _trainers(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    # The latest run counts, should there be several.
    curves = {(r["task"], r["method"], int(r["step"])): float(r["loss"]) for r in rows}
    checksums = {(r["task"], r["method"]): r["checksum"] for r in rows}
    tasks = [task for task in _TASKS if any(key[0] == task for key in curves)]
    across = min(2, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(5.2 * across, 3.3 * down + 0.8), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for ax, task in zip(axes, tasks, strict=False):
        losses = {
            name: [curves[key] for key in sorted(key for key in curves if key[:2] == (task, name))]
            for name in ("sdpa", "flashmask", "flashmask again")
        }
        for name, values in losses.items():
            ax.plot(range(1, len(values) + 1), values, label=name, **_CURVES[name] | {"marker": None})
        same = (
            losses["flashmask"] == losses["flashmask again"]
            and checksums[task, "flashmask"] == checksums[task, "flashmask again"]
        )
        away = gap(losses["flashmask"], losses["sdpa"])
        repeats = "bit-identical" if same else "NOT bit-identical"
        ax.set_title(f"{_TASKS[task]}: at most {away:.0e} from sdpa, {repeats} twice", fontsize=10, color=INK)
        ax.set_xlabel("step", color=INK)
        ax.set_ylabel("loss", color=INK)
        plain(ax)
    for ax in list(axes)[len(tasks) :]:
        ax.remove()
    figure.axes[0].legend(frameon=False, fontsize=9)
    row = rows[-1]
    shape = f"Llama of {row['layers']} layers x {row['hidden']}, float32, GSM8K"
    figure.suptitle(f"TRL {row['trl']}'s trainers: {shape}\n{origin(rows)}", fontsize=11.5)
    return figure


def _train(rows: Sequence[Row]) -> Figure:
    """Tokens a second and memory of steps; of several runs of a case the first counts, which has all methods."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = {(r["case"], r["method"]): r for r in reversed(timed(rows, "tokens_per_s"))}
    facts = {case: (case.split("_")[0], int(row["tokens"]), row["layers"]) for (case, _), row in found.items()}
    kinds = ("dpo", "reward", "grpo", "sft")
    cases = sorted(facts, key=lambda case: (kinds.index(facts[case][0]), facts[case][1]))
    figure = Figure(figsize=(1.25 * len(cases) + 2, 6.6), dpi=110, layout="constrained")
    panels = (
        ("tokens_per_s", 1e-3, "thousand useful tokens a second"),
        ("activation_mib", 1 / 1024, "activations, GiB"),
    )
    for ax, (column, unit, label) in zip(figure.subplots(2, 1), panels, strict=True):
        for i, case in enumerate(cases):
            methods = [method for method in METHODS if (case, method) in found]
            for j, method in enumerate(methods):
                value = float(found[case, method][column]) * unit
                _, color, hatch, _ = METHODS[method]
                at = i + (j - (len(methods) - 1) / 2) * 0.26
                ax.bar(at, value, 0.24, color=color, hatch=hatch, edgecolor="white", linewidth=0)
                ax.annotate(f"{value:.3g}", (at, value), ha="center", va="bottom", fontsize=8, color=INK)
        ax.set_xticks(range(len(cases)), [case.replace("_", " ") for case in cases], fontsize=9.5)
        ax.set_ylabel(label, color=INK)
        plain(ax)
        ax.tick_params(axis="x", length=0)
    used = [method for method in METHODS if any(key[1] == method for key in found)]
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=n) for n, c, h, _ in (METHODS[m] for m in used)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    layers = {facts[case][0]: facts[case][2] for case in cases}
    shape = ", ".join(f"{kind} {n}" for kind, n in layers.items())
    title = f"Training steps of a Llama of width {rows[0]['hidden']}, LoRA, bfloat16; layers: {shape}"
    figure.suptitle(f"{title}\n{origin(list(found.values()))}", fontsize=11.5)
    return figure


# By a column that the files of one benchmark have and those of the ones below do not.
_KINDS: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "visible": plots_lengths.sweep,
    "fits": plots_lengths.longest,
    "kv_len": plots_inference.infer,
    "prompt_tokens": plots_inference.serving,
    "case": _train,
    "task": _trainers,
    "checksum": _convergence,
    "tiles": _sparsity,
    "peer": _kernels,
}
