"""What counts as changed, and what may be deleted."""

import os
import shutil
import subprocess
import sys

import pytest

from prism_nb import manifest
from prism_nb.files import atomic_folder, atomic_path, write_json, write_text
from prism_nb.manifest import Manifest, code_cells, leftovers, reached_modules
from prism_nb.run import Run, RunFolderError, record_path

PROFILE = {"run_dir": "x", "seed": 1, "num_ddim_steps": 5}


@pytest.fixture
def notebook(tmp_path, make_notebook):
    cells = ("%matplotlib inline\nimport os", "x = 1  # a remark")
    return make_notebook(tmp_path / "03_invert.ipynb", "seed: int = 0", *cells)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    write_text(folder / "cohort.json", "{}")
    write_text(folder / "model" / "a.txt", "weights")
    write_json(record_path(folder, "02_finetune"), {"notebook": "02_finetune"})
    return folder


def finished(folder, notebook):
    """A manifest in which 03_invert has just succeeded."""
    book = Manifest(folder, "mine")
    now = book.fingerprint("03_invert", notebook, PROFILE)
    book.begin("03_invert", now)
    run = Run("03_invert", {"run_dir": str(folder)})
    run.path("inversions/a.bin").write_bytes(b"abc")
    run.save_metrics(psnr=1.0)
    run.finish()
    record = manifest.read_json(record_path(folder, "03_invert"))
    book.complete("03_invert", record, 1.0)
    return Manifest(folder, "mine")


def why(book, notebook, **changed):
    return book.reason("03_invert", book.fingerprint("03_invert", notebook, PROFILE | changed))


def test_nothing_changed_and_what_changes_what(folder, notebook, make_notebook):
    book = finished(folder, notebook)
    assert why(book, notebook) == ""
    assert why(book, notebook, guidance_scale=3.0, run_dir="y") == ""  # not this notebook's
    assert why(book, notebook, num_ddim_steps=6) == "parameters changed: num_ddim_steps"
    assert why(book, notebook, num_test_films=6) == "parameters changed: num_test_films"
    write_text(folder / "model" / "a.txt", "other")
    assert why(book, notebook) == "inputs changed: model/"
    write_text(folder / "model" / "a.txt", "weights")  # the same bytes at another time
    assert why(book, notebook) == ""


def test_comments_are_not_code(folder, notebook, make_notebook):
    book = finished(folder, notebook)
    make_notebook(notebook, "seed: int = 0", "import os", "x = 1  # another remark")
    assert why(book, notebook) == ""
    make_notebook(notebook, "seed: int = 0", "import os", "x = 2")
    assert why(book, notebook) == "code changed: 03_invert.ipynb"


def test_outputs_must_be_intact(folder, notebook):
    book = finished(folder, notebook)
    path = folder / "inversions" / "a.bin"
    path.write_bytes(b"abd")  # as long as before
    assert why(book, notebook) == "output changed: inversions/a.bin"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    assert why(book, notebook) == ""
    write_json(folder / "metrics.json", {"03_invert": {"psnr": 2.0}})
    assert why(book, notebook) == "output changed: metrics.json"
    (folder / "metrics.json").write_text("{")
    assert why(book, notebook) == "output changed: metrics.json"
    path.unlink()
    assert why(book, notebook) == "output missing: inversions/a.bin"


def test_without_its_record_a_step_has_not_succeeded(folder, notebook):
    book = finished(folder, notebook)
    record_path(folder, "03_invert").unlink()
    assert why(book, notebook) == "record of success missing"


def test_the_same_attempt_goes_on_and_another_starts_clean(folder, notebook):
    book = finished(folder, notebook)
    now = book.fingerprint("03_invert", notebook, PROFILE)
    part = folder / "inversions" / "part.bin"
    book.begin("03_invert", now)  # it had succeeded: start clean
    assert not part.parent.exists()
    assert manifest.read_json(folder / "metrics.json") == {}
    write_text(part, "half of the films")
    book.begin("03_invert", now)  # it was cut short: go on
    assert part.exists()
    book.begin("03_invert", book.fingerprint("03_invert", notebook, PROFILE | {"seed": 2}))
    assert not part.exists()


