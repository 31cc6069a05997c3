"""Every notebook runs from its first to its last cell, and holds small pictures and no errors."""

import ast
import json
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 250_000


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def code(cell):
    """Without IPython's own lines, which install and set up the notebook."""
    return "\n".join(line for line in source(cell).splitlines() if not line.startswith("%"))


@pytest.fixture
def plain_process(monkeypatch):
    """One thread, no window, and nothing left on: notebooks run in this process, for their imports' sake."""
    import torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    monkeypatch.setenv("MPLBACKEND", "Agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    import matplotlib.pyplot as plt

    from hf_flashmask import patches

    logging.set_verbosity(verbosity)
    plt.close("all")
    patches.disable()


@pytest.mark.usefixtures("plain_process")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    pytest.importorskip("trl")
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(cells(path, "code")):
        exec(compile(code(cell), f"{path.name}[{i}]", "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    first, *others = cells(path, "code")
    assert source(first).startswith('%pip install -q "hf-flashmask[')
    assert ast.parse(code(first)).body == []
    owner = yaml.safe_load((FOLDER.parent / "mkdocs.yml").read_text().split("\nplugins:")[0])["repo_url"]
    badge = f"{owner.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/notebooks/"
    assert f"({badge}{path.name})" in source(cells(path, "markdown")[0])
    assert path.stat().st_size < MOST_BYTES
    outputs = [output for cell in others for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
        # No paths, and no memory addresses, of the machine that ran it.
        assert "/work/" not in json.dumps(output)
        assert "0x" not in "".join(output.get("text", []))


def test_all_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]
