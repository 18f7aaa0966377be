"""How fast the phantom renders, against its targets: `python -m benchmarks.phantom [--quick]`.

A film and a counterfactual are timed in processor time on one thread, which is wall-clock time on
a machine that does nothing else. The cohort is written by two processes into a temporary folder, in
wall-clock time; with --quick two small ones are, and the line through them is extrapolated. Exit
code 1 if a target is missed.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy is imported

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.paired import machine, peak_memory, spread
from prism_nb.phantom import counterfactual, render, sample_patient, write_cohort

SIZE, COHORT_SIZE, COHORT_FILMS = 512, 256, 2000
EDITS = (  # each draws a layer that was not drawn before, or takes one away
    *({"effusion_ml": 1500}, {"Pleural Effusion": 0}, {"heart_ratio": 0.65}),
    *({"mediastinum_cm": 2.5}, {"edema": 0.8}, {"consolidation": 0.7}, {"atelectasis": 0.8}),
    *({"pneumothorax_cm": 3}, {"lesion_cm": 3}, {"Support Devices": 1}, {"Support Devices": 0}),
)


def timed(work):
    """Milliseconds of the processor that one call takes."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def edits(count, change):
    """Milliseconds of a counterfactual, each new, of patients whose film is there already."""
    patients, took = [sample_patient(1, number) for number in range(1, count + 1)], []
    for patient in patients:
        render(patient, SIZE)
        took += [timed(lambda p=patient, d=do: change(p, d)) for do in EDITS]
    return took


def cohort(count):
    """Seconds that two processes take to write a cohort, their start included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_cohort(Path(folder) / "cohort", count, COHORT_SIZE, workers=2)
        return time.perf_counter() - start


def extrapolated(small=20, large=160):
    """Seconds for COHORT_FILMS from two smaller cohorts: the start of the processes counts once."""
    one, other = cohort(small), cohort(large)
    return one + (other - one) * (COHORT_FILMS - small) / (large - small)


def main():
    """Measure, print the table, and return whether every target is met, as an exit code."""
    parser = argparse.ArgumentParser(description="Time the phantom against its targets.")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    render(sample_patient(0, 10**6), SIZE)  # warm: imports, fonts, grids
    new = range(1, 13 if quick else 61)
    one = [timed(lambda n=n: render(sample_patient(0, n), SIZE)) for n in new]
    further = edits(3 if quick else 12, lambda p, do: render(p, SIZE, do))
    masked = edits(1 if quick else 6, lambda p, do: counterfactual(p, do, SIZE))
    seconds, memory = extrapolated() if quick else cohort(COHORT_FILMS), peak_memory()
    how = f"{seconds:.0f}" + (", extrapolated from 20 and 160 films" if quick else "")
    rows = [
        ("a film at 512 px, ms", spread(one), 80, np.median(one)),
        ("a further counterfactual, ms", spread(further), 20, np.median(further)),
        ("the same with its change mask, ms", spread(masked), np.inf, 0),
        ("2,000 films at 256 px, 2 processes, s", how, 90, seconds),
        ("peak memory of a process, GiB", f"{memory:.2f}", 1, memory),
    ]
    print(machine())
    print(f"{'':<40}{'median (range)':<44}{'target':<9}met")
    for name, found, target, value in rows:
        goal, met = f"<= {target}", "yes" if value <= target else "NO"
        print(f"{name:<40}{found:<44}" + (f"{goal:<9}{met}" if target < np.inf else ""))
    return int(any(value > target for _, _, target, value in rows))


if __name__ == "__main__":
    sys.exit(main())