def test_nothing_outside_the_run_folder_is_deleted(folder, notebook, tmp_path):
    outside = write_text(tmp_path / "films" / "precious.png", "x")
    book = finished(folder, notebook)
    book.steps["03_invert"]["outputs"] = {"../films/precious.png": "0", str(outside): "0"}
    (folder / "tables").symlink_to(outside.parent)
    book.begin("03_invert", {})
    assert outside.exists()
    assert (folder / "model" / "a.txt").exists()  # another notebook's


def test_films_count_by_size_and_time_and_labels_by_content(folder, tmp_path, make_notebook):
    notebook = make_notebook(tmp_path / "01_caption.ipynb", "seed: int = 0")
    films = tmp_path / "films"
    film = write_text(films / "a" / "b.png", "x")
    labels = write_text(films / "labels.csv", "path\na/b.png\n")
    profile = {"csv": str(labels)}

    def inputs():
        return Manifest(folder, "mine").fingerprint("01_caption", notebook, profile)["inputs"]

    before = inputs()
    write_text(films / "notes.txt", "no film")
    write_json(films / "runs" / "manifest.json", {"steps": {"01_caption": {}}})
    write_text(films / "runs" / "figures" / "01_x.png", "what a run draws")
    os.utime(labels, (1, 1))
    assert inputs() == before
    os.utime(film, (1, 1))
    assert manifest._changed(before, inputs()) == "films"
    write_text(labels, "path\n")
    assert manifest._changed(before, inputs()) == "csv, films"


def test_a_folder_of_dicom_is_its_own_films(folder, tmp_path, make_notebook):
    film = write_text(tmp_path / "dicom" / "patient" / "IM0001", "a film without a suffix")
    write_text(tmp_path / "beside" / "other.png", "of no concern")
    notebook = make_notebook(tmp_path / "05_evaluate.ipynb", "seed: int = 0")
    profile = {"run_dir": "x", "csv": str(tmp_path / "dicom")}

    def inputs():
        return Manifest(folder, "mine").fingerprint("05_evaluate", notebook, profile)["inputs"]

    before = inputs()
    write_text(tmp_path / "beside" / "another.png", "of no concern")
    assert inputs() == before
    os.utime(film, (1, 1))
    assert manifest._changed(before, inputs()) == "films"


@pytest.mark.parametrize(
    ("csv", "other"),
    [
        ("mimic-cxr-2.0.0-metadata.csv", "mimic-cxr-2.0.0-chexpert.csv.gz"),
        ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-metadata.csv"),
        ("df_chexpert_plus.csv", "impression_fixed.json"),
        ("df_chexpert_plus.csv", "chexbert_labels/impression_fixed.json"),
    ],
)
def test_labels_that_lie_beside_the_csv_count(folder, tmp_path, make_notebook, csv, other):
    labels, beside = tmp_path / "data" / csv, tmp_path / "data" / other
    write_text(labels, "x\n")
    write_text(beside, "0")
    films = tmp_path / "elsewhere"
    films.mkdir()
    given = {"csv": str(labels), "image_root": str(films)}
    before = inputs_of(folder, make_notebook, given)
    os.utime(labels, (1, 1))  # which counts by its content
    assert inputs_of(folder, make_notebook, given) == before
    write_text(beside, "1")
    assert manifest._changed(before, inputs_of(folder, make_notebook, given)) == "beside csv"
    assert "beside csv" not in inputs_of(folder, make_notebook, given, "05_evaluate")


def inputs_of(folder, make_notebook, profile, name="01_caption"):
    """The inputs of a step, as a new command finds them."""
    notebook = make_notebook(folder.parent / "notebooks" / f"{name}.ipynb", "seed: int = 0")
    return Manifest(folder, "mine").fingerprint(name, notebook, profile)["inputs"]


