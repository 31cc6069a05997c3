"""A Markdown table of what ``flashmask bench sweep`` wrote."""

from __future__ import annotations

from collections.abc import Sequence

from .plot_style import Row, Untimed, latest, timed
from .records import Refusal
from .sweep import OUT_OF_MEMORY, SETUP
from .sweep_tasks import TASKS

TASK_NAMES = {"sft": "SFT", "lora": "LoRA", "dpo": "DPO", "rm": "RM"}
_TITLES = {
    "sdpa": "sdpa, dense mask",
    "flex_attention": "FlexAttention",
    "flash_varlen": "FlashAttention varlen",
    "flashmask": "flashmask",
}


def markdown(rows: Sequence[Row]) -> str:
    """Tokens a second of every method, and flashmask's over those of each other one: a line a task and length. Of the
    lengths it has the shortest, the longest that sdpa was timed at, and the longest of all.

    Raises:
        Refusal: nothing was timed.
    """
    rows = latest(rows, ("gpu", *SETUP))
    try:
        measured = timed(rows, "seconds")
    except Untimed:
        raise Refusal("nothing was timed; the notes say why") from None
    speed = {(r["task"], int(r["tokens"]), r["method"]): float(r["tokens_per_s"]) for r in measured}
    notes = {(r["task"], int(r["tokens"]), r["method"]): r["note"] for r in rows}
    lines = [f"| row | {' | '.join(_TITLES.values())} | flashmask over each |", "|---|" + "---|" * (len(_TITLES) + 1)]
    for task in (task for task in TASKS if any(key[0] == task for key in speed)):
        lengths = [key[1] for key in speed if key[0] == task]
        dense = [key[1] for key in speed if (key[0], key[2]) == (task, "sdpa")]
        for tokens in sorted({min(lengths), *([max(dense)] if dense else []), max(lengths)}):
            keys = [(task, tokens, method) for method in _TITLES]
            cells = [
                f"{speed[key]:,.0f}" if key in speed else OUT_OF_MEMORY if notes.get(key) == OUT_OF_MEMORY else "-"
                for key in keys
            ]
            *others, ours = keys
            over = [f"{speed[ours] / speed[key]:.2f}x" if {key, ours} <= speed.keys() else "-" for key in others]
            cells[-1] = f"**{cells[-1]}**"
            lines.append(f"| {TASK_NAMES[task]}, {tokens:,} tokens | {' | '.join(cells)} | {', '.join(over)} |")
    return "\n".join(lines)
