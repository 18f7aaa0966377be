"""The run folder, as a notebook sees it: parameters, inputs, outputs, the record of success.

    run = Run("03_invert", globals())   # checks the parameters, finds runs/<name>
    model = load(run.need("model"))     # or a one-line error that names the notebook to run
    run.save_table(frame, "reconstruction"); run.save_metrics(psnr=31.2)
    run.finish()                        # the step record: nothing else counts as success

STEPS says which notebook reads and writes what; `prism-nb run` decides with it what to skip.
Relative paths start from the project root, whatever folder the kernel runs in.
Used by every notebook.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prism_nb import __version__
from prism_nb.files import atomic_path, plain, read_json, sha256_file, write_json
from prism_nb.params import MODELS, PATH_KEYS, ParamError, check_key, notebook_name, validate

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas

TOKEN_VARIABLE = "PRISM_NB_STEP"  # set by `prism-nb run`: this execution, and no other
PROFILE_VARIABLE = "PRISM_NB_PROFILE"
ROOT_VARIABLE = "PRISM_NB_ROOT"  # kernels then agree with who started them
VERSIONS = ("torch", "diffusers", "transformers", "timm", "numpy", "pandas", "scikit-learn")
MARK = "figure made by prism_nb; films in it may be SYNTHETIC counterfactuals"  # in every PNG
# Words with a meaning of their own, by the path parameter that has them; see is_word.
NOT_PATHS = {
    "csv": ("phantom",),
    "base_model": ("phantom",),
    "clip_model": ("base", "openai", "medsiglip"),
    "classifier_weights": ("imagenet",),
    "baseline": ("bundled", "train", "none"),
    "vqa_backend": ("clip", "anthropic"),
}
COHORT = ("cohort.parquet", "cohort.json", "phantom")


class MissingInput(FileNotFoundError):
    """A notebook needs a file that an earlier notebook writes."""


class RunFolderError(ValueError):
    """The run folder cannot be used: in use, of another profile, or not a run folder."""


@dataclass(frozen=True)
class Step:
    """What a notebook reads and writes, as paths in the run folder (files or whole folders)."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


TABLES = "tables"  # in metrics.json
# metrics.json and figures/NN_*.png are written by all.
STEPS: dict[str, Step] = {
    "01_caption": Step(
        reads=(),
        writes=(*COHORT, "rejected.csv", "tables/table1.csv"),
    ),
    "02_finetune": Step(
        reads=COHORT,
        writes=("latents", "model", "tables/losses.csv"),
    ),
    "03_invert": Step(
        reads=(*COHORT, "model"),
        writes=("inversions", "tables/reconstruction.csv"),
    ),
    "04_edit": Step(
        reads=(*COHORT, "model", "inversions"),
        writes=("edits",),
    ),
    "05_evaluate": Step(
        reads=(*COHORT, "model", "inversions", "edits"),
        writes=("classifiers", "baseline", "tables/table2.csv"),
    ),
    "06_augment": Step(
        reads=(*COHORT, "latents", "model", "edits", "baseline"),
        writes=("augment", "tables/table3.csv"),
    ),
    "A1_vqa": Step(
        reads=(*COHORT, "model", "edits"),
        writes=("tables/vqa.csv",),
    ),
    "A2_confounders": Step(
        reads=(*COHORT, "model", "inversions", "edits", "classifiers", "tables/table2.csv"),
        writes=("tables/confounders.csv",),
    ),
    "A3_limits": Step(
        reads=(*COHORT, "model", "inversions", "edits", "classifiers", "tables/table2.csv"),
        writes=("tables/limits.csv",),
    ),
}
APPENDICES = tuple(name for name in STEPS if name.startswith("A"))  # run where they are asked for


