"""Measures every kernel on a CUDA GPU in one go, in at most eight minutes.

    python benchmarks/gpu_suite.py [--seconds 480] [--out benchmarks/results] [--dry-run]

First the correctness tests on the device, then the machine's ceilings (copy bandwidth, bfloat16 matrix product), then
every kernel beside eager PyTorch, ``torch.compile`` and, for the matrix products, bare ``F.linear`` on patches that
somebody else has already made. Writes JSON with GPU name and versions, prints a short table last.

Two times per provider. *device*: calls inside one CUDA graph, over enough different inputs that none is still in the L2
cache, so neither launches nor cache hits flatter it. *call*: the same calls one after another from Python, launches
included, as a pipeline without graphs would see them.

``--dry-run`` walks through everything on a CPU at tiny sizes, PyTorch standing for the kernels, to test this file; its
times mean nothing and its result says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Call, Case, cases

ROOT = Path(__file__).resolve().parents[1]
REPLAYS, CALLS = 20, 24  # measurements per provider, calls per measurement
TEST_SECONDS = 200


# --- measuring --------------------------------------------------------------------------------------------------------


def spread_of(samples: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_us": statistics.median(ordered),
        "low_us": ordered[round(0.1 * last)],
        "high_us": ordered[round(0.9 * last)],
    }


def cuda_times(work: Call, calls: int) -> list[float]:
    """Microseconds per call of ``work``, which makes ``calls`` of them, between two events."""
    samples = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / calls)
    return samples


def measure_cuda(calls: list[Call]) -> dict[str, dict[str, float]]:
    """*device* and *call* times over ``calls``, which differ in their inputs only."""
    rounds = max(1, CALLS // len(calls))

    def work() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # compiles, tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    graph.replay()
    torch.cuda.synchronize()
    count = rounds * len(calls)
    return {"device": spread_of(cuda_times(graph.replay, count)), "call": spread_of(cuda_times(work, count))}


def measure_cpu(calls: list[Call]) -> dict[str, dict[str, float]]:
    """For the dry run: wall time of one call after another."""
    samples = []
    for call in calls * 2:
        begin = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begin) * 1e6)
    return {"device": spread_of(samples), "call": spread_of(samples)}


def input_sets(case: Case, cuda: bool) -> list[dict[str, Any]]:
    """Enough different inputs to push each other out of the L2 cache (twice its size), 32 at most."""
    if not cuda:
        return [case.inputs()]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [case.inputs() for _ in range(min(32, max(1, -(-2 * cache // max(case.bytes, 1)))))]


def ceilings(cuda: bool) -> dict[str, float]:
    """Measured bandwidth of a copy (bytes/s, read and written) and rate of a bfloat16 product (FLOP/s)."""
    device, size, side = ("cuda", 1 << 29, 8192) if cuda else ("cpu", 1 << 20, 128)
    measure = measure_cuda if cuda else measure_cpu
    a, b = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    copy = measure([lambda: b.copy_(a)])["device"]["median_us"]
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product = measure([lambda: x @ x])["device"]["median_us"]
    return {"copy_bytes_per_s": 2 * size / copy * 1e6, "matmul_flop_per_s": 2 * side**3 / product * 1e6}


def run_tests() -> dict[str, Any]:
    """The kernels' own tests, on this device."""
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "kernels"), "-p", "no:cacheprovider"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
        lines = done.stdout.strip().splitlines()
        result: dict[str, Any] = {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:]}
        if done.returncode:
            print(done.stdout[-6000:])
    except subprocess.TimeoutExpired:
        result = {"passed": False, "summary": f"not finished in {TEST_SECONDS} s"}
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}


def machine(cuda: bool) -> dict[str, Any]:
    """What the numbers belong to."""
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    described: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(0) if cuda else "none (dry run on a CPU)",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        described["multiprocessors"] = properties.multi_processor_count
        described["capability"] = f"{properties.major}.{properties.minor}"
    return described


