"""Prompts computed once: rows that begin alike are merged into one tree, run once, and taken apart again."""

from .merge import MergedRows, merge_rows
from .share import SharedPrompts, share_prompts

__all__ = ["MergedRows", "SharedPrompts", "merge_rows", "share_prompts"]
