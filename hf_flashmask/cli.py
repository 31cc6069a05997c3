"""The ``flashmask`` command."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_flashmask.bench.arguments import mode, need, picture, positive, refusals, seconds, writable
from hf_flashmask.bench.commands import add_bench

# Of coverage.build, which loads Transformers.
KINDS = ("causal", "seq2seq", "masked", "multimodal", "vision", "tower")
# Of diagnostics.show, which loads torch.
MASKS_OF_LENGTHS = ("causal_document", "document", "share_question", "causal_blockwise")
# What goes with the argument that chooses what to do, and the defaults, apart so that what was given can be told.
CHECKS = {
    "models": ("kinds", "jobs", "timeout", "out", "against"),
    "transformers_tests": ("out",),
    "": ("seconds",),
}
CHECK_DEFAULTS = {"seconds": 45.0, "jobs": 2, "timeout": 120.0}
SHOWS = {"model": ("lengths", "length"), "lengths": ("kind",), "position_ids": (), "file": ()}
SHOW_DEFAULTS = {"kind": MASKS_OF_LENGTHS[0], "length": 64}


def _demo(args: argparse.Namespace) -> None:
    need(("trl", "datasets", "matplotlib"), "bench")
    picture(args.out)
    from hf_flashmask.bench import demo

    setup = demo.Setup(row_len=args.row_len, steps=args.steps, threads=args.threads)
    print("Three small trainings on GSM8K, about two minutes on two CPU cores.")
    print("\n" + demo.demo(args.out, setup))
    print(f"\nwrote {args.out}")


def _trl(args: argparse.Namespace) -> None:
    need(("trl", "datasets"), "trl")
    from hf_flashmask import patches

    with patches.enabled():
        from trl.cli.main import main as trl

        sys.exit(trl(args.rest))


def _serve(args: argparse.Namespace) -> None:
    need(("fastapi", "openai", "uvicorn"), "serve")
    from hf_flashmask.huggingface import serve

    serve.run(args.rest)


def _env(args: argparse.Namespace) -> None:
    from hf_flashmask.diagnostics import environment

    print(environment.report())


def _show(args: argparse.Namespace) -> None:
    source = mode(args, SHOWS)
    if not source:
        args.error("what to show? --lengths, --position-ids, --file or --model")
    if args.lengths is not None and args.length is not None:
        args.error("--length does not go with --lengths")
    _fill(args, SHOW_DEFAULTS)
    if args.out is not None:
        need(("matplotlib",), "viz")
        picture(args.out)
    from hf_flashmask.diagnostics import show

    with refusals():
        if source == "model":
            found = show.from_model(args.model, args.lengths or [args.length])
        elif source == "lengths":
            found = show.from_lengths(args.lengths, args.kind)
        elif source == "position_ids":
            found = show.from_position_ids(args.position_ids)
        else:
            found = show.from_file(args.file)
        if args.out is None:
            print(show.text(found, args.size, batch=args.batch, head=args.head))
        else:
            show.picture(found, args.out, batch=args.batch, head=args.head)
            print(f"wrote {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.pytest and args.transformers_tests is None:
        args.error(
            f"unexpected {args.pytest[0]!r}: model types go after --models, arguments of pytest after "
            "--transformers-tests CHECKOUT --"
        )
    what = mode(args, CHECKS)
    _fill(args, CHECK_DEFAULTS)
    if args.out is not None:
        writable(args.out)
    {"transformers_tests": _check_upstream, "models": _check_models, "": _check_kernels}[what](args)


def _fill(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Arguments that were not given become these."""
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})


