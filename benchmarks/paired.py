"""What every benchmark shares: pairs of timings in turn, the machine's ceilings, a printed row.

Ours and the peer's path run in one process, one after the other, again and again; what counts is
the median of the pairs' ratios, with their range. Nothing is timed before both have been shown to
compute the same.
"""

import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np


def paired(ours, peer, pairs=7, warmup=2):
    """Run `peer` and `ours` in turn: seconds of each, and peer / ours, `pairs` of them."""
    for _ in range(warmup):
        peer()
        ours()
    took = np.array([(seconds(peer), seconds(ours)) for _ in range(pairs)])
    return {"peer": took[:, 0], "ours": took[:, 1], "ratio": took[:, 0] / took[:, 1]}


def seconds(work):
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ceilings(size=1024):
    """GFLOP/s of a float32 and a bfloat16 matrix product, and GB/s of a copy, as of now."""
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size).to(dtype)
        best = min(seconds(lambda a=a: a @ a) for _ in range(8))
        found[f"matmul {name}, GFLOP/s"] = 2 * size**3 / best / 1e9
    block = torch.empty(2**26)
    best = min(seconds(block.clone) for _ in range(4))
    return found | {"copy, GB/s": 2 * block.numel() * 4 / best / 1e9}


def peak_memory():
    """The most memory, in GiB, that this process or one of its children held."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return max(resource.getrusage(each).ru_maxrss for each in who) * unit / 2**30


def machine(*packages):
    """In one line, what this was measured on; `packages` are modules to name with their version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = model[0] if model else platform.processor() or platform.machine()
    found = ", ".join(f"{package.__name__} {package.__version__}" for package in (np, *packages))
    return (
        f"{name}, {os.cpu_count()} cores, {platform.system()}, {platform.python_version()}, {found}"
    )


def spread(values, unit=1.0, digits=0):
    """A median and a range in words."""
    low, middle, high = (f"{unit * f(values):.{digits}f}" for f in (min, np.median, max))
    return f"{middle} ({low} to {high}), n = {len(values)}"
