"""The site builds without a warning, and what pages quote is in the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

SOURCES = [*(ROOT / "hf_flashmask").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]


def test_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for page in ("index.html", "concepts/index.html", "recipes/dpo/index.html", "api/index.html"):
        assert (tmp_path / "site" / page).exists()
    for page in (tmp_path / "site").rglob("*.html"):
        for source in re.findall(r'<img [^>]*src="(?!https?:|data:)([^"]+)"', page.read_text()):
            assert (page.parent / source).resolve().exists(), (page, source)


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nplugins:")[0]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == {line.split()[-1] for line in nav.splitlines() if line.endswith(".md")}


def test_messages_are_those_of_the_code():
    """Literals of the code, joined as Python joins them; quotes of either kind."""
    code = "".join(path.read_text() for path in SOURCES)
    joined = re.sub(r'(?<=["\'])\s*\n\s*(?:if [^\n]*\n\s*)?f?(?=["\'])', "", code)
    joined = re.sub(r'""|\'\'', "", joined).replace("\\'", "'")
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith('| "')]
    assert len(rows) > 20
    for row in rows:
        message = row.split('"')[1]
        assert message in joined, message


def test_environment_variables_are_all_there():
    read = set()
    for path in SOURCES:
        if "coverage" not in path.parts and "bench" not in path.parts:
            read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text()))
    page = (ROOT / "docs" / "environment.md").read_text()
    assert read == {name for name in read if f"`{name}`" in page}
    assert read == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "docs/recipes/notebooks.md"])
def test_links_to_notebooks_exist(page):
    for name in re.findall(r"notebooks/(\w+\.ipynb)", (ROOT / page).read_text()):
        assert (ROOT / "notebooks" / name).exists()


def test_links_inside_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text()):
        assert Path(ROOT / target).exists(), target


def test_every_command_is_on_its_page():
    import argparse

    from hf_flashmask.cli import parser

    def names(of):
        (found,) = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
        return found.choices

    page = (ROOT / "docs" / "commands.md").read_text()
    commands = names(parser())
    assert {name for name in commands if f"`flashmask {name}`" not in page} == set()
    (line,) = [line for line in page.splitlines() if line.startswith("| `flashmask bench` |")]
    assert {name for name in names(commands["bench"]) if f"`{name}`" not in line} == set()