@pytest.mark.parametrize(
    "film", ["IM1", "1.2.840.113", "images/a.PNG", "broken/a.png", "linked/a.png"]
)
def test_every_film_counts_wherever_it_lies(folder, tmp_path, make_notebook, film):
    films = tmp_path / "films"
    write_text(films / "images" / "manifest.json", "{}")  # of a download, and of no run
    write_text(films / "broken" / "manifest.json", "not JSON")
    (films / ".store").mkdir()
    (films / "linked").symlink_to(".store")
    (films / ".store" / "round").symlink_to("..")  # and so for ever
    write_text(films / film, "x")
    profile = {"csv": str(write_text(films / "labels.csv", "path\n"))}
    before = inputs_of(folder, make_notebook, profile)
    write_text(films / film, "changed")
    assert manifest._changed(before, inputs_of(folder, make_notebook, profile)) == "films"


def test_a_cohort_is_made_again_where_its_films_were_moved_to(folder, tmp_path, make_notebook):
    here = tmp_path / "project" / "films"
    write_text(here / "labels.csv", "path\na.png\n")
    write_text(here / "a.png", "x")
    before = inputs_of(folder, make_notebook, {"csv": str(here / "labels.csv")})
    there = tmp_path / "moved" / "films"
    shutil.copytree(here, there)  # with the times of change
    profile = {"csv": str(there / "labels.csv")}
    after = inputs_of(folder, make_notebook, profile)
    assert manifest._changed(before, after) == "image_root"
    after = inputs_of(folder, make_notebook, profile | {"image_root": str(here)})
    assert manifest._changed(before, after) == ""
    assert "image_root" not in inputs_of(folder, make_notebook, profile, "03_invert")


def test_the_levels_of_other_runs_are_inputs_of_06(folder, make_notebook):
    level = folder.with_name("other") / "tables" / "differences.csv"
    own = folder / "tables" / "differences.csv"
    names = {"sweep_runs": ["other", "missing", folder.name]}

    def inputs():
        return inputs_of(folder, make_notebook, names, "06_augment")

    before = inputs()
    write_text(level, "0.1")
    write_text(own, "0.2")  # which 06 writes itself
    assert inputs() == before  # it has not finished
    Run("06_augment", {"run_dir": str(level.parent.parent)}).finish()
    assert manifest._changed(before, inputs()) == "sweep_runs: other"
    before = inputs()
    write_text(level, "0.9")
    assert manifest._changed(before, inputs()) == "sweep_runs: other"


def test_modules_are_followed_through_each_other(tmp_path, monkeypatch):
    files = {
        "a": "from prism_nb.b import f",
        "b": "def f():\n    from prism_nb import c\n    import prism_nb.run",
        "c": "from prism_nb.deep.d import g",
        "run": "import prism_nb.unseen",
        "unseen": "",
        "deep/__init__": "from . import e",
        "deep/d": "",
        "deep/e": "from ..f import h",
        "f": "",
    }
    for name, text in files.items():
        write_text(tmp_path / f"{name}.py", text)
    monkeypatch.setattr(manifest, "PACKAGE", tmp_path)
    found = {p.relative_to(tmp_path).as_posix() for p in reached_modules("import prism_nb.a")}
    assert found == {"a.py", "b.py", "c.py", "deep/__init__.py", "deep/d.py", "deep/e.py", "f.py"}


def test_bundled_models_count_for_those_who_use_them(folder, tmp_path, make_notebook, monkeypatch):
    package = tmp_path / "package"
    write_text(package / "models.py", 'BASE = Path(__file__).parent / "assets"')
    weights = write_text(package / "assets" / "base" / "weights.bin", "x")
    monkeypatch.setattr(manifest, "PACKAGE", package)
    user = make_notebook(tmp_path / "03_invert.ipynb", "seed: int = 0", "import prism_nb.models")
    other = make_notebook(tmp_path / "04_edit.ipynb", "seed: int = 0")
    before = finished(folder, user).fingerprint("03_invert", user, PROFILE)["code"]
    write_text(weights, "other weights")
    after = Manifest(folder, "mine").fingerprint("03_invert", user, PROFILE)["code"]
    assert manifest._changed(before, after) == "assets/"
    code = Manifest(folder, "mine").fingerprint("04_edit", other, PROFILE)["code"]
    assert list(code) == ["04_edit.ipynb"]


