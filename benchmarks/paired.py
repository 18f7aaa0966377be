"""What every benchmark shares: a gate, pairs of timings in turn, the machine's ceilings, a row.

Ours and the peer's path run in one process, one after the other, again and again; what counts is
the median of the pairs' ratios, with their range. Nothing is timed before a gate has shown that
both compute the same; the gate's numbers stand in the row.
"""

import ctypes
import math
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class GateError(ValueError):
    """Ours and the peer's path do not do the same: no number is given."""


@dataclass
class Row:
    """A line of the table: one workload, ours against a peer."""

    workload: str
    what: str
    peer: str = ""
    target: float | None = None  # of peer / ours
    unit: str = ""  # what the seconds are of
    gate: list = field(default_factory=list)  # what was checked, in words, with the numbers
    timed: dict = field(default_factory=dict)  # seconds: peer, ours, and their ratios
    memory: tuple = (math.nan, math.nan)  # GiB that a call of ours, of the peer's, adds at most
    share: float | None = None  # of the ceiling
    refused: str = ""

    @property
    def met(self):
        """Whether the target is met; None where there is none, or no number."""
        known = self.target is not None and self.timed
        return bool(np.median(self.timed["ratio"]) >= self.target) if known else None


def check(what, value, limit, least=False):
    """One gate in words, once it is passed; GateError where it is not, or the value is NaN.

    limit: the largest value allowed; with least=True, the smallest.
    """
    sign = ">=" if least else "<="
    if not (value >= limit if least else value <= limit):
        raise GateError(f"{what} is {value:.3g}, it must be {sign} {limit:.3g}")
    return f"{what} {value:.3g} ({sign} {limit:.3g})"


def off(a, b):
    """Relative distance of tensors or arrays."""
    a, b = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, float) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def paired(ours, peer, pairs=7, per=(1, 1)):
    """Run `peer` and `ours` in turn: seconds of each and peer / ours, so too of processor time.

    per: units in a call of ours, of the peer's.
    """
    took = np.array([(*seconds(peer), *seconds(ours)) for _ in range(pairs)])
    took = np.maximum(took, 1e-9) / np.repeat(per[::-1], 2)
    found = {"peer": took[:, 0], "ours": took[:, 2], "ratio": took[:, 0] / took[:, 2]}
    return found | {"processor_ratio": took[:, 1] / took[:, 3]}


def seconds(work):
    """Wall-clock seconds of one call, and those of all processors."""
    _wait()
    start, busy = time.perf_counter(), _processor()
    work()
    _wait()
    return time.perf_counter() - start, _processor() - busy


def _processor():
    times = os.times()  # of processes that ended; for this one another clock is finer
    return time.process_time() + times.children_user + times.children_system


def _wait():
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def count_flops(work):
    """FLOPs of a call, a multiply-add as two; 0 where torch does nothing, or compiled code."""
    from torch.utils.flop_counter import FlopCounterMode

    from prism_nb.counting import ATTENTION

    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def added_memory(device, work):
    """GiB that a call holds at most, beyond what was held before it; NaN where none can tell."""
    import torch

    pages = Path("/proc/self/statm")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free but kept
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak before
    before = int(pages.read_text().split()[1]) * resource.getpagesize() if pages.is_file() else 0
    work()
    peak = peak_memory(resource.RUSAGE_SELF) - before / 2**30
    return max(0.0, peak) if before else math.nan


def ceilings(device="cpu"):
    """GFLOP/s of a float32 and a bfloat16 matrix product and a convolution, GB/s of a copy."""
    import torch

    gpu = str(device).startswith("cuda")
    size, width, found = 8192 if gpu else 1024, 320 if gpu else 128, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        how = {"device": device, "dtype": dtype}
        a, kernel = torch.randn(size, size, **how), torch.randn(width, width, 3, 3, **how)
        x = torch.randn(8, width, 64, 64, **how).to(memory_format=torch.channels_last)
        product, conv = (lambda a=a: a @ a), (lambda x=x, k=kernel: torch.conv2d(x, k, padding=1))
        found[f"matmul {name}, GFLOP/s"] = 2 * size**3 / _best(product) / 1e9
        flops = 2 * x.numel() * kernel[0].numel()
        found[f"convolution {name}, GFLOP/s"] = flops / _best(conv) / 1e9
    block = torch.zeros(2, 2**28 if gpu else 2**24, device=device)
    return found | {"copy, GB/s": 4 * block.numel() / _best(lambda: block[0].copy_(block[1])) / 1e9}


def _best(work):
    return min(seconds(work)[0] for _ in range(8))


def peak_memory(*who):
    """The most memory, in GiB, that this process, or one of its children, held."""
    who = who or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return max(resource.getrusage(each).ru_maxrss for each in who) * unit / 2**30


def machine(*packages):
    """In one line, what this was measured on; `packages` are modules to name with their version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = model[0] if model else platform.processor() or platform.machine()
    found = ", ".join(f"{package.__name__} {package.__version__}" for package in (np, *packages))
    where = f"{platform.system()}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {where}, {found}"


def spread(values, unit=1.0, digits=0):
    """A median and a range in words."""
    low, middle, high = (f"{unit * f(values):.{digits}f}" for f in (min, np.median, max))
    return f"{middle} ({low} to {high}), n = {len(values)}"
