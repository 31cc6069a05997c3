"""Workflows run what the repository has, with actions pinned to commits."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps():
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from job["steps"]


def test_actions_are_pinned_to_commits():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            assert "uses:" not in line or re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_what_they_run_is_there():
    (matrix,) = [
        job["strategy"]["matrix"]["include"]
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text())["jobs"].values()
        if "strategy" in job
    ]
    for row in matrix:
        assert all((ROOT / folder).exists() for folder in row["tests"].split())
    # The oldest of the matrix is the oldest that we say we serve.
    oldest = next(row["install"] for row in matrix if row["versions"] == "oldest")
    project = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "transformers", "triton"):
        required = re.search(rf'"{package}>=([\d.]+)', project)[1]
        assert f"{package}=={required}." in oldest
    makefile = (ROOT / "Makefile").read_text()
    for step in steps():
        for target in re.findall(r"\bmake (\w+)", step.get("run", "")):
            assert f"\n{target}:" in makefile


def test_forms_ask_for_the_commands_that_there_are():
    from hf_flashmask.cli import parser

    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_re*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        for command in re.findall(r"`flashmask ([a-z]+)`", path.read_text()):
            parser().parse_args([command] + (["--lengths", "1"] if command == "show" else []))