def _check_upstream(args: argparse.Namespace) -> None:
    need(("parameterized", "pytest"), "test")
    from importlib.metadata import version

    from hf_flashmask.coverage import upstream

    progress = functools.partial(print, file=sys.stderr, flush=True)
    try:
        stock, ours = upstream.run(args.transformers_tests, args.pytest, progress)
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f"flashmask: {error}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    text = upstream.markdown(stock, ours, args.command, versions)
    print("\n" + text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        print(f"wrote {args.out}")
    if failed := sorted(t for t, outcome in upstream.losses(stock, ours).items() if outcome.status == upstream.FAILED):
        sys.exit("flashmask: these pass on sdpa and fail on flashmask:\n" + "\n".join(failed))


def _check_kernels(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from hf_flashmask.diagnostics import selftest

    print(f"Attention on this machine against float64; no case begins after {args.seconds:.0f} seconds.", flush=True)
    text, ok = selftest.run(args.seconds, track=functools.partial(tqdm, leave=False, unit="case"))
    print("\n" + text)
    sys.exit(not ok)


def _check_models(args: argparse.Namespace) -> None:
    if args.out is not None and args.out.suffix == ".md":
        sys.exit(f"flashmask: --out names the CSV file, beside which the same is written as .md, got {args.out}")
    from hf_flashmask.coverage import build, report, run

    with refusals():
        before = [] if args.against is None else report.read_csv(args.against)
    known = [(kind, name) for kind in args.kinds or build.KINDS for name in build.model_types(kind)]
    unknown = sorted(set(args.models) - {name for _, name in known})
    if unknown:
        sys.exit(
            f"flashmask: this Transformers has no model type {', '.join(unknown)} among {args.kinds or 'all kinds'}"
        )
    wanted = [pair for pair in known if not args.models or pair[1] in args.models]
    progress = functools.partial(print, file=sys.stderr, flush=True)
    rows = run.run(wanted, jobs=args.jobs, timeout=args.timeout, progress=progress)
    print("\n" + report.summary(rows))
    if args.out is not None:
        report.write_csv(rows, args.out)
        text = args.out.with_suffix(".md")
        text.write_text(report.markdown(rows, args.command))
        print(f"\nwrote {args.out} and {text}")
    found = {
        "these differ from eager or failed": report.wrong(rows),
        f"lost since {args.against}": report.lost(before, rows),
    }
    if any(found.values()):
        sys.exit("\n".join(f"\nflashmask: {what}:\n" + "\n".join(lines) for what, lines in found.items() if lines))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="flashmask", description="FlashMask for Hugging Face Transformers.")
    commands = top.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="packed SFT on real text, checked against documents run one by one")
    demo.add_argument("--out", type=Path, default=Path("flashmask_demo.png"), help="picture to write (%(default)s)")
    demo.add_argument("--row-len", type=positive, default=4096, help="tokens a packed row (%(default)s)")
    demo.add_argument("--steps", type=positive, default=16, help="optimizer steps (%(default)s)")
    demo.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    demo.set_defaults(run=_demo)

    trl = commands.add_parser(
        "trl", add_help=False, help="TRL's command line with --padding_free true for every trainer: trl dpo ..."
    )
    trl.add_argument("rest", nargs=argparse.REMAINDER)
    trl.set_defaults(run=_trl)

    commands.add_parser("env", help="versions, devices, backends and tiles: for a bug report").set_defaults(run=_env)
    serve = commands.add_parser(
        "serve", add_help=False, help="Transformers' server with flashmask: serve MODEL --continuous-batching ..."
    )
    serve.add_argument("rest", nargs=argparse.REMAINDER)
    serve.set_defaults(run=_serve)

    _add_check(commands)
    _add_show(commands)

    add_bench(commands)
    return top


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="self-test of the kernels on this machine; with --models, every model type; or Transformers' own tests",
    )
    check.add_argument("--seconds", type=seconds, help="of the self-test, after which it begins nothing (45)")
    what = check.add_mutually_exclusive_group()
    what.add_argument(
        "--models", nargs="*", metavar="TYPE", help="tiny random models of these types against eager, default all types"
    )
    what.add_argument(
        "--transformers-tests", type=Path, metavar="CHECKOUT", help="its tests with flashmask in sdpa's place; -- ARGS"
    )
    check.add_argument("pytest", nargs="*", default=[], metavar="-- ARGS", help="of pytest: tests, -k, ...")
    check.add_argument("--kinds", nargs="+", choices=KINDS, help="default all")
    check.add_argument("--jobs", type=positive, help="processes (2)")
    check.add_argument("--timeout", type=seconds, help="seconds a type (120)")
    check.add_argument(
        "--out", type=Path, metavar="FILE", help="CSV to write, and the same as .md beside it; of tests Markdown"
    )
    check.add_argument("--against", type=Path, metavar="CSV", help="an earlier table: fail if an ok of it is lost")
    check.set_defaults(run=_check, error=check.error)


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="draw a mask: of packed lengths, position_ids, a file or a model's layers")
    show.add_argument("--lengths", type=positive, nargs="+", metavar="N", help="tokens of packed documents")
    show.add_argument("--kind", choices=MASKS_OF_LENGTHS, help=f"what the lengths are of ({SHOW_DEFAULTS['kind']})")
    show.add_argument("--position-ids", type=int, nargs="+", metavar="N", help="of packed documents or a prefix tree")
    show.add_argument("--file", type=Path, metavar="MASK", help="dense mask, bool or additive, .pt or .npy")
    show.add_argument("--model", metavar="TYPE", help="masks that layers of this model type get, windows shortened")
    show.add_argument("--length", type=positive, help="tokens of the model's row (64)")
    show.add_argument("--size", type=positive, default=32, help="most cells a side in the terminal (%(default)s)")
    show.add_argument("--batch", type=int, default=0, help="row of the batch (%(default)s)")
    show.add_argument("--head", type=int, default=0, help="(%(default)s)")
    show.add_argument("--out", type=Path, metavar="PNG", help="write a picture instead")
    show.set_defaults(run=_show, error=show.error)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = parser().parse_args(argv)
            args.command = shlex.join(["flashmask", *argv])
            args.run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + 2)  # as a shell says of what SIGINT ended
    except BrokenPipeError:
        # Who read the output has seen enough. Python flushes once more when it ends, into nothing then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


if __name__ == "__main__":
    main()