@pytest.mark.parametrize("text", ["<<<<<<< HEAD", "", "{}", '{"cells": [1]}', "[]"])
def test_a_damaged_notebook_is_named_and_to_be_restored(notebook, text):
    notebook.write_text(text)
    with pytest.raises(RunFolderError, match=r"03_invert\.ipynb is no .*notebook .*: restore"):
        code_cells(notebook)


def test_magics_are_not_python(notebook):
    assert "matplotlib" not in code_cells(notebook)
    assert "import os" in code_cells(notebook)


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "photos/me.png", "phantom/manifest.json", "model/weights.bin", "steps/1.txt"],
)
def test_a_folder_with_other_things_is_no_run_folder(tmp_path, name):
    write_text(tmp_path / "home" / name, "x")
    with pytest.raises(RunFolderError, match="is no run folder"):
        Manifest(tmp_path / "home", "mine")


def test_hidden_files_alone_are_no_strangers(tmp_path):
    write_text(tmp_path / "run" / ".lock", "")  # all that a run killed at its start leaves
    write_text(tmp_path / "run" / ".partial-1" / "half", "")
    Manifest(tmp_path / "run", "mine")


def test_only_what_a_step_of_ours_wrote_is_cleared(folder, tmp_path):
    own = write_text(folder / "inversions" / "of.bin", "somebody's")
    Manifest(folder, "mine").begin("03_invert", {})
    assert own.exists()
    write_json(folder / "manifest.json", {"profile": "mine", "steps": {}})
    Run("03_invert", {"run_dir": str(folder)}).finish()  # by papermill or by hand
    Manifest(folder, "mine").begin("03_invert", {})
    assert not own.exists()


def test_a_run_of_another_profile_is_refused(folder):
    Manifest(folder, "mine").write()
    with pytest.raises(RunFolderError, match=r"of the profile mine, not other; give .* --name"):
        Manifest(folder, "other")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match="no readable JSON"):
        Manifest(folder, "mine")


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    write_text(tmp_path / "model" / "keep.txt", "x")
    (tmp_path / "model" / ".partial-1.txt").write_text("half")
    (tmp_path / ".partial-2").mkdir()
    (tmp_path / ".partial-3-00000000-3.txt").write_text("half")  # of another machine
    leftovers(tmp_path)
    names = [".partial-3-00000000-3.txt", "model", "keep.txt"]
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == names
    leftovers(tmp_path, alone=True)
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == names[1:]


def test_what_a_process_is_writing_is_left_alone_until_it_is_killed(tmp_path):
    write = (
        "import sys; from prism_nb.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]): print(flush=True), input()"
    )
    command = [sys.executable, "-c", write, str(tmp_path / "parts" / "a")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdout.readline()
    with atomic_path(tmp_path / "training" / "log.csv") as mine, atomic_folder(tmp_path / "b") as b:
        mine.write_text("half")
        leftovers(tmp_path)
        (there,) = (tmp_path / "parts").iterdir()
        assert mine.exists()
        assert b.exists()
    writer.kill()
    writer.communicate()
    leftovers(tmp_path)
    assert not there.exists()


def test_a_step_is_not_given_what_it_would_clear(tmp_path):
    manifest = Manifest(tmp_path / "run", "smoke")
    now = {"parameters": {"baseline": str(tmp_path / "run" / "baseline"), "judge": "resnet18"}}
    with pytest.raises(RunFolderError, match=r"05_evaluate writes baseline there .* copy it out"):
        manifest.begin("05_evaluate", now | {"code": {}, "inputs": {}})
    now["parameters"]["baseline"] = "bundled"
    manifest.begin("05_evaluate", now | {"code": {}, "inputs": {}})


@pytest.mark.parametrize(
    "name",
    ["training/arms/x", "baseline/card.json", "studio/001_a.json", "counterfactuals/plan.parquet"],
)
def test_what_papermill_and_the_studio_left_is_no_stranger(tmp_path, name):
    write_text(tmp_path / "run" / name, "x")
    write_json(record_path(tmp_path / "run", "01_caption"), {})
    Manifest(tmp_path / "run", "smoke")