def measure_case(case: Case, cuda: bool, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """One record per provider, with its share of what the machine's ceilings allow."""
    sets = input_sets(case, cuda)
    floor = max(case.bytes / ceiling["copy_bytes_per_s"], case.flop / ceiling["matmul_flop_per_s"]) * 1e6
    records = []
    for provider, prepare in case.providers.items():
        record: dict[str, Any] = {"kernel": case.kernel, "case": case.name, "provider": provider}
        record.update(bytes=case.bytes, flop=case.flop, floor_us=floor)
        try:
            record.update((measure_cuda if cuda else measure_cpu)([prepare(x) for x in sets]))
            record["input_sets"] = len(sets)
            record["share_of_ceiling"] = floor / record["device"]["median_us"]
        except Exception as error:  # one provider that fails must not cost the others' numbers
            record["error"] = f"{type(error).__name__}: {error}"[:500]
        records.append(record)
    torch.compiler.reset()  # every case compiles the same functions anew; dynamo would give up after a few
    return records


def targets(records: list[dict[str, Any]]) -> list[str]:
    """The project's own goals, each with what was measured."""
    times = {
        (r["kernel"], r["case"], r["provider"]): r["device"]["median_us"] for r in records if "device" in r
    }  # fmt: skip
    calls = {(r["kernel"], r["case"], r["provider"]): r["call"]["median_us"] for r in records if "call" in r}
    lines = []

    def check(text: str, value: float | None, limit: float, at_most: bool = True) -> None:
        if value is None:
            lines.append(f"not measured  {text}")
        else:
            met = value <= limit if at_most else value >= limit
            lines.append(f"{'met   ' if met else 'MISSED'}  {text}: {value:.2f}")

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    flux, wan = ("decision", "FLUX 1024, sizes 4,8"), ("decision", "Wan 480p x 81, sizes 4,8")
    check("decision, FLUX 1024, at most 15 us", times.get((*flux, "kernel")), 15)
    check(
        "decision, FLUX 1024, eager calls over the kernel's, at least 20 times",
        ratio(calls.get((*flux, "eager")), calls.get((*flux, "kernel"))), 20, False,
    )  # fmt: skip
    check(
        "decision, FLUX 1024, compiled calls over the kernel's, at least 5 times",
        ratio(calls.get((*flux, "compile")), calls.get((*flux, "kernel"))), 5, False,
    )  # fmt: skip
    check("decision, Wan 480p x 81, at most 30 us", times.get((*wan, "kernel")), 30)
    for case in (flux, wan):
        with_values = ratio(times.get((*case, "kernel + quantiles")), times.get((*case, "kernel")))
        check(f"with quantile values, {case[1]}, at most 3 times the decision", with_values, 3)
    for kernel, case, provider in sorted(times):
        if kernel in ("embed", "deembed") and provider == "kernel" and ", k=1," in case:
            over = ratio(times[kernel, case, provider], times.get((kernel, case, "F.linear only")))
            check(f"{kernel}, {case}, over bare F.linear, at most 1", over, 1)
    return lines


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="stop starting new cases after this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to test this file")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    begin, cuda = time.perf_counter(), torch.cuda.is_available() and not options.dry_run
    if not cuda and not options.dry_run:
        print("No CUDA device: nothing to measure here. `--dry-run` exercises this script on a CPU.", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"dry_run": options.dry_run, "machine": machine(cuda)}
    if not options.skip_tests and not options.dry_run:
        print("correctness on this device ...", flush=True)
        report["tests"] = run_tests()
        print(f"  {report['tests']['summary']}")
    report["ceilings"] = ceilings(cuda)
    print({name: f"{value:.3g}" for name, value in report["ceilings"].items()}, flush=True)

    records: list[dict[str, Any]] = []
    report.update(results=records, not_reached=[])
    with torch.no_grad():
        for case in cases(cuda):
            if time.perf_counter() - begin > options.seconds - 10:
                report["not_reached"].append(f"{case.kernel}: {case.name}")
                continue
            records.extend(measure_case(case, cuda, report["ceilings"]))
    report["seconds"] = round(time.perf_counter() - begin, 1)

    slug = "dry-run" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
    path = options.out / slug / f"kernels-{report['machine']['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")

    print(f"\n{'kernel':<10}{'case':<34}{'provider':<22}{'device us':>10}{'10-90 %':>16}{'call us':>10}{'ceiling':>9}")
    for r in records:
        head = f"{r['kernel']:<10}{r['case']:<34}{r['provider']:<22}"
        if "error" in r:
            print(f"{head}{r['error'][:60]}")
            continue
        band = f"{r['device']['low_us']:.1f}-{r['device']['high_us']:.1f}"
        share = f"{r['share_of_ceiling']:.0%}"
        print(f"{head}{r['device']['median_us']:>10.1f}{band:>16}{r['call']['median_us']:>10.1f}{share:>9}")
    if options.dry_run:
        print("\ndry run: PyTorch stood for the kernels, and the times above mean nothing")
    else:
        print("\n" + "\n".join(targets(records)))
    for name in report["not_reached"]:
        print(f"out of time before {name}")
    print(f"{path}  ({report['seconds']} s)")
    failed = any("error" in r for r in records) or not report.get("tests", {}).get("passed", True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
