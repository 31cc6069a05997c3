"""``flashmask bench ...``: its commands and their arguments."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from .arguments import need, picture, positive, refusals, seconds


def add_bench(commands: Any) -> None:
    """The ``bench`` command and those below it."""
    bench = commands.add_parser("bench", help="measurements").add_subparsers(required=True, metavar="what")
    cpu = bench.add_parser("cpu", help="attention on this CPU, packed causal documents, against sdpa")
    cpu.add_argument("--seq-len", type=positive, default=8192, help="tokens (%(default)s)")
    cpu.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    cpu.add_argument("--repeats", type=positive, default=3, help="timed repeats (%(default)s)")
    cpu.set_defaults(run=_bench_cpu)

    kernels = bench.add_parser("kernels", help="forward and backward of every mask, against other kernels")
    kernels.add_argument("--lengths", type=positive, nargs="+", default=[8192, 32768, 131072], help="tokens a row")
    kernels.add_argument("--head-dims", type=positive, nargs="+", default=[64, 128])
    kernels.add_argument("--masks", nargs="+", help="names, default all")
    kernels.add_argument("--peers", nargs="+", help="names, default all and those of plugins")
    kernels.add_argument("--tokens", type=positive, default=131072, help="batch x length (%(default)s)")
    kernels.add_argument("--hidden", type=positive, default=4096, help="heads x head dim (%(default)s)")
    _add_common(kernels, "kernels.csv")
    kernels.set_defaults(run=_bench_kernels)

    sparsity = bench.add_parser("sparsity", help="time against visited tiles, over packed causal documents")
    sparsity.add_argument("--seq-len", type=positive, default=32768, help="tokens a row (%(default)s)")
    sparsity.add_argument("--head-dim", type=positive, default=128, help="(%(default)s)")
    sparsity.add_argument("--heads", type=positive, default=32, help="(%(default)s)")
    sparsity.add_argument("--batch", type=positive, default=4, help="(%(default)s)")
    sparsity.add_argument("--count", type=positive, default=40, help="masks (%(default)s)")
    sparsity.add_argument("--peer", default="flashmask", help="whose kernel (%(default)s)")
    _add_common(sparsity, "sparsity.csv")
    sparsity.set_defaults(run=_bench_sparsity)

    convergence = bench.add_parser("convergence", help="losses of a packed training, against sdpa's dense mask")
    _add_model(convergence, layers=8)
    convergence.add_argument("--row-len", type=positive, default=4096, help="tokens a packed row (%(default)s)")
    convergence.add_argument("--steps", type=positive, default=20, help="optimizer steps (%(default)s)")
    convergence.add_argument("--lr", type=float, default=1e-4, help="AdamW's, after a short warm-up (%(default)s)")
    convergence.add_argument("--plot", type=Path, metavar="PNG", help="also draw the curves")
    _add_origin(convergence, "convergence.csv")
    convergence.set_defaults(run=_bench_convergence)

    train = bench.add_parser("train", help="training steps: DPO, reward, GRPO and packed SFT, against sdpa and flex")
    train.add_argument("--cases", nargs="+", help="names, default all")
    train.add_argument("--methods", nargs="+", help="names, default all")
    _add_model(train, layers=32)
    train.add_argument("--scale", type=positive, default=1, help="divides every length (%(default)s)")
    train.add_argument("--steps", type=positive, default=3, help="timed steps a method (%(default)s)")
    _add_origin(train, "train.csv")
    train.set_defaults(run=_bench_train)

    sweep = bench.add_parser(
        "sweep", help="the paper's training steps against the length of a row; goes on where it was"
    )
    sweep.add_argument("--tasks", nargs="+", help="of sft, lora, dpo, rm; default all")
    sweep.add_argument("--lengths", type=positive, nargs="+", help="tokens a row (4096, 8192, ... 524288)")
    sweep.add_argument("--methods", nargs="+", help="names, default all")
    _add_model(sweep, layers=32)
    sweep.add_argument("--steps", type=positive, default=3, help="timed steps a method, at most (%(default)s)")
    sweep.add_argument(
        "--step-limit", type=seconds, default=60.0, metavar="SECONDS",
        help="a method whose step takes longer meets no longer row (%(default)s)",
    )  # fmt: skip
    _add_origin(sweep, "sweep.csv")
    sweep.set_defaults(run=_bench_sweep)

    longest = bench.add_parser("longest", help="the longest packed row that this device trains on, by attention")
    longest.add_argument("--methods", nargs="+", help="names, default all")
    _add_model(longest, layers=32)
    longest.add_argument("--layers-run", type=positive, default=2, help="the others take memory alone (%(default)s)")
    longest.add_argument("--document", type=positive, default=32768, help="tokens a document (%(default)s)")
    longest.add_argument("--step", type=positive, default=32768, help="between lengths tried (%(default)s)")
    longest.add_argument("--most", type=positive, default=1 << 21, help="longest length tried (%(default)s)")
    _add_origin(longest, "longest.csv")
    longest.set_defaults(run=_bench_longest)

    trainers = bench.add_parser("trainers", help="losses of TRL's trainers on GSM8K, flashmask against sdpa")
    trainers.add_argument("--tasks", nargs="+", help="of sft, lora, dpo, reward; default all")
    trainers.add_argument("--layers", type=positive, default=3, help="(%(default)s)")
    trainers.add_argument("--hidden", type=positive, default=128, help="(%(default)s)")
    trainers.add_argument("--heads", type=positive, default=4, help="(%(default)s)")
    trainers.add_argument("--steps", type=positive, default=60, help="optimizer steps (%(default)s)")
    trainers.add_argument("--batch-size", type=positive, default=4, help="pairs of DPO and reward (%(default)s)")
    trainers.add_argument("--lr", type=float, help="AdamW's, after a short warm-up (1e-3, of the reward model 3e-4)")
    trainers.add_argument("--plot", type=Path, metavar="PNG", help="also draw the curves")
    _add_origin(trainers, "trainers.csv", device="cpu")
    trainers.set_defaults(run=_bench_trainers)
    _add_serving(bench)
    _add_infer(bench)

    table = bench.add_parser("table", help="a Markdown table of what 'kernels' or 'sweep' wrote")
    table.add_argument("csv", type=Path)
    table.add_argument("--head-dim", type=positive, default=128, help="of kernels (%(default)s)")
    table.add_argument("--peer", default="flex", help="to compare kernels with (%(default)s)")
    table.set_defaults(run=_bench_table)

    plot = bench.add_parser(
        "plot", help="a picture of what 'kernels', 'sparsity', 'convergence', 'train' or 'trainers' wrote"
    )
    plot.add_argument("csv", type=Path)
    plot.add_argument("--out", type=Path, help="picture to write (the CSV's name with .png)")
    plot.set_defaults(run=_bench_plot)


def _add_serving(bench: Any) -> None:
    serving = bench.add_parser("serving", help="generate_batch on prompts of mixed lengths, against sdpa")
    serving.add_argument("--methods", nargs="+", help="attention implementations, default sdpa and flashmask")
    serving.add_argument("--layers", type=positive, default=16, help="(%(default)s)")
    serving.add_argument("--hidden", type=positive, default=2048, help="(%(default)s)")
    serving.add_argument("--heads", type=positive, default=32, help="(%(default)s)")
    serving.add_argument("--kv-heads", type=positive, default=8, help="(%(default)s)")
    serving.add_argument("--intermediate", type=positive, default=8192, help="(%(default)s)")
    serving.add_argument("--requests", type=positive, default=64, help="prompts (%(default)s)")
    serving.add_argument("--new-tokens", type=positive, default=128, help="generated for each (%(default)s)")
    serving.add_argument("--step-tokens", type=positive, default=4096, help="most of a step (%(default)s)")
    serving.add_argument(
        "--cuda-graphs", choices=("none", "decode", "all"), default="none",
        help="steps that are captured and replayed; decoding ones are known by their block tables (%(default)s)",
    )  # fmt: skip
    serving.add_argument("--runs", type=positive, default=3, help="timed runs a method (%(default)s)")
    serving.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    serving.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    serving.add_argument("--out", type=Path, default=Path("serving.csv"), help="CSV to append rows to (%(default)s)")
    serving.add_argument("--commit", help="what to write as the commit (default: that of the checkout)")
    serving.set_defaults(run=_bench_serving)


def _add_infer(bench: Any) -> None:
    infer = bench.add_parser("infer", help="decoding over a cache, generate and long prefills, against sdpa and flex")
    infer.add_argument("--cases", nargs="+", help="names, default all")
    infer.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16, 64])
    infer.add_argument("--lengths", type=positive, nargs="+", default=[2048, 8192, 32768, 131072], help="keys")
    infer.add_argument("--memory", type=float, default=40.0, metavar="GIB", help="largest cache (%(default)s)")
    for name, default, what in (
        ("heads", 32, "query heads"), ("kv-heads", 8, "key heads"), ("head-dim", 128, "of attention alone"),
        ("layers", 8, "of whole models, as what follows"), ("hidden", 4096, "width"), ("intermediate", 14336, "width"),
        ("vocab-size", 128256, "tokens"), ("prompt", 4096, "tokens before generating"),
        ("new-tokens", 256, "generated"), ("prefill", 32768, "tokens of a prefill"), ("window", 4096, "of a prefill"),
        ("steps", 3, "timed runs of whole models"),
    ):  # fmt: skip
        infer.add_argument(f"--{name}", type=positive, default=default, help=f"{what} (%(default)s)")
    infer.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of models (%(default)s)")
    infer.add_argument("--backend", default="triton", help="of ours in attention alone (%(default)s)")
    _add_origin(infer, "infer.csv")
    infer.set_defaults(run=_bench_infer)


def _add_model(command: argparse.ArgumentParser, layers: int) -> None:
    command.add_argument("--layers", type=positive, default=layers, help="(%(default)s)")
    command.add_argument("--hidden", type=positive, default=4096, help="(%(default)s)")
    command.add_argument("--heads", type=positive, default=32, help="(%(default)s)")
    command.add_argument("--intermediate", type=positive, default=11008, help="(%(default)s)")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")


def _add_common(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("--plugin", type=Path, action="append", default=[], help="file with PEERS; may be repeated")
    command.add_argument("--backend", default="triton", help="of ours (%(default)s)")
    _add_origin(command, out)


def _add_origin(command: argparse.ArgumentParser, out: str, device: str = "cuda") -> None:
    command.add_argument("--out", type=Path, default=Path(out), help="CSV to append rows to (%(default)s)")
    command.add_argument("--device", choices=("cuda", "cpu"), default=device, help="(%(default)s)")
    command.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no further case after this")
    command.add_argument("--commit", help="what to write as the commit (default: that of the checkout)")


def _bench_cpu(args: argparse.Namespace) -> None:
    from . import cpu

    print(cpu.report(cpu.Setup(seq_len=args.seq_len, threads=args.threads, repeats=args.repeats)))


def _bench_kernels(args: argparse.Namespace) -> None:
    from . import kernel_masks, kernels

    with refusals():
        setup = kernels.Setup(
            lengths=tuple(args.lengths),
            head_dims=tuple(args.head_dims),
            masks=tuple(args.masks or kernel_masks.MASKS),
            peers=tuple(args.peers) if args.peers else None,
            tokens=args.tokens,
            hidden=args.hidden,
            **_common(args),
        )
        print("\n" + kernels.run(setup))
    print(f"\nwrote {args.out}")


def _bench_sparsity(args: argparse.Namespace) -> None:
    from . import sparsity

    with refusals():
        setup = sparsity.Setup(
            seq_len=args.seq_len,
            head_dim=args.head_dim,
            heads=args.heads,
            batch=args.batch,
            count=args.count,
            peer=args.peer,
            **_common(args),
        )
        print("\n" + sparsity.run(setup))
    print(f"\nwrote {args.out}")


def _bench_convergence(args: argparse.Namespace) -> None:
    _check_plot(args)
    from . import convergence

    _run(convergence, args)


def _bench_train(args: argparse.Namespace) -> None:
    need(("peft",), "trl")
    from . import train, train_cases

    _run(
        train, args, cases=tuple(args.cases or train_cases.CASES), methods=tuple(args.methods or train.METHODS)
    )  # fmt: skip


def _bench_sweep(args: argparse.Namespace) -> None:
    need(("peft",), "trl")
    from . import sweep

    _run(
        sweep, args, tasks=tuple(args.tasks or sweep.TASKS), lengths=tuple(args.lengths or sweep.LENGTHS),
        methods=tuple(args.methods or sweep.METHODS),
    )  # fmt: skip


def _bench_longest(args: argparse.Namespace) -> None:
    need(("peft",), "trl")
    from . import longest

    _run(longest, args, methods=tuple(args.methods or longest.METHODS))


def _bench_trainers(args: argparse.Namespace) -> None:
    need(("trl", "peft", "datasets", "matplotlib"), "trl,bench")
    _check_plot(args)
    from . import trainers

    _run(trainers, args, tasks=tuple(args.tasks or trainers.TASKS))


def _bench_serving(args: argparse.Namespace) -> None:
    from . import serving

    _run(serving, args, methods=tuple(args.methods or serving.METHODS))


def _bench_infer(args: argparse.Namespace) -> None:
    from . import infer

    _run(
        infer, args, cases=tuple(args.cases or infer.CASES), batches=tuple(args.batches), lengths=tuple(args.lengths)
    )  # fmt: skip


def _check_plot(args: argparse.Namespace) -> None:
    if args.plot is not None:
        need(("matplotlib",), "bench")
        picture(args.plot, "--plot")


def _run(benchmark: Any, args: argparse.Namespace, **chosen: Any) -> None:
    """Run a benchmark's module: its ``Setup`` takes what it has fields for from the arguments, but for ``chosen``."""
    given = {field.name: getattr(args, field.name) for field in fields(benchmark.Setup) if hasattr(args, field.name)}
    with refusals():
        print("\n" + benchmark.run(benchmark.Setup(**{**given, **chosen})))
    written = (args.out, getattr(args, "plot", None))
    print("\n" + "\n".join(f"wrote {path}" for path in written if path is not None))


def _bench_plot(args: argparse.Namespace) -> None:
    need(("matplotlib",), "bench")
    from . import plots

    out = args.out or args.csv.with_suffix(".png")
    picture(out)
    with refusals():
        plots.plot(args.csv, out)
    print(f"wrote {out}")


def _bench_table(args: argparse.Namespace) -> None:
    from . import kernels, records, sweep_table

    with refusals():
        rows = records.read(args.csv)
        with records.understood(args.csv):
            if "visible" in rows[0]:  # as ``plot`` knows a sweep
                print(sweep_table.markdown(rows))
            else:
                print(kernels.markdown(rows, args.head_dim, other=args.peer))


def _common(args: argparse.Namespace) -> dict[str, Any]:
    names = ("out", "backend", "device", "time_budget", "commit")
    return {name: getattr(args, name) for name in names} | {"plugins": tuple(args.plugin), "command": args.command}
