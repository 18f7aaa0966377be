"""Sweeps: one run of the notebooks a combination of settings, and one table of all their metrics.

A run whose first steps another has already, equal in every parameter, starts from that one's files
as hard links: the writers of this package replace files, they never change them. What then does
not hold is found and run again, as in every run folder. Here a sweep runs one combination after
the other; on a cluster, at once all that wait for no other. Used by `prism-nb sweep`.
"""

import contextlib
import os
import re
import shutil
import sys
import uuid
from itertools import product
from pathlib import Path

from prism_nb.execute import StepFailed, chosen_steps, prepare, run_job
from prism_nb.files import atomic_path, read_json, temporary_path
from prism_nb.jobs import check_executor, run_jobs
from prism_nb.manifest import Manifest, given_parameters
from prism_nb.report import write_report
from prism_nb.run import RunFolderError, without_tables

# Checkpoints, and what is no notebook's: a run makes its own.
PRIVATE = shutil.ignore_patterns(".*", "training", "report", "studio", "counterfactuals")


def sweep(profile, settings, executor="local", options=None, notebooks=None, steps=None):
    """Run every combination of `key=value,value` settings: metrics, their CSV, and what failed.

    Run folders are named by what differs: RUN-guidance_scale=2. What is up to date is left alone.
    A run that fails does not stop the others; failed is one line, or "". ValueError on bad usage.
    """
    if executor != "local":
        check_executor(executor)
    steps, chosen = steps or chosen_steps(), combinations(settings)
    swept = [key for key in chosen[0] if any(each[key] != chosen[0][key] for each in chosen)]
    run = prepare(profile).values["run_dir"]
    plans = [_plan(each, swept, run) for each in chosen]
    jobs = [prepare(profile, settings=plan, notebooks=notebooks) for plan in plans]
    if not swept or len({job.folder for job in jobs}) < len(jobs):
        raise RunFolderError("nothing to sweep: give --set key=value,value with different values")
    parents, waiting, died = _parents(jobs, steps), list(range(len(jobs))), {}
    home, where = jobs[0].folder.parent, "here" if executor == "local" else executor
    logs = home / f".sweep-{uuid.uuid4().hex[:8]}"  # another sweep may be at work here
    while waiting:
        part = [n for n in waiting if parents[n] == n or parents[n] not in waiting]
        calls = [(profile, plans[n], notebooks, steps, jobs[parents[n]].folder) for n in part]
        failed = run_jobs(run_one, calls, logs, where, options)
        died |= {jobs[part[number]].folder.name: why for number, why in failed.items()}
        waiting = [n for n in waiting if n not in part]
    path = home / f"{Path(run).name}-{'-'.join(swept)}.csv"
    failed = "; ".join(f"{name}: {why}" for name, why in died.items())
    return (
        collect(jobs, steps, chosen[0], path),
        path,
        failed and f"{failed}; the same command goes on",
    )


def combinations(settings):
    """Every combination of `key=value,value` settings, as dicts of texts; lists stand in [ ]."""
    values = {}
    for text in settings:
        key, _, given = text.partition("=")
        values.setdefault(key, []).extend(re.findall(r"\[[^]]*\]|[^,]+", given))
        if not values[key]:
            raise RunFolderError(f"--set {text} has no value; write --set key=value,value")
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


def run_one(profile, settings, notebooks, steps, parent):
    """Run one combination, from the files of another run where there is none of it yet."""
    job = prepare(profile, settings=settings, notebooks=notebooks)
    try:
        _run(job, steps, parent)
    except (RunFolderError, OSError) as error:  # of this run alone: the others go on
        raise StepFailed(str(error)) from None


def _run(job, steps, parent):
    if not job.folder.exists() and (parent / "manifest.json").is_file():
        _start_from(parent, job.folder)
    print(job.folder, flush=True)
    try:
        run_job(job, steps, stream=sys.stdout)
    finally:
        with contextlib.suppress(Exception):  # a failure is the news, not its report
            write_report(job.folder, job.notebooks)


def collect(jobs, steps, keys, path):
    """Write the metrics of all runs as CSV, one row a run, and return the table."""
    import pandas

    metrics = [_standing(job, steps) for job in jobs]
    about = [{"run": job.folder.name} | {k: job.values[k] for k in keys} for job in jobs]
    table = pandas.concat([pandas.DataFrame(about), pandas.json_normalize(metrics)], axis=1)
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False, float_format="%.8g", lineterminator="\n")
    return table


def _standing(job, steps):
    """A run's metrics, whole tables aside, without those of steps that failed or are not its own.

    Where a step failed, those after it are still of the run that this one started from.
    """
    path = job.folder / "metrics.json"
    try:
        manifest = Manifest(job.folder, job.profile)
        metrics = read_json(path) if path.is_file() else {}
    except ValueError:  # another's folder, or damaged: the run has said so
        return {}
    now = {s: manifest.fingerprint(s, job.source(s), job.values) for s in steps if s in metrics}
    mine = [step for step, made in now.items() if not manifest.reason(step, made)]
    return {step: without_tables(metrics[step]) for step in mine}


def _plan(each, swept, run):
    """One combination as settings of `prepare`, the run's own folder first."""
    named = [f"{key}={re.sub(r'[^A-Za-z0-9.]+', '_', each[key])}" for key in swept]
    return (f"run_dir={'-'.join([run, *named])}", *(f"{k}={v}" for k, v in each.items()))


def _parents(jobs, steps):
    """For each run the number of the earlier one with most of its first steps, else its own."""
    made = [[given_parameters(step, job.values) for step in steps] for job in jobs]
    parents, ends = [], range(1, len(steps) + 1)
    for number, own in enumerate(made):
        shared = [sum(own[:end] == other[:end] for end in ends) for other in made[:number]]
        parents.append(shared.index(max(shared)) if any(shared) else number)
    return parents


def _start_from(parent, folder):
    """Take over another run's files; where another command was quicker, its folder stands."""
    partial = temporary_path(folder)
    try:
        shutil.copytree(parent, partial, copy_function=_link, ignore=PRIVATE)
        os.rename(partial, folder)  # not onto a folder that holds anything
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
