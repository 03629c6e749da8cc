"""Measures every kernel: beside eager PyTorch, ``torch.compile`` and, for the matrix products, bare ``F.linear`` on
patches that somebody else has already made. ``gpu_suite.py`` runs this.

First the correctness tests on the device, then the machine's ceilings (copy bandwidth, bfloat16 matrix product), then
the cases. Two times per provider. *device*: calls inside one CUDA graph, over enough different inputs that none is
still in the L2 cache, so neither launches nor cache hits flatter it. *call*: the same calls one after another from
Python, launches included, as a pipeline without graphs would see them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import Call, Case, cases
from store import ROOT, Store

KEYS = ("kernel", "case", "provider")
REPLAYS, CALLS = 20, 24  # measurements per provider, calls per measurement
TEST_SECONDS = 200


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
    times = {(r["kernel"], r["case"], r["provider"]): r["device"]["median_us"] for r in records if "device" in r}
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


def run(store: Store, cuda: bool, left: Callable[[], float], tests: bool = True) -> None:
    """Measures the cases that the store lacks, as long as time is left.

    Args:
        store: Takes a row per case and provider.
        cuda: False makes it a dry run at tiny sizes, PyTorch standing for the kernels.
        left: Seconds left; no case is begun with less than ten.
        tests: Run the kernels' own tests first, unless they passed with the present versions.
    """
    if tests and cuda and not (store.current(store.content.get("tests")) and store.content["tests"]["passed"]):
        print("correctness on this device ...", flush=True)
        store.note("tests", run_tests())
        print(f"  {store.content['tests']['summary']}")
    ceiling = ceilings(cuda)
    store.note("ceilings", ceiling)
    print({name: f"{value:.3g}" for name, value in ceiling.items()}, flush=True)
    with torch.no_grad():
        for case in cases(cuda):
            if all(store.has(kernel=case.kernel, case=case.name, provider=name) for name in case.providers):
                continue
            if left() < 10:
                print(f"out of time before {case.kernel}: {case.name}")
                return
            for row in measure_case(case, cuda, ceiling):
                store.put(row)
                _tell(row)


def _tell(row: dict[str, Any]) -> None:
    head = f"{row['kernel']:<10}{row['case']:<34}{row['provider']:<22}"
    if "error" in row:
        print(f"{head}{row['error'][:60]}", flush=True)
        return
    band = f"{row['device']['low_us']:.1f}-{row['device']['high_us']:.1f}"
    times = f"device us {row['device']['median_us']:>8.1f}{band:>16}  call us {row['call']['median_us']:>8.1f}"
    print(f"{head}{times}  {row['share_of_ceiling']:.0%} of the ceiling", flush=True)