class Run:
    """One notebook's view of its run folder."""

    def __init__(self, notebook: str, namespace: dict) -> None:
        """Take the declared parameters from a namespace, check them, find the folder.

        What is written makes the folder, so that a notebook run too early leaves none behind.
        """
        self.notebook = notebook_name(notebook)
        self.step = STEPS[self.notebook]
        _refuse_unknown_injected(namespace)
        fields = MODELS[self.notebook].model_fields
        params = validate(self.notebook, {k: namespace[k] for k in fields if k in namespace})
        root = project_root()
        paths = {k: resolve_path(k, getattr(params, k), root) for k in PATH_KEYS if k in fields}
        self.params = params.model_copy(update=paths)
        self.folder = (root / Path(params.run_dir).expanduser()).resolve()
        self.token = os.environ.get(TOKEN_VARIABLE, "")
        self._started = time.monotonic()
        self._saved: set[str] = set()
        self._metrics: dict = {}

    def need(self, name: str) -> Path:
        """Path of an input; MissingInput says which notebook writes it."""
        if not _covered(name, self.step.reads):
            raise ValueError(f"{self.notebook} does not declare that it reads {name}; see STEPS")
        path, writer = self.folder / name, _writer(name)
        if path.exists() and record_path(self.folder, writer).exists():
            return path
        what = f"is incomplete, {writer} did not finish" if path.exists() else "is missing"
        remedy = f"run notebooks/{writer}.ipynb first ({self._command()} --only {writer})"
        runs = sorted(self.folder.parent.glob("*/"))
        runs = [r for r in runs if (r / name).exists() and record_path(r, writer).exists()]
        there = [str(Path(self.params.run_dir).with_name(run.name)) for run in runs[:3]]
        remedy += f"; or set run_dir, to a run that has it: {', '.join(there)}" if there else ""
        raise MissingInput(f"{self.params.run_dir}/{name} {what}: {remedy}")

    def _command(self) -> str:
        """How to run this folder's profile, as far as it is known."""
        root = project_root()
        stem = os.environ.get(PROFILE_VARIABLE) or self.folder.name
        if self.folder.parent != root / "runs" or not (root / f"params/{stem}.yaml").is_file():
            return "prism-nb run PROFILE"
        name = "" if stem == self.folder.name else f" --name {self.folder.name}"
        return f"prism-nb run params/{stem}.yaml{name}"

    def path(self, name: str) -> Path:
        """Path of an output in the run folder; its parent folder exists."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder):
            raise ValueError(f"{name} leaves the run folder; give a name inside {self.folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._forget_success()
        self._saved.add(Path(name).as_posix())
        return path

    def save_table(self, frame: "pandas.DataFrame", name: str) -> Path:
        """Write tables/<name>.csv; the index is kept unless it only counts the rows."""
        import pandas

        path = self.path(f"tables/{name}.csv")
        counts = isinstance(frame.index, pandas.RangeIndex) and frame.index.name is None
        with atomic_path(path) as partial:
            frame.to_csv(partial, index=not counts, float_format="%.8g", lineterminator="\n")
        return path

    def save_figure(self, drawing: object, name: str) -> Path:
        """Write figures/<name>.png at 150 dpi from Axes, an array of Axes or a Figure."""
        if not name.startswith(self.notebook[:3]):
            raise ValueError(f"figure {name} of {self.notebook} must start {self.notebook[:3]}")
        path = self.path(f"figures/{name}.png")
        with atomic_path(path) as partial:
            # No software and no date in the file: equal figures are equal bytes.
            about = {"Software": None, "Description": MARK}
            _figure(drawing).savefig(partial, dpi=150, bbox_inches="tight", metadata=about)
        return path

    def recorded(self, *notebooks: str) -> dict:
        """The parameters that notebooks of this run were run with: notebook -> {name: value}."""
        return {name: read_json(record_path(self.folder, name))["parameters"] for name in notebooks}

    def save_metrics(self, **numbers: object) -> Path:
        """Put numbers under this notebook's name in metrics.json; no timings, please.

        Under the name TABLES whole tables: a report and a sweep pass over them.
        """
        self._forget_success()
        self._metrics |= plain(numbers)
        path = self.folder / "metrics.json"
        metrics = read_json(path) if path.exists() else {}
        return write_json(path, metrics | {self.notebook: self._metrics})

    def _forget_success(self) -> None:
        """Before the first write, remove the record of what is written over from here on."""
        if not self._saved and not self._metrics:
            record_path(self.folder, self.notebook).unlink(missing_ok=True)

    def finish(self) -> "pandas.DataFrame":
        """Write the step record and return the files written (path, size in bytes)."""
        import pandas

        names = own_outputs(self.folder, self.notebook, self._saved)
        outputs = {name: stamp(self.folder / name) for name in names}
        record = {
            "notebook": self.notebook,
            "token": self.token,
            "outputs": outputs,
            "metrics": metrics_digest(self.folder, self.notebook),
            "parameters": self.params.model_dump(),
            "provenance": self.provenance(),
            "seconds": round(time.monotonic() - self._started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(record_path(self.folder, self.notebook), record)
        rows = [{"path": name, "size": size} for name, (size, _, _) in outputs.items()]
        if self._metrics:
            size = (self.folder / "metrics.json").stat().st_size
            rows.append({"path": "metrics.json", "size": size})
        return pandas.DataFrame(rows, columns=["path", "size"])

    def provenance(self) -> dict:
        """What made the outputs: notebook, profile, seed, device, versions. No times, no paths."""
        return {
            "notebook": self.notebook,
            "profile": os.environ.get(PROFILE_VARIABLE, ""),
            "seed": self.params.seed,
            "device": self.device if "torch" in sys.modules else "cpu",
            "versions": versions(),
        }

    @property
    def device(self) -> str:
        """The device to use, cpu or cuda, with auto resolved; ParamError if cuda is not there."""
        import torch

        wanted = getattr(self.params, "device", "cpu")
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ParamError(f"{self.notebook}: device = 'cuda', but torch finds none; use auto")
        if wanted == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return wanted

    @staticmethod
    def peak_memory() -> float:
        """The most memory so far, in GiB: of the GPU where one is used, else of this process."""
        import resource

        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    @classmethod
    def measure(cls, work: "Callable") -> tuple:
        """What `work` returns, its seconds, and the most memory (GiB) that was held meanwhile."""
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # Linux alone can forget the peak before
            Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        result = work()
        return result, time.perf_counter() - started, cls.peak_memory()


def project_root() -> Path:
    """The folder that holds notebooks/: the clone, or the nearest above the current folder."""
    if ROOT_VARIABLE in os.environ:
        return Path(os.environ[ROOT_VARIABLE])
    here = Path.cwd()
    for folder in (Path(__file__).resolve().parent.parent, here, *here.parents):
        if (folder / "notebooks").is_dir():
            return folder
    return here


def is_word(key: str, value: str) -> bool:
    """Whether a path parameter's value is no path but a word; empty text is one for each."""
    return value in ("", *NOT_PATHS.get(key, ()))


