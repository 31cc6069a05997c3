"""What importing costs and loads, which way imports go, and what a wheel holds."""

import ast
import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import those after it, never those before it.
LAYERS = [
    "hf_flashmask.patches",
    "hf_flashmask.prefix_sharing",
    "hf_flashmask.huggingface",
    "hf_flashmask.attention",
    "hf_flashmask.masks",
]
ABOVE_ALL = [
    "hf_flashmask.bench",
    "hf_flashmask.cli",
    "hf_flashmask.coverage",
    "hf_flashmask.diagnostics",
    "hf_flashmask.trl_script",
]


def python(code, **options):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import hf_flashmask",
        "import hf_flashmask, transformers; from transformers import LlamaForCausalLM",
        "from hf_flashmask import ColumnMask, flashmask_attention, masks",
    ],
)
def test_importing_loads_nothing_optional(code):
    heavy = ("triton", "trl", "peft", "datasets", "matplotlib")
    # Transformers itself imports some of these where they are installed: what counts is what we add.
    alone = code.replace("import hf_flashmask, transformers; ", "").replace(
        "import hf_flashmask", "import transformers"
    )
    alone = alone.replace("from hf_flashmask import ColumnMask, flashmask_attention, masks", "import torch")
    report = f"; import sys; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    assert set(python(code + report).split()) <= set(python(alone + report).split())
    if "transformers" not in code:
        assert python(code + report) == ""


@pytest.mark.parametrize("missing", ["triton", "trl", "peft", "datasets", "matplotlib"])
def test_works_without_optional_packages(missing):
    python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import hf_flashmask, torch\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert 'flashmask' in ALL_ATTENTION_FUNCTIONS\n"
        "q = torch.randn(1, 8, 2, 4)\n"
        "hf_flashmask.flashmask_attention(q, q, q, hf_flashmask.masks.causal(8))"
    )


@pytest.mark.timing
def test_importing_takes_little_more_than_transformers():
    # Timed after Transformers in one process: a difference of two imports of five seconds would be mostly noise.
    clock = "{}; import time; begin = time.perf_counter(); import hf_flashmask; print(time.perf_counter() - begin)"
    for transformers in ("import transformers", "from transformers import PreTrainedModel"):
        assert min(float(python(clock.format(transformers))) for _ in range(3)) <= 0.3


def test_masks_made_before_any_model_is_imported():
    python(
        "import hf_flashmask, torch\n"
        "from transformers import LlamaConfig\n"
        "from transformers.masking_utils import create_causal_mask\n"
        "config = LlamaConfig(attn_implementation='flashmask')\n"
        "keep = torch.tensor([[0, 1, 1]])\n"
        "mask = create_causal_mask(config, torch.zeros(1, 3, 8), keep, None)\n"
        "assert mask.to_dense().sum() == 3, mask"
    )


@pytest.mark.parametrize("module", ["attention", "masking", "packing", "paged", "tree_mask"])
def test_our_own_modules_come_first(module):
    python(
        f"import hf_flashmask.huggingface.{module}\n"
        "from transformers import AttentionInterface\n"
        "assert 'flashmask' in AttentionInterface()"
    )


@pytest.mark.parametrize("first", ["hf_flashmask", "transformers.modeling_utils", "transformers.masking_utils"])
def test_registers_whichever_is_imported_first(first):
    second = {"hf_flashmask": "transformers.modeling_utils"}.get(first, "hf_flashmask")
    python(
        f"import {first}, {second}\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS\n"
        "assert 'flashmask' in ALL_ATTENTION_FUNCTIONS and 'flashmask' in ALL_MASK_ATTENTION_FUNCTIONS\n"
        "import importlib.util; assert importlib.util.find_spec('transformers.modeling_utils') is not None"
    )


def modules():
    for folder, package in ((ROOT / "hf_flashmask", "hf_flashmask"), (ROOT / "patches", "hf_flashmask.patches")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield name, path


def imported(name, path):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(name, layers):
    return next((i for i, one in enumerate(layers) if name == one or name.startswith(one + ".")), None)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_down_only(name, path):
    own = layer(name, LAYERS)
    for target in imported(name, path):
        if own is not None:
            other = layer(target, LAYERS)
            assert other is None or other >= own, f"{name} imports {target}"
            assert layer(target, ABOVE_ALL) is None, f"{name} imports {target}"


def test_masks_and_attention_do_not_know_transformers():
    for name, path in modules():
        if layer(name, LAYERS[LAYERS.index("hf_flashmask.attention") :]) is not None:
            assert not any(t.split(".")[0] in ("transformers", "trl", "peft") for t in imported(name, path)), name


def test_wheel_and_sdist_hold_everything(tmp_path):
    """An sdist of a copy of what is committed, a wheel of that sdist, and its commands in an environment of its own."""
    source = tmp_path / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    # Without --sdist or --wheel the wheel is built from the sdist.
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "patches/__init__.py"} <= sources
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, path in modules():
        inside = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        assert inside in held
    for extra in ("py.typed", "data/gsm8k_extract.jsonl", "data/gsm8k_pairs.jsonl", "data/GSM8K_LICENSE"):
        assert f"hf_flashmask/{extra}" in held
    assert any(n.endswith("licenses/LICENSE") for n in held)
    assert not any(n.startswith(("tests", "docs", "notebooks", "patches")) for n in held)

    # An environment of its own that finds torch and Transformers in this one: a path, so no editable install of ours.
    where = tmp_path / "environment"
    venv.create(where, with_pip=False)
    interpreter = where / "bin" / "python"
    (site,) = where.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    install = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import hf_flashmask, hf_flashmask.patches\n"
        "from hf_flashmask.bench.demo import preferences, texts\n"
        "assert len(texts()) > 100 and len(preferences()) > 100\n"
        "print(hf_flashmask.__file__, hf_flashmask.patches.__file__)"
    )
    files = subprocess.check_output([interpreter, "-c", code], text=True, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(site) for file in files)
    shown = subprocess.check_output([where / "bin" / "flashmask", "show", "--lengths", "2", "1"], text=True)
    assert "# . .\n# # .\n. . #" in shown


def test_installed_in_place_patches_is_the_top_level_folder():
    """`pip install -e .` maps hf_flashmask.patches to patches/."""
    from importlib.metadata import distributions

    origins = [json.loads(d.read_text("direct_url.json") or "{}") for d in distributions(name="hf-flashmask")]
    if not any(origin.get("dir_info", {}).get("editable") for origin in origins):
        pytest.skip("hf-flashmask is not installed in editable mode")
    where = python("import hf_flashmask.patches as p; print(p.__file__)", cwd="/")
    assert Path(where) == ROOT / "patches" / "__init__.py"


def test_no_prints_in_the_library():
    for name, path in modules():
        if layer(name, ABOVE_ALL) is None:
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), name
