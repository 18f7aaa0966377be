"""Execute the notebooks of the road into a run folder, as far as they have changed.

papermill runs each notebook; its exit and its metadata are not believed (a killed kernel and a
sys.exit(0) both leave a notebook that looks complete). A step has succeeded when the notebook's
own `finish` has written the step record with the token of this very execution.
Used by `prism-nb run`; the kernel's current folder is the notebooks' folder, as in JupyterLab.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from prism_nb.files import locked, read_json
from prism_nb.manifest import Manifest, leftovers, read_manifest
from prism_nb.params import (
    PATH_KEYS,
    check_key,
    check_profile,
    expanded,
    for_notebook,
    load_profile,
    notebook_name,
)
from prism_nb.run import (
    APPENDICES,
    PROFILE_VARIABLE,
    ROOT_VARIABLE,
    STEPS,
    TOKEN_VARIABLE,
    RunFolderError,
    is_word,
    project_root,
    record_path,
)

# Waiting threads that spin slow everything down as soon as another program wants a core.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
TICK_SECONDS = 15  # at most one line so often where the line cannot be rewritten


class StepFailed(RuntimeError):
    """A notebook did not reach its end; the message is one line."""


@dataclass(frozen=True)
class Job:
    """A profile made ready: its name, its checked values, its run folder and the notebooks."""

    profile: str
    values: dict
    folder: Path
    notebooks: Path

    def source(self, notebook: str) -> Path:
        """Path of a notebook; RunFolderError if it is not there."""
        path = self.notebooks / f"{notebook}.ipynb"
        if not path.is_file():
            raise RunFolderError(f"{path} is missing; run this from a clone of the project")
        return path


def prepare(
    profile: Path,
    name: str = "",
    settings: tuple[str, ...] = (),
    notebooks: Path | None = None,
) -> Job:
    """Read a profile, apply `key=value` settings and find its run folder."""
    values = load_profile(profile)
    for setting in settings:
        key, value = _setting(setting)
        values[key] = value
    values = check_profile(values, where=str(profile))
    if name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise RunFolderError(f"--name {name} is no plain folder name; use letters, digits, . _ -")
    stem = Path(profile).stem
    values["run_dir"] = f"runs/{name}" if name else values.get("run_dir", f"runs/{stem}")
    root = project_root()
    folder = (root / Path(values["run_dir"]).expanduser()).resolve()
    return Job(stem, values, folder, (notebooks or root / "notebooks").resolve())


def chosen_steps(only: str = "", start: str = "", appendices: bool = False) -> list[str]:
    """Names of the notebooks to run: one, all from one on, or all; appendices where wanted."""
    appendices = appendices or notebook_name(start or "01") in APPENDICES
    steps = [name for name in STEPS if appendices or name not in APPENDICES]
    if only and start:
        raise RunFolderError("--only and --from exclude each other; give one of them")
    if only:
        return [notebook_name(only)]
    return steps[steps.index(notebook_name(start)) :] if start else steps


def run_job(job: Job, steps: list[str], force: bool = False, stream: TextIO = sys.stdout) -> bool:
    """Run the steps that have changed, in order; True if any ran, StepFailed if one failed."""
    for notebook in steps:
        job.source(notebook)
    if job.folder.exists() and not job.folder.is_dir():
        raise RunFolderError(f"{job.folder} is a file; choose another run folder")
    Manifest(job.folder, job.profile)  # refuses a folder that is another's before anything is made
    job.folder.mkdir(parents=True, exist_ok=True)
    with locked(job.folder / ".lock") as free:
        if not free:
            raise RunFolderError(f"{job.folder} is in use by another run; wait for its end")
        manifest = Manifest(job.folder, job.profile)
        manifest.parameters = job.values
        leftovers(job.folder)
        progress = Progress(stream)
        ran = [_run_if_changed(job, notebook, manifest, force, progress) for notebook in steps]
        if not any(ran):
            manifest.write()  # times of change that were looked up need no second look
        return any(ran)


def states(folder: Path, notebooks: Path | None = None) -> list[dict]:
    """Of each notebook of a run: is it done, to be done again, failed or not yet run, and why."""
    name = read_manifest(folder).get("profile", "")
    manifest = Manifest(folder, name)
    where = (notebooks or project_root() / "notebooks").resolve()
    job = Job(name, manifest.parameters, folder, where)
    rows = []
    for notebook in STEPS:
        entry = manifest.steps.get(notebook, {})
        if notebook in APPENDICES and not entry:
            continue
        there = (where / f"{notebook}.ipynb").is_file()
        if there:
            now = manifest.fingerprint(notebook, job.source(notebook), job.values)
            why = manifest.reason(notebook, now)
        else:
            why = f"no such notebook in {where}"
        state = "to do" if not entry else "unfinished" if "outputs" not in entry else "again"
        state = state if there or state != "again" else "unknown"
        since = f"{entry.get('seconds', 0):.0f} s, finished {entry.get('finished', '')}"
        done = {"state": "done", "detail": since}
        rows.append({"notebook": notebook} | ({"state": state, "detail": why} if why else done))
    return rows


def _run_if_changed(
    job: Job, notebook: str, manifest: Manifest, force: bool, progress: "Progress"
) -> bool:
    now = manifest.fingerprint(notebook, job.source(notebook), job.values)
    why = manifest.reason(notebook, now)
    if not why and not force:
        progress.line(notebook, "unchanged")
        return False
    manifest.begin(notebook, now, afresh=force)
    progress.start(notebook, why or "forced")
    try:
        _execute(job, notebook, progress.cell)
    except BaseException as error:
        record_path(job.folder, notebook).unlink(missing_ok=True)
        progress.stop("FAILED" if isinstance(error, StepFailed) else "stopped")
        raise
    manifest.complete(notebook, read_json(record_path(job.folder, notebook)), progress.seconds())
    progress.stop("done")
    return True


def _execute(job: Job, notebook: str, on_cell: Callable[[int, int], None]) -> None:
    """Run one notebook with papermill; StepFailed unless this execution wrote its step record."""
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    kept = job.folder / "notebooks" / f"{notebook}.ipynb"
    kept.parent.mkdir(exist_ok=True)
    partial = kept.with_name(f".running-{kept.name}")
    at = [0, 0]

    def cell(number: int, total: int) -> None:
        at[:] = number, total
        on_cell(number, total)

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it logs, it raises as well
    token = uuid.uuid4().hex
    try:
        with _environment(token, job.profile):
            result = execute_notebook(
                _literal(job.source(notebook)),
                _literal(partial),
                parameters=_portable(for_notebook(job.values, notebook), job.folder),
                engine_name=_engine(),
                kernel_name="python3",
                progress_bar=False,
                cwd=str(job.notebooks),
                on_cell=cell,
                # What goes wrong stands in the notebook; the terminal is for our lines.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
        error = _exit_in(result) or _missing_record(job.folder, notebook, token)
    except PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    except DeadKernelError:
        error = "the kernel died (killed, out of memory, or a crash in native code)"
    except (RuntimeError, ValueError, LookupError, FileNotFoundError) as failure:
        if at[1]:  # a cell has started: then it is not the kernel's
            raise
        why = _short(str(failure))
        raise StepFailed(
            f"{notebook} did not start ({why}); `prism-nb doctor` checks the kernel"
        ) from None
    finally:
        if partial.exists():
            os.replace(partial, kept)
    if error:
        where = f"{notebook} failed in cell {at[0]} of {at[1]}"
        raise StepFailed(f"{where}: {_short(error)}; see {kept}")


def _engine() -> str:
    """Register a papermill engine that reports each code cell as it starts; its name."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Watched(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, on_cell=None, **kwargs):
            numbers = [i for i, c in enumerate(nb_man.nb.cells) if c.cell_type == "code"]
            start = nb_man.cell_start

            def cell_start(cell, cell_index=None, **more):
                if cell_index in numbers:
                    on_cell(numbers.index(cell_index) + 1, len(numbers))
                return start(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("prism_nb", Watched)
    return "prism_nb"


@contextlib.contextmanager
def _environment(token: str, profile: str) -> Iterator[None]:
    # Kernels inherit the environment. Figures must land in the notebook (so no MPLBACKEND), and
    # the kernel must be this Python, not another one that the user has registered as python3.
    before = dict(os.environ)
    os.environ.pop("MPLBACKEND", None)
    os.environ |= PATIENT_THREADS | os.environ  # what the user set stays
    os.environ |= {TOKEN_VARIABLE: token, PROFILE_VARIABLE: profile}
    os.environ |= {ROOT_VARIABLE: str(project_root()), "JUPYTER_PREFER_ENV_PATH": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _portable(values: dict, folder: Path) -> dict:
    # The kernel looks for relative paths in the project root. What is there keeps its short name,
    # so that no path of this machine enters the notebook; what is not there becomes absolute.
    root = project_root()
    values = dict(values)
    for key in values.keys() & set(PATH_KEYS):
        there = (root / Path(values[key]).expanduser()).exists()
        if not is_word(key, values[key]) and not there and Path(values[key]).exists():
            values[key] = str(Path(values[key]).absolute())
    inside = folder.is_relative_to(root)
    values["run_dir"] = folder.relative_to(root).as_posix() if inside else str(folder)
    return values


def _setting(text: str) -> tuple[str, object]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise RunFolderError(f"--set {text} has no value; write --set key=value")
    check_key(key, "--set")
    if key in PATH_KEYS:  # typed in a terminal: a path from the folder where it was typed
        path = expanded(key, value, "--set")
        return key, str(path.absolute()) if not is_word(key, value) and path.exists() else value
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


def _missing_record(folder: Path, notebook: str, token: str) -> str:
    path = record_path(folder, notebook)
    if path.exists() and read_json(path).get("token") == token:
        return ""
    return "the notebook ended without run.finish()"


def _exit_in(notebook: object) -> str:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}; a cell may not end the kernel"
    return ""


def _literal(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths


def _short(error: str) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", error).strip().splitlines()
    return " ".join(line)[:400] if line else "unknown error"


class Progress:
    """A line a notebook: rewritten in place on a terminal, elsewhere one now and then."""

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream; a terminal is recognised."""
        self.stream, self.live = stream, stream.isatty()
        self._done = threading.Event()

    def start(self, notebook: str, why: str) -> None:
        """Begin a notebook's line."""
        self.notebook, self.why, self.at = notebook, why, "starting"
        self._began, self._done = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._tick, args=(self._done,), daemon=True)
        self._thread.start()

    def cell(self, number: int, total: int) -> None:
        """Code cell `number` of `total` starts."""
        self.at = f"cell {number} of {total}"
        if self.live:
            self._show(self.at, end="")

    def stop(self, word: str) -> None:
        """End a notebook's line."""
        self._done.set()
        self._thread.join()
        self._show(word if word == "done" else f"{word}, {self.at}")

    def line(self, notebook: str, text: str) -> None:
        """A line of its own."""
        print(f"  {notebook:<16}{text}", file=self.stream, flush=True)

    def seconds(self) -> float:
        """Seconds since the notebook began."""
        return time.monotonic() - self._began

    def _tick(self, done: threading.Event) -> None:
        while not done.wait(1 if self.live else TICK_SECONDS):
            self._show(self.at, end="" if self.live else "\n")

    def _show(self, text: str, end: str = "\n") -> None:
        minutes, seconds = divmod(int(self.seconds()), 60)
        line = f"  {self.notebook:<16}{text:<22}{minutes}:{seconds:02d}  ({self.why})"
        start = "\r\x1b[K" if self.live else ""
        print(start + line[:110], end=end, file=self.stream, flush=True)
