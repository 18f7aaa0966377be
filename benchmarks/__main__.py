"""The whole suite as one table: python -m benchmarks [--device cuda] [--only W4,W6] [--quick].

A row is refused where ours and the peer's path do not compute the same: the exit code is then 1.
A missed target is said, with its reason. --json writes all timings, commit, versions and machine.
"""

import os

# Waiting threads that spin would slow the other path down; bars would break the table.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ["TQDM_DISABLE"] = "1"

import argparse
import gc
import logging
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks import data, editing, evidence, road, training
from benchmarks.case import SCALES, Case
from benchmarks.paired import GateError, Row, machine
from prism_nb.files import plain, write_json
from prism_nb.run import versions

WORKLOADS = {  # in the paper's order; of each, its rows one by one
    **{"W1": data.decode, "W2": data.feed, "W3": data.cache},
    **{"W4": training.step, "W5": training.checkpointing},
    **{"W6": editing.climbing, "W7": editing.one_edit, "W7b": editing.null_text},
    **{"W8": editing.sweep, "W9": evidence.scores, "W10": evidence.classifier},
    **{"W11": evidence.gan, "W12": road.road},
}
QUICK = ("W0", "W1", "W2", "W3", "W4", "W6", "W9", "W10")
HEAD = "id | what | peer | target | peer / ours | processor time | gate | ours | of ceiling | GiB"
WHY = {  # where a target is missed on a CPU: from profiles on one Xeon core with AMX
    "W1": "of 1.16 ms for a small film, enlarging it takes .66 and decoding .31",
    "W2": "32 files take 8 ms, a gather of 2 MiB .1, twice that where other work came between",
    "W3": "batches outgrow this processor's cache: here four films in the channels-last layout do "
    "not, and take 26 ms each where one alone takes 42 in the layout of diffusers",
    "W4": "another process on one of the cores: oneDNN's bf16 convolution backward on two threads "
    "then waits, 725 of 980 ms a step of 4, which takes 220 ms on one thread",
    "W8b": "the five walks repeat steps that are alike up to the smallest share: walked once, "
    "140 steps would do for 250",
    "W10": "without bf16 both compute in fp32: efficientnet_b0 takes 47 ms a film in the "
    "channels-last layout, 71 in the default one",
}


def rows_of(case, names):
    """Rows of some workloads, as they are done; a gate that does not hold is a row as well."""
    for name in names:
        try:
            yield from WORKLOADS[name](case) if name in WORKLOADS else ()
        except GateError as error:
            what = WORKLOADS[name].__doc__.partition(": ")[2].splitlines()[0]
            yield Row(name, what, refused=str(error))
        gc.collect()


def cells(row):
    """One line of the table, as a list."""
    if row.refused:
        return [row.workload, row.what, "", "", "REFUSED", "", row.refused, "", "", ""]
    ratio, took = row.timed["ratio"], np.median(row.timed["ours"]) * 1000
    low, middle, high = (f"{f(ratio):.3g}" for f in (min, np.median, max))
    target = "" if row.target is None else f"{row.target:g}: {'met' if row.met else 'MISSED'}"
    spent, memory = np.median(row.timed["processor_ratio"]), "{:.2f}, peer {:.2f}"
    memory = "" if np.isnan(row.memory[0]) else memory.format(*row.memory)
    found = [target, f"{middle} ({low} to {high}), n = {len(ratio)}", f"{spent:.3g}"]
    found += ["; ".join(row.gate), f"{took:.3g} ms {row.unit}"]
    found += [f"{row.share:.0%}" if row.share else "", memory]
    return [row.workload, row.what, row.peer, *found]


def about(case):
    """What was measured, on what, and when; commit ends with + where files were changed since."""
    asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    done = [subprocess.run(["git", *each], capture_output=True, text=True) for each in asked]
    commit, changed = (each.stdout.strip() for each in done)
    name = f"{torch.cuda.get_device_name()}; " if case.gpu else ""
    found = {"commit": (commit or "unknown") + "+" * bool(changed), "date": str(date.today())}
    found |= {"machine": name + machine(torch), "threads": torch.get_num_threads()}
    return found | {"device": case.device.type, "versions": versions(), "ceilings": case.ceilings}


def report(case, names, path=None):
    """Print ceilings and table, write JSON where asked; 1 where a row is refused."""
    found, rows = about(case), []
    print("{machine}; {threads} threads; commit {commit}, {date}".format_map(found))
    print("W0:", ", ".join(f"{name} {value:.0f}" for name, value in found["ceilings"].items()))
    print(f"\n| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
    for row in rows_of(case, names):
        rows.append(row)
        print(f"| {' | '.join(cells(row))} |", flush=True)
    kept = [asdict(row) | {"met": row.met} for row in rows]
    for row in kept:
        row["why"] = WHY.get(row["workload"], "") if row["met"] is False and not case.gpu else ""
    for line in dict.fromkeys(f"{row['workload']}: {row['why']}" for row in kept if row["why"]):
        print(line)
    if path:
        write_json(path, plain(found | {"rows": kept}))
    return int(any(row.refused for row in rows))


def chosen(text, quick):
    """Names of the workloads to run; ValueError, in one line, for one that does not exist."""
    known = ["W0", *WORKLOADS]
    names = [each.strip() for each in text.split(",")] if text else QUICK if quick else known
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"no workload {wrong[0]!r}; there are {', '.join(known)}")
    return list(names)


def main(argv=None):
    """Measure and print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", metavar="W4,W6", help="some workloads")
    parser.add_argument("--quick", action="store_true", help="a part, smaller: under a minute")
    parser.add_argument("--pairs", type=int, default=0, help="of timings a row, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    args = parser.parse_args(argv)
    try:
        names, scale = chosen(args.only, args.quick), "quick" if args.quick else args.device
        with tempfile.TemporaryDirectory() as name:
            case = Case(Path(name), args.device, SCALES[scale], pairs=args.pairs)
            return report(case, names, args.json)
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    sys.exit(main())
