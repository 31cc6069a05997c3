"""The pages of the documentation, the README among them, and their blocks of code."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int
    options: str
    code: str

    @property
    def where(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page, language):
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        if match["language"] == language:
            line = text[: match.start()].count("\n") + 2
            yield Block(page, line, match["options"].strip(), match["code"])
