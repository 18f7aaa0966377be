"""The manifest of a run folder: what each step was made from, and whether that still holds.

A step is unchanged when its parameters, its code (the notebook's code cells and every module of
this package that they reach), its inputs and its outputs are what manifest.json says. Code is
compared as a syntax tree, so comments and layout do not count; files by SHA-256, read again only
when size or time of change differ; films, and what lies beside their CSV, by size and time.
Used by `prism-nb run` and `prism-nb status`, by no notebook.
"""

import ast
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from prism_nb.files import TEMPORARY, abandoned, plain, read_json, write_json
from prism_nb.params import PATH_KEYS, for_notebook, validate
from prism_nb.run import (
    STEPS,
    RunFolderError,
    files_under,
    is_word,
    metrics_digest,
    own_outputs,
    project_root,
    record_path,
    resolve_path,
    stamp,
)

PACKAGE = Path(__file__).resolve().parent
# These carry results and do not make them: a change here leaves every step as it is.
CARRIERS = ("files", "params", "run", "manifest", "execute", "report", "cli")
FILMS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", "")  # "": DICOM often has none
LABELS = (".csv", ".json", ".gz")  # of some data sets they lie beside the CSV that is given


class Manifest:
    """manifest.json of one run folder."""

    def __init__(self, folder: Path, profile: str) -> None:
        """Open the manifest, or start one; RunFolderError if the folder is another's."""
        self.folder = folder
        self.path = folder / "manifest.json"
        stored = read_manifest(folder)
        if not stored:
            _refuse_foreign(folder)
        owner = stored.get("profile", profile)
        if owner != profile:
            raise RunFolderError(
                f"{folder} holds a run of the profile {owner}, not {profile}; "
                "give this run another folder with --name"
            )
        self.profile = profile
        self.parameters: dict = stored.get("parameters", {})
        self.steps: dict[str, dict] = stored.get("steps", {})
        self.stamps: dict[str, list] = stored.get("stamps", {})
        self._films: str | None = None

    def write(self) -> None:
        """Write manifest.json, whole or not at all."""
        content = {"profile": self.profile, "parameters": self.parameters}
        write_json(self.path, content | {"steps": self.steps, "stamps": self.stamps})

    def fingerprint(self, notebook: str, source: Path, profile: dict) -> dict:
        """What a step would be made from now: parameters, code and inputs."""
        return {
            "parameters": given_parameters(notebook, profile),
            "code": self._code(source),
            "inputs": self._inputs(notebook, profile),
        }

    def reason(self, notebook: str, now: dict) -> str:
        """Why a step has to run, in words; "" if it need not."""
        entry = self.steps.get(notebook, {})
        if "outputs" not in entry:
            return "not finished" if entry else "first time"
        made_from = entry["fingerprint"]
        for part in ("parameters", "code", "inputs"):
            changed = _changed(made_from[part], now[part])
            if changed:
                return f"{part} changed: {changed}"
        for name, digest in entry["outputs"].items():
            if not (self.folder / name).is_file():
                return f"output missing: {name}"
            if self._digest(name) != digest:
                return f"output changed: {name}"
        if metrics_digest(self.folder, notebook) != entry["metrics"]:
            return "output changed: metrics.json"
        return "" if record_path(self.folder, notebook).exists() else "record of success missing"

    def begin(self, notebook: str, now: dict, afresh: bool = False) -> None:
        """Forget a step's success; clear its outputs, unless the same attempt was cut short.

        What no step of ours has written stays: it may be somebody's own.
        """
        self._refuse_own(notebook, now.get("parameters", {}))
        entry = self.steps.get(notebook, {})
        record = record_path(self.folder, notebook)
        ours = bool(entry) or record.exists()  # a notebook run by hand leaves its record alone
        record.unlink(missing_ok=True)
        continued = "outputs" not in entry and entry.get("fingerprint") == plain(now)
        if ours and (afresh or not continued):
            self._clear(notebook, entry.get("outputs", {}))
        self.steps[notebook] = {"fingerprint": plain(now)}
        self.write()

    def complete(self, notebook: str, record: dict, seconds: float) -> None:
        """Take over the step record that a notebook's `finish` has written."""
        self.stamps = {name: s for name, s in self.stamps.items() if self._there(name)}
        self.stamps |= record["outputs"]
        self.steps[notebook] |= {
            "outputs": {name: digest for name, (_, _, digest) in record["outputs"].items()},
            "metrics": record["metrics"],
            "provenance": record["provenance"],
            "seconds": round(seconds, 1),
            "finished": record["finished"],
        }
        self.write()

    def _there(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _refuse_own(self, notebook: str, parameters: dict) -> None:
        given = {key: parameters[key] for key in PATH_KEYS if key in parameters}
        for key, value in given.items():
            path = Path(resolve_path(key, value, project_root())).resolve()
            for name in STEPS[notebook].writes:
                if not is_word(key, value) and path.is_relative_to(self.folder / name):
                    raise RunFolderError(
                        f"{key} = {value!r}: {notebook} writes {name} there and would clear it "
                        "first; copy it out of the run folder"
                    )

    def _clear(self, notebook: str, recorded: Iterable[str]) -> None:
        names = {*STEPS[notebook].writes, *own_outputs(self.folder, notebook), *recorded}
        for name in names:
            path = self.folder / name
            if not path.parent.resolve().is_relative_to(self.folder):
                continue  # the manifest is a file like any other: delete nothing outside
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        metrics = self.folder / "metrics.json"
        if metrics.exists() and metrics_digest(self.folder, notebook) == "damaged":
            metrics.unlink()
        elif metrics.exists():
            write_json(metrics, {k: v for k, v in read_json(metrics).items() if k != notebook})

    def _digest(self, name: str) -> str:
        # Absolute names (a CSV, weights) work as well: folder / absolute is the absolute path.
        path = self.folder / name
        status, known = path.stat(), self.stamps.get(name)
        if not known or known[:2] != [status.st_size, status.st_mtime_ns]:
            self.stamps[name] = known = stamp(path)
        return known[2]

    def _code(self, source: Path) -> dict[str, str]:
        texts = {source.name: code_cells(source)}
        for module in sorted(reached_modules(texts[source.name])):
            name = module.relative_to(PACKAGE).as_posix()
            texts[name] = module.read_text(encoding="utf-8")
        digests = {name: _digest_of(_normal(text)) for name, text in texts.items()}
        if any('"assets"' in text for text in texts.values()):  # a bundled model is code, too
            files = files_under(PACKAGE, ["assets"])
            digests["assets/"] = _digest_of("".join(self._digest(str(PACKAGE / f)) for f in files))
        return digests

    def _inputs(self, notebook: str, profile: dict) -> dict[str, str]:
        found = {n: self._digest(n) for n in files_under(self.folder, STEPS[notebook].reads)}
        inputs = {name: digest for name, digest in found.items() if "/" not in name}
        for top in {name.split("/")[0] for name in found if "/" in name}:  # one line a folder
            inside = {name: d for name, d in found.items() if name.startswith(f"{top}/")}
            inputs[f"{top}/"] = _digest_of(json.dumps(inside, sort_keys=True))
        given, root = given_parameters(notebook, profile), project_root()
        for key, value in given.items():
            if key not in PATH_KEYS or key == "image_root" or is_word(key, value):
                continue
            path = Path(resolve_path(key, value, root))
            if path.exists():
                inputs[key] = _tree(path) if path.is_dir() else self._digest(str(path))
        for name in given.get("sweep_runs", []):
            if name != self.folder.name:
                inputs[f"sweep_runs: {name}"] = self._level(self.folder.parent / name)
        if profile.get("csv", "phantom") != "phantom":
            csv = Path(resolve_path("csv", profile["csv"], root))
            own = csv if csv.is_dir() else csv.parent
            films = Path(resolve_path("image_root", profile.get("image_root", ""), root) or own)
            self._films = self._films or _tree(films, FILMS)
            inputs["films"] = self._films
            if "csv" in given:  # 01, which writes into the cohort where its films are
                inputs["image_root"] = str(films.resolve())
                if csv.is_file():
                    inputs["beside csv"] = _beside(csv)
        return inputs

    def _level(self, run: Path) -> str:
        path = run / "tables" / "differences.csv"
        done = path.is_file() and record_path(run, "06_augment").is_file()
        return self._digest(str(path)) if done else ""  # as study.read_levels has it


def read_manifest(folder: Path) -> dict:
    """The manifest.json of a run folder, {} if it has none; RunFolderError if it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        stored = read_json(path)
    except ValueError as error:
        raise RunFolderError(str(error)) from None
    if not isinstance(stored, dict) or not isinstance(stored.get("steps"), dict):
        raise RunFolderError(f"{path} is no manifest of a run; choose another run folder")
    return stored


def given_parameters(notebook: str, profile: dict) -> dict:
    """What a profile gives one notebook, as checked values; the run folder does not count."""
    given = for_notebook(profile, notebook)
    given.pop("run_dir", None)
    return validate(notebook, given).model_dump(include=set(given))


def code_cells(notebook: Path) -> str:
    """Source of a notebook's code cells, without magics and shell lines."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, LookupError, TypeError) as error:
        raise RunFolderError(
            f"{notebook} is no readable notebook ({error}): restore it, "
            f"e.g. git checkout {notebook}"
        ) from None
    lines = "\n".join(sources).split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def reached_modules(source: str) -> set[Path]:
    """Files of this package that some source imports, directly or through each other."""
    found: set[Path] = set()
    waiting = list(_imports(source))
    while waiting:
        name = waiting.pop()
        path = _module_file(name)
        if path and path not in found:
            found.add(path)
            waiting += _imports(path.read_text(encoding="utf-8"), path)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # a.b.c imports a and a.b as well
    return found


def leftovers(folder: Path, alone: bool = False) -> None:
    """Delete temporary files that killed processes have left in a run folder.

    alone: nobody else writes there now, so that those of other machines' processes go as well.
    """
    left = (lambda name: name.startswith(TEMPORARY)) if alone else abandoned
    for parent, folders, names in os.walk(folder):  # it bears that folders vanish meanwhile
        for name in filter(left, folders):
            shutil.rmtree(Path(parent, name))
        for name in filter(left, names):
            Path(parent, name).unlink(missing_ok=True)
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]


