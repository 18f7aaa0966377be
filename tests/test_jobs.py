"""Jobs: each call runs once in a process of its own, and a dead one is named with its reason."""

import importlib.util
import operator
import os
import shutil
import signal
import time

import psutil
import pytest

from prism_nb.jobs import _gpus, check_executor, run_jobs

pytest.importorskip("submitit")


def test_jobs_run_in_other_processes_and_leave_no_pickles(tmp_path):
    folders, looked = [tmp_path / str(number) for number in range(2)], []
    calls = [(str(folder),) for folder in folders]
    assert run_jobs(os.mkdir, calls, tmp_path / "jobs", watch=lambda: looked.append(1)) == {}
    assert all(folder.is_dir() for folder in folders)
    assert looked
    assert not (tmp_path / "jobs").exists()


def test_a_job_that_raises_and_one_that_is_killed_are_told_apart(tmp_path, monkeypatch):
    from submitit.core.core import Job

    monkeypatch.setattr(Job, "_results_timeout_s", 0.1)  # that long it waits for a slow disk
    died = run_jobs(operator.truediv, [(1, 2), (1, 0)], tmp_path / "raised")
    assert list(died) == [1]
    assert died[1].startswith("ZeroDivisionError: division by zero (log: ")
    died = run_jobs(os._exit, [(9,)], tmp_path / "killed")
    assert died[0].startswith("killed, or lost with its machine (log: ")
    assert list((tmp_path / "killed").glob("*.err"))


def _fail(number):
    if number:
        raise RuntimeError(f"number {number}\nand a second line" * (number < 2))
    return number


def test_here_means_in_this_process(tmp_path):
    died = run_jobs(_fail, [(0,), (1,), (2,)], tmp_path / "jobs", "here")
    assert died == {1: "number 1", 2: "RuntimeError"}
    assert not (tmp_path / "jobs").exists()


def test_an_interrupt_ends_the_jobs(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(time.sleep, [(60,)], tmp_path, watch=interrupt)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_jobs_and_those_that_they_started(tmp_path, number):
    # A shell's background job has Ctrl-C ignored, and the tests may be one.
    given, children = signal.signal(number, signal.default_int_handler), []
    others = psutil.Process().children(recursive=True)  # of earlier tests: pools, browsers

    def kill():
        now = psutil.Process().children(recursive=True)
        children[:] = [child for child in now if child not in others]
        if len(children) > 1:  # the job's process, and what watches over it
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(time.sleep, [(60,)], tmp_path, watch=kill)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, given)
    assert not [child for child in children if child.is_running()]


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="it must be local or slurm"):
        check_executor("ray")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no srun on this machine: run this on a login node"):
        run_jobs(pow, [(2, 2)], tmp_path, "slurm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'prism_nb\[slurm\]'"):
        check_executor("local")


def test_local_jobs_see_the_gpus_of_this_process(monkeypatch):
    for given, seen in (("2,3", (2, 3)), ("", ()), ("-1", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        assert _gpus() == seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a2b,MIG-3c4d")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is MIG-1a2b: several local"):
        _gpus()


def test_slurm_gets_its_options_and_refuses_unknown_ones(tmp_path, monkeypatch):
    import submitit.slurm.slurm as slurm

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    given = []
    monkeypatch.setattr(
        slurm.SlurmExecutor,
        "_submit_command",
        lambda self, _: given.append(self.parameters) or 1 / 0,
    )
    options = {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 30}
    with pytest.raises(ZeroDivisionError):
        run_jobs(pow, [(2, 2), (2, 3)], tmp_path, "slurm", options)
    assert (given[0]["partition"], given[0]["gpus_per_node"], given[0]["time"]) == ("gpu", 1, 30)
    with pytest.raises(ValueError, match="slurm: Unknown argument 'partitio'"):
        run_jobs(pow, [(2, 2)], tmp_path, "slurm", {"slurm_partitio": "gpu"})
