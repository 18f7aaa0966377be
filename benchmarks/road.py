"""W12: the six notebooks at their smoke size, by `prism-nb run` and by papermill alone."""

import subprocess
import sys
from pathlib import Path

from benchmarks.paired import GateError, seconds
from prism_nb.files import read_json
from prism_nb.run import APPENDICES, STEPS, project_root


def call(name, *arguments):
    """Run a program of this Python in a process of its own; GateError with its last line."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise GateError(f"{name} failed: {' '.join(last)[:200]}")


def road(case):
    """W12: all notebooks again, nothing changed since; the first time in the gate."""
    root, names = project_root(), [name for name in STEPS if name not in APPENDICES]
    mine, theirs = case.folder / "ours", case.folder / "papermill"

    def ours():
        call("prism-nb", "run", root / "params" / "smoke.yaml", "--set", f"run_dir={mine}")

    def peer():
        theirs.mkdir(exist_ok=True)
        for name in names:
            book, made = root / "notebooks" / f"{name}.ipynb", theirs / f"{name}.ipynb"
            how = ["--cwd", book.parent, "--no-progress-bar", "-k", "python3"]
            call("papermill", book, made, "-p", "run_dir", theirs, *how)

    first = f"the first time {seconds(peer)[0]:.0f} s, ours {seconds(ours)[0]:.0f} s"
    gate = [same_numbers(mine, theirs, names), first]
    about = "papermill, a process each", peer, gate, (2, 2), "a road"
    yield case.time("W12", "the six notebooks again", ours, *about, pairs=2, warm=False)


def same_numbers(mine, theirs, names):
    """The gate: both roads end with the same metrics of every notebook, in words."""
    one, other = (read_json(folder / "metrics.json") for folder in (mine, theirs))
    if wrong := [name for name in names if one.get(name) != other.get(name)]:
        raise GateError(f"the metrics of {', '.join(wrong)} differ between the two roads")
    return f"the metrics of {len(names)} notebooks are equal"