def resolve_path(key: str, value: str, root: Path) -> str:
    """Make a path parameter absolute: from the project root, else from the current folder.

    Words such as "phantom" and names on the hub (nothing of that name is there) stay as they are.
    """
    if is_word(key, value):
        return value
    path = Path(value).expanduser()
    for folder in (root, Path.cwd()):
        if (folder / path).exists():
            return str((folder / path).absolute())
    return str(root / path) if key in ("csv", "image_root", "extra_csv") else value


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "prism_nb": __version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def record_path(folder: Path, notebook: str) -> Path:
    """Where a notebook's step record stands."""
    return folder / "steps" / f"{notebook}.json"


def own_outputs(folder: Path, notebook: str, further: set[str] = frozenset()) -> list[str]:
    """Files that a notebook has written, as sorted posix paths in the run folder."""
    names = {*STEPS[notebook].writes, *further}
    names |= {f"figures/{file.name}" for file in (folder / "figures").glob(f"{notebook[:3]}*")}
    return files_under(folder, sorted(names - {"metrics.json"}))


def files_under(folder: Path, names: tuple[str, ...] | list[str]) -> list[str]:
    """Every file that some names (files or folders) stand for, less hidden ones, sorted."""
    found = set()
    for name in names:
        path = folder / name
        if path.is_dir():
            inside = (p.relative_to(folder) for p in path.rglob("*") if p.is_file())
            found |= {p.as_posix() for p in inside if not any(q.startswith(".") for q in p.parts)}
        elif path.is_file():
            found.add(Path(name).as_posix())
    return sorted(found)


def stamp(path: Path) -> list:
    """Size, time of change in ns and SHA-256 of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, sha256_file(path)]


def without_tables(section: dict) -> dict:
    """What a notebook has put into metrics.json, whole tables left out."""
    return {name: value for name, value in section.items() if name != TABLES}


def metrics_digest(folder: Path, notebook: str) -> str:
    """Digest of what a notebook has put into metrics.json; "" if nothing."""
    path = folder / "metrics.json"
    try:
        section = read_json(path).get(notebook) if path.exists() else None
    except (ValueError, AttributeError):
        return "damaged"
    text = json.dumps(section, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() if section else ""


def _covered(name: str, names: tuple[str, ...]) -> bool:
    path = Path(name)
    return any(path == Path(known) or path.is_relative_to(known) for known in names)


def _writer(name: str) -> str:
    return next(notebook for notebook, step in STEPS.items() if _covered(name, step.writes))


def _figure(drawing: object) -> object:
    if hasattr(drawing, "flat"):  # an array of Axes, as plt.subplots returns
        drawing = next(iter(drawing.flat))
    if hasattr(drawing, "savefig"):
        return drawing
    if hasattr(drawing, "figure"):
        return drawing.figure
    raise TypeError(f"{type(drawing).__name__} is no drawing; give Axes or a Figure")


def _refuse_unknown_injected(namespace: dict) -> None:
    # papermill only warns about a key that no notebook declares and runs with the default.
    for cell in namespace.get("In", []):
        if not re.match(r"# Parameters\s", cell):
            continue
        for statement in ast.parse(cell).body:
            for target in getattr(statement, "targets", []):
                check_key(getattr(target, "id", ""), "parameters")
