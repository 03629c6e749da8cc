"""Measures everything on a CUDA GPU: kernels first, then whole pipelines of FLUX.1-dev and Wan 2.1 1.3B.

    python benchmarks/gpu_suite.py [--parts kernels flux=300 wan] [--seconds 540] [--out benchmarks/results] [--dry-run]

Parts run in the order given, each for at most the seconds behind ``=``, all together for at most ``--seconds``. Every
measurement is written to ``<out>/<gpu>/<part>.json`` at once, and a further call goes on where the last one stopped:
rows that were measured with the same versions of everything are left out. So the whole can be had in several short
calls, the most telling rows first. What cannot be had here (FP8 without torchao, say) is a skipped row and no failure.
``table.py`` shows the results.

``--dry-run`` walks through everything on a CPU at tiny sizes, PyTorch standing for the kernels, to test this program;
its times mean nothing and its results say so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_kernels
import pipelines
import torch
from pipe_models import MODELS
from pipe_providers import PROVIDERS
from store import ROOT, Store, folder_of, machine

PARTS = ("kernels", *MODELS)


def part(text: str) -> tuple[str, float]:
    """``kernels`` or ``kernels=200``: the part and its seconds."""
    name, _, seconds = text.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return name, float(seconds) if seconds else float("inf")


def _until(end: float) -> Callable[[], float]:
    return lambda: end - time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", type=part, default=[part(name) for name in PARTS], metavar="PART[=S]")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--runs", type=int, default=3, help="measured calls per provider and schedule")
    parser.add_argument("--again", action="store_true", help="measure what has been measured")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    began, cuda = time.perf_counter(), torch.cuda.is_available() and not options.dry_run
    if not cuda and not options.dry_run:
        print("No CUDA device: nothing to measure here. --dry-run exercises this program on a CPU.", file=sys.stderr)
        return 2
    folder = folder_of(options.out, machine(cuda))
    failed = False
    for name, seconds in options.parts:
        left = _until(min(began + options.seconds, time.perf_counter() + seconds))
        keys = gpu_kernels.KEYS if name == "kernels" else pipelines.KEYS
        store = Store(folder / f"{name}.json", keys, cuda, options.again)
        if name == "kernels":
            gpu_kernels.run(store, cuda, left, not options.skip_tests)
            print("\n".join(gpu_kernels.targets(store.rows)))
        else:
            device = torch.device("cuda" if cuda else "cpu")
            pipelines.run(name, store, device, options.runs, left, options.providers)
        failed |= any("error" in row for row in store.rows) or not store.content.get("tests", {}).get("passed", True)
        print(f"{store.path}  ({time.perf_counter() - began:.0f} s)", flush=True)
    if options.dry_run:
        print("dry run: the times above mean nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
