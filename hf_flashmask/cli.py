"""The ``flashmask`` command."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def _need(packages: Sequence[str], extra: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        sys.exit(f"flashmask: this command needs {', '.join(missing)}: pip install 'hf-flashmask[{extra}]'")


def _demo(args: argparse.Namespace) -> None:
    _need(("trl", "datasets", "matplotlib"), "bench")
    from hf_flashmask.bench import demo

    setup = demo.Setup(row_len=args.row_len, steps=args.steps, threads=args.threads)
    print("Three small trainings on GSM8K, about two minutes on two CPU cores.")
    print("\n" + demo.demo(args.out, setup))
    print(f"\nwrote {args.out}")


def _bench_cpu(args: argparse.Namespace) -> None:
    from hf_flashmask.bench import cpu

    print(cpu.report(cpu.Setup(seq_len=args.seq_len, threads=args.threads, repeats=args.repeats)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="flashmask", description="FlashMask for Hugging Face Transformers.")
    commands = top.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="packed SFT on real text, checked against documents run one by one")
    demo.add_argument("--out", type=Path, default=Path("flashmask_demo.png"), help="picture to write (%(default)s)")
    demo.add_argument("--row-len", type=_positive, default=4096, help="tokens a packed row (%(default)s)")
    demo.add_argument("--steps", type=_positive, default=16, help="optimizer steps (%(default)s)")
    demo.add_argument("--threads", type=_positive, default=2, help="CPU threads (%(default)s)")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measurements").add_subparsers(required=True, metavar="what")
    cpu = bench.add_parser("cpu", help="attention on this CPU, packed causal documents, against sdpa")
    cpu.add_argument("--seq-len", type=_positive, default=8192, help="tokens (%(default)s)")
    cpu.add_argument("--threads", type=_positive, default=2, help="CPU threads (%(default)s)")
    cpu.add_argument("--repeats", type=_positive, default=3, help="timed repeats (%(default)s)")
    cpu.set_defaults(run=_bench_cpu)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
