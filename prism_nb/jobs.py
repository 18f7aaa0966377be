"""Work in several processes, on this machine or on a SLURM cluster: both through submitit.

A job is a call of a function in a process of its own. What it makes it writes to files, so that a
dead job costs no more than what it had not yet written; run_jobs says which died, and why. The
logs, and the pickles in which submitit hands calls over, are removed once all jobs ended well.
Used by `prism-nb edit-cohort` and `prism-nb sweep`, by no notebook.
"""

import importlib.util
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress

import psutil

from prism_nb.files import one_line

EXECUTORS = ("local", "slurm")
DAY, YEAR = 60 * 24, 60 * 24 * 365  # minutes


class JobsDied(RuntimeError):
    """Some of the jobs did not end well; the message says which, why, and what to do."""


def check_executor(name):
    """Refuse an executor that does not exist, or is not on this machine: ValueError, one line."""
    if name not in EXECUTORS:
        raise ValueError(f"executor is {name!r}; it must be {' or '.join(EXECUTORS)}")
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("several processes need submitit: pip install 'prism_nb[slurm]'")
    if name == "slurm" and shutil.which("srun") is None:
        raise ValueError(
            "executor is slurm, but there is no srun on this machine: run this on a login node of "
            "a SLURM cluster, or take executor local"
        )


def run_jobs(call, arguments, folder, executor="local", options=None, watch=None):
    """Call `call` with each tuple of `arguments`, a process each, and wait: {number: why it died}.

    call: a function of a module. folder: of the logs; with slurm, on a disk that all nodes share.
    executor: one of EXECUTORS, or "here": no process of its own, and what is no RuntimeError rises.
    options: submitit's own, for slurm (slurm_partition, gpus_per_node, timeout_min); local jobs see
    the GPUs that this process sees. watch() is called each second. SIGTERM and Ctrl-C end the jobs,
    then raise KeyboardInterrupt.
    """
    if executor == "here":
        return _run_here(call, arguments)
    check_executor(executor)
    runner = _runner(folder, executor, options or {})
    with _signals() as received:
        jobs = runner.map_array(call, *zip(*arguments, strict=True))
        try:
            while not received and not all(job.done() for job in jobs):
                if watch:
                    watch()
                time.sleep(1)
            if received:  # Ctrl-C in a terminal reaches the jobs as well: they look done
                raise KeyboardInterrupt
        except BaseException:
            _stop(jobs, executor)
            raise
    errors = {number: job.exception() for number, job in enumerate(jobs)}
    died = {number: _why(error, jobs[number]) for number, error in errors.items() if error}
    if not died:
        shutil.rmtree(folder)
    return died


@contextmanager
def _signals():
    """A list that SIGTERM and Ctrl-C are put into while the block runs, instead of ending it."""
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():  # elsewhere none arrives
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup, or a script's background
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(jobs, executor):
    """Cancel the jobs; of those on this machine no process is left when this returns."""
    family = []
    for job in [job for job in jobs if not job.done()]:
        if executor == "local":  # an interrupt would do, where the shell has not had it ignored
            with suppress(psutil.NoSuchProcess):
                controller = psutil.Process(int(job.job_id))
                controller.suspend()  # so that it starts nothing meanwhile
                family += [controller, *controller.children(recursive=True)]
        else:
            job.cancel(check=False)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family)


def _run_here(call, arguments):
    died = {}
    for number, each in enumerate(arguments):
        try:
            call(*each)
        except RuntimeError as error:
            died[number] = (str(error).splitlines() or [type(error).__name__])[0]
    return died


def _runner(folder, executor, options):
    import submitit

    if executor == "local":
        runner = submitit.LocalExecutor(folder)
        gpus = _gpus()  # without them submitit hides every GPU
        runner.update_parameters(timeout_min=YEAR, gpus_per_node=len(gpus), visible_gpus=gpus)
        return runner
    runner = submitit.AutoExecutor(folder, cluster=executor)
    try:
        runner.update_parameters(**{"name": "prism-nb", "timeout_min": DAY} | options)
    except (NameError, ValueError, AssertionError) as error:  # one for each kind of mistake
        raise ValueError(f"slurm: {one_line(error)}") from None
    return runner


def _gpus():
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if given.replace(",", "").isdigit():
        return tuple(int(number) for number in given.split(","))
    if given[:4] in ("GPU-", "MIG-"):  # submitit takes numbers alone
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {given.split(',')[0]}: several local processes need numbers; "
            "set it to such as 0,1, or take one shard"
        )
    return tuple(range(torch.cuda.device_count()))


def _why(error, job):
    from submitit.core.utils import FailedJobError

    why = "killed, or lost with its machine"
    if isinstance(error, FailedJobError):  # its text: heading, trace, where the logs are
        why = str(error).split("-" * 22)[1].strip().splitlines()[-1]
    return f"{why} (log: {job.paths.stderr})"