@functools.cache  # every notebook of a run reaches the same modules
def _imports(source: str, path: Path | None = None) -> list[str]:
    names: list[str] = []
    package = ("prism_nb", *(path.relative_to(PACKAGE).parts[:-1] if path else ()))
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *((node.module,) if node.module else ())))
            names += [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return names


def _module_file(name: str) -> Path | None:
    first, *rest = name.split(".")
    if first != "prism_nb" or not rest or rest[0] in CARRIERS:
        return None
    path = PACKAGE.joinpath(*rest)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # the notebook itself will say so, with its cell
        return ast.Module(body=[], type_ignores=[])


@functools.cache
def _normal(source: str) -> str:
    tree = _parsed(source)
    return ast.dump(tree) if tree.body else source


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tree(folder: Path, suffixes: tuple[str, ...] = ()) -> str:
    """Digest of names, sizes and times of the files below a folder, less hidden ones and runs."""
    rows, linked = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [n for n in sorted(folders) if not _passed_over(Path(parent, n), linked)]
        paths = [os.path.join(parent, n) for n in sorted(names) if not n.startswith(".")]
        rows += [_size_and_time(p, folder) for p in paths if not suffixes or _suffix(p) in suffixes]
    return _digest_of("".join(rows))


def _passed_over(inside: Path, linked: set[str]) -> bool:
    # Films may lie below the project root; what runs write there is no input of theirs.
    if inside.name.startswith(".") or inside == project_root() / "figures" or _is_run(inside):
        return True
    if not inside.is_symlink():
        return False
    target = os.path.realpath(inside)
    again = target in linked  # links may lead round in a circle
    linked.add(target)
    return again


def _is_run(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except (RunFolderError, OSError):  # of that name, and something else
        return False


def _beside(csv: Path) -> str:
    """Digest of names, sizes and times of what may be further labels that go with a CSV."""
    paths = [*csv.parent.glob("[!.]*"), *csv.parent.glob("chexbert_labels/[!.]*")]
    wanted = sorted(str(p) for p in paths if p != csv and _suffix(p.name) in LABELS)
    return _digest_of("".join(_size_and_time(path, csv.parent) for path in wanted))


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    return "" if suffix[1:].isdigit() else suffix  # the end of a unique id, such as 1.2.840


def _size_and_time(path: str, folder: Path) -> str:
    if not os.path.isfile(path):
        return ""
    status = os.stat(path)
    return f"{os.path.relpath(path, folder)} {status.st_size} {status.st_mtime_ns}\n"


def _changed(old: dict, new: dict) -> str:
    names = [name for name in {**old, **new} if old.get(name) != plain(new.get(name))]
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or any(record_path(folder, notebook).exists() for notebook in STEPS):
        return  # new, or of notebooks that ran by hand
    for path in folder.iterdir():
        if not path.name.startswith("."):  # our lock, or what a killed writer has left
            raise RunFolderError(
                f"{folder} is no run folder (it holds {path.name}, and no notebook has finished "
                "there); choose another run folder"
            )
