"""What `flashmask` refuses before it runs anything, and how it ends."""

import subprocess
import sys

import pytest

from hf_flashmask import cli
from hf_flashmask.bench import arguments, demo, kernels
from hf_flashmask.coverage import report, run
from hf_flashmask.coverage.outcome import FAILED, MISMATCH, NOT_BUILDABLE, NOT_ROUTED, OK, REFUSED, Row

MODELS = ("check", "--models", "llama", "--kinds", "causal")


def ended(*command):
    with pytest.raises(SystemExit) as error:
        cli.main(command)
    return error.value.code


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["check", "llama"], "unexpected 'llama': model types go after --models"),
        (["check", "--models", "llama", "--", "-k", "x"], "unexpected '-k'"),
        (["check", "--jobs", "2"], "--jobs goes with --models"),
        (["check", "--timeout", "9"], "--timeout goes with --models"),
        (["check", "--out", "x.csv"], "--out goes with --models"),
        (["check", "--models", "--seconds", "9"], "--seconds does not go with --models"),
        (["check", "--transformers-tests", ".", "--jobs", "2"], "--jobs does not go with --transformers-tests"),
        (["check", "--seconds", "0"], "must be more than 0 seconds, got 0"),
        (["check", "--seconds", "nan"], "must be more than 0 seconds, got nan"),
        (["check", "--models", "--timeout", "-1"], "must be more than 0 seconds, got -1"),
    ],
)
def test_what_check_would_ignore_is_an_error_of_usage(capsys, command, message):
    assert ended(*command) == 2
    assert message in capsys.readouterr().err


def test_check_of_models_fails_with_its_types(monkeypatch, tmp_path):
    before = tmp_path / "before.csv"
    report.write_csv([Row("causal", "llama", OK)], before)
    for status in (OK, REFUSED, NOT_ROUTED, NOT_BUILDABLE, MISMATCH, FAILED):
        monkeypatch.setattr(run, "run", lambda *_, status=status, **__: [Row("causal", "llama", status, "why")])
        wrong = f"differ from eager or failed:\ncausal llama: {status} (why)"
        if status in (MISMATCH, FAILED):
            assert wrong in ended(*MODELS)
        else:
            cli.main(MODELS)
        if status != OK:
            code = ended(*MODELS, "--against", str(before))
            assert f"lost since {before}:\ncausal llama: was ok, now {status}" in code
            assert (wrong in code) == (status in (MISMATCH, FAILED))


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--out", "table.md", "beside which the same is written as .md"),
        ("--out", "folder", "is a directory"),
        ("--out", "file/table.csv", "file is a file"),
        ("--against", "missing.csv", "there is no"),
        ("--against", "folder", "cannot be read as CSV"),
        ("--against", "file", "is no table of 'flashmask check --models': it has no column"),
    ],
)
def test_paths_are_checked_before_models_run(monkeypatch, tmp_path, option, name, message):
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a,b\n1,2\n")
    assert message in ended(*MODELS, option, str(tmp_path / name))


def test_folders_of_a_table_are_made(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run", lambda *_, **__: [Row("causal", "llama", OK)])
    out = tmp_path / "new" / "deep" / "table.csv"
    cli.main([*MODELS, "--out", str(out)])
    assert out.exists()
    assert "llama" in out.with_suffix(".md").read_text()


def test_pictures_are_checked_before_they_are_needed(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)  # nothing more is needed
    monkeypatch.setattr(demo, "demo", lambda *_: pytest.fail("it ran"))
    for command in (("demo", "--out"), ("bench", "convergence", "--plot"), ("bench", "trainers", "--plot")):
        assert "must end in what pictures end in" in ended(*command, str(tmp_path / "picture.xyz"))


def test_a_missing_extra_is_installed_from_the_clone(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    message = "needs fastapi, openai, uvicorn: pip install -c constraints.txt '.[serve]' in the clone"
    assert message in ended("serve", "x")


@pytest.mark.parametrize("what", ["kernels", "sparsity"])
def test_benchmarks_of_kernels_need_their_device_and_backend(monkeypatch, tmp_path, what):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    out = ("--out", str(tmp_path / "out.csv"))
    assert "there is no CUDA device" in ended("bench", what, *out)
    message = "backend must be among auto, reference, torch, triton, hopper, got nope"
    assert message in ended("bench", what, "--device", "cpu", "--backend", "nope", *out)
    assert message in ended("bench", "infer", "--device", "cpu", "--backend", "nope", *out)


def test_methods_of_serving_are_attention_implementations(tmp_path):
    code = ended("bench", "serving", "--device", "cpu", "--methods", "sdpa", "nope", "--out", str(tmp_path / "out.csv"))
    assert "methods must be among eager, " in code
    assert code.endswith("got nope")


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_env", interrupted)
    assert ended("env") == 130


def test_a_closed_pipe_ends_quietly():
    command = [sys.executable, "-m", "hf_flashmask.cli", "show", "--lengths", "3"]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert done.stderr.read() == ""
    assert done.wait() == 141
