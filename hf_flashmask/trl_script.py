"""``python -m hf_flashmask.trl_script NAME ...``: TRL's script NAME with the patches in place, in this process.

What ``flashmask trl NAME ...`` makes ``accelerate launch`` start.
"""

from __future__ import annotations

import runpy
import sys

from hf_flashmask import patches


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m hf_flashmask.trl_script NAME ...")
    name = sys.argv.pop(1)
    patches.enable()
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
