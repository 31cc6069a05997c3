"""The ``flashmask`` command."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_flashmask.bench.commands import add_bench, need, positive, refusals

# Of coverage.build, which loads Transformers.
KINDS = ("causal", "seq2seq", "masked", "multimodal", "vision", "tower")
# Of diagnostics.show, which loads torch.
MASKS_OF_LENGTHS = ("causal_document", "document", "share_question", "causal_blockwise")


def _demo(args: argparse.Namespace) -> None:
    need(("trl", "datasets", "matplotlib"), "bench")
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
    if args.out is not None:
        need(("matplotlib",), "viz")
    from hf_flashmask.diagnostics import show

    with refusals():
        if args.model is not None:
            found = show.from_model(args.model, args.lengths or [args.length])
        elif args.lengths is not None:
            found = show.from_lengths(args.lengths, args.kind)
        elif args.position_ids is not None:
            found = show.from_position_ids(args.position_ids)
        elif args.file is not None:
            found = show.from_file(args.file)
        else:
            sys.exit("flashmask: what to show? --lengths, --position-ids, --file or --model")
        if args.out is None:
            print(show.text(found, args.size, batch=args.batch, head=args.head))
        else:
            show.picture(found, args.out, batch=args.batch, head=args.head)
            print(f"wrote {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.transformers_tests is not None:
        _check_upstream(args)
    elif args.models is not None:
        _check_models(args)
    else:
        _check_kernels(args)


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
        args.out.write_text(text)
        print(f"wrote {args.out}")
    if failed := sorted(t for t, outcome in upstream.losses(stock, ours).items() if outcome.status == upstream.FAILED):
        sys.exit("flashmask: these pass on sdpa and fail on flashmask:\n" + "\n".join(failed))


def _check_kernels(args: argparse.Namespace) -> None:
    given = [name for name in ("kinds", "out", "against") if getattr(args, name) is not None]
    if given:
        sys.exit(f"flashmask: --{given[0]} goes with --models")
    from tqdm.auto import tqdm

    from hf_flashmask.diagnostics import selftest

    print(f"Attention on this machine against float64; no case begins after {args.seconds:.0f} seconds.", flush=True)
    text, ok = selftest.run(args.seconds, track=functools.partial(tqdm, leave=False, unit="case"))
    print("\n" + text)
    sys.exit(not ok)


def _check_models(args: argparse.Namespace) -> None:
    from hf_flashmask.coverage import build, report, run

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
    if args.against is not None and (losses := report.lost(report.read_csv(args.against), rows)):
        sys.exit("\nflashmask: lost since " + str(args.against) + ":\n" + "\n".join(losses))


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
    check.add_argument(
        "--seconds", type=float, default=45.0, help="of the self-test, after which it begins nothing (%(default)s)"
    )
    what = check.add_mutually_exclusive_group()
    what.add_argument(
        "--models", nargs="*", metavar="TYPE", help="tiny random models of these types against eager, default all types"
    )
    what.add_argument(
        "--transformers-tests", type=Path, metavar="CHECKOUT", help="its tests with flashmask in sdpa's place; -- ARGS"
    )
    check.add_argument("pytest", nargs="*", default=[], metavar="-- ARGS", help="of pytest: tests, -k, ...")
    check.add_argument("--kinds", nargs="+", choices=KINDS, help="default all")
    check.add_argument("--jobs", type=positive, default=2, help="processes (%(default)s)")
    check.add_argument("--timeout", type=float, default=120.0, help="seconds a type (%(default)s)")
    check.add_argument("--out", type=Path, metavar="CSV", help="table to write, and the same in Markdown beside it")
    check.add_argument("--against", type=Path, metavar="CSV", help="an earlier table: fail if an ok of it is lost")
    check.set_defaults(run=_check)


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="draw a mask: of packed lengths, position_ids, a file or a model's layers")
    show.add_argument("--lengths", type=positive, nargs="+", metavar="N", help="tokens of packed documents")
    show.add_argument(
        "--kind", choices=MASKS_OF_LENGTHS, default="causal_document", help="what the lengths are of (%(default)s)"
    )
    show.add_argument("--position-ids", type=int, nargs="+", metavar="N", help="of packed documents or a prefix tree")
    show.add_argument("--file", type=Path, metavar="MASK", help="dense mask, bool or additive, .pt or .npy")
    show.add_argument("--model", metavar="TYPE", help="masks that layers of this model type get, windows shortened")
    show.add_argument("--length", type=positive, default=64, help="tokens of the model's row (%(default)s)")
    show.add_argument("--size", type=positive, default=32, help="most cells a side in the terminal (%(default)s)")
    show.add_argument("--batch", type=int, default=0, help="row of the batch (%(default)s)")
    show.add_argument("--head", type=int, default=0, help="(%(default)s)")
    show.add_argument("--out", type=Path, metavar="PNG", help="write a picture instead")
    show.set_defaults(run=_show)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.command = shlex.join(["flashmask", *argv])
    args.run(args)


if __name__ == "__main__":
    main()
