"""The notebooks: their form, and the whole road at smoke size with bounds on its numbers."""

import ast
import itertools
import json
import re

import nbformat
import pandas as pd
import papermill
import pytest

from prism_nb.params import MODELS
from prism_nb.run import APPENDICES, STEPS

CHECKED = {"keep_output", "nbval-check-output"}


@pytest.fixture(params=list(STEPS))
def notebook(request, root):
    return request.param, nbformat.read(root / "notebooks" / f"{request.param}.ipynb", as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def tagged(book, tag):
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", [])]


def test_numbers_are_unique_and_known(root):
    names = sorted(path.stem for path in (root / "notebooks").glob("[0-9A]*.ipynb"))
    assert names == sorted(STEPS)
    assert len({name[:2] for name in names}) == len(names)
    index = (root / "notebooks" / "README.md").read_text()
    assert all(f"({name}.ipynb)" in index for name in names)


def test_the_index_tells_what_the_heads_tell(notebook, root):
    name, book = notebook
    index = (root / "notebooks" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[[^]]*\]\({name}\.ipynb\) (.*)\|$", index, re.M)
    _, _, reads, _, smoke, profile = (cell.strip() for cell in row.split("|"))
    head = book.cells[0].source
    assert re.search(r"\*\*Runtime\*\* smoke (.*?)(?:,| on)", head)[1] == smoke
    assert re.findall(r"phantom profile (.*?),", head) == ([profile] if profile else [])
    told = re.search(r"\*\*Reads\*\* (.*?)\. ", head)[1]
    assert set(re.findall(r"`.*?`", told)) == set(re.findall(r"`.*?`", reads))


def test_links_lead_there_and_back(root):
    for name, after in itertools.pairwise(STEPS):
        here, there = (
            nbformat.read(root / "notebooks" / f"{n}.ipynb", as_version=4) for n in (name, after)
        )
        assert f"›]({after}.ipynb)" in here.cells[0].source
        assert f"({name}.ipynb)" in there.cells[0].source


def test_form(notebook):
    name, book = notebook
    assert book.metadata.kernelspec.name == "python3"
    long = [cell for cell in code_cells(book) if len(cell.source.splitlines()) > 25]
    assert [cell for cell in long if cell not in tagged(book, "parameters")] == []
    first, last = book.cells[0].source, book.cells[-1].source
    assert first.splitlines()[0] == last.splitlines()[-1], "the same links at both ends"
    for word in ("**Paper**", "**Reads**", "**Writes**", "**Runtime**"):
        assert word in first, f"{name} does not say {word}"
    assert code_cells(book)[-1].source.rstrip().endswith("run.finish()")


def test_parameters_are_those_of_the_model(notebook):
    name, book = notebook
    (cell,) = tagged(book, "parameters")
    declared = {s.target.id: s for s in ast.parse(cell.source).body}
    fields = MODELS[name].model_fields
    assert list(declared) == sorted(declared, key=list(declared).index)
    assert set(declared) == set(fields)
    remarks = dict(re.findall(r"^(\w+):.*?  # (.*)$", cell.source, re.M))
    for key, statement in declared.items():
        assert ast.literal_eval(statement.value) == fields[key].default, key
        assert remarks[key] == fields[key].description, key


def test_two_checked_cells_hold_what_they_are_compared_with(notebook):
    name, book = notebook
    checked = [c for c in book.cells if set(c.metadata.get("tags", [])) >= CHECKED]
    assert len(checked) >= 2, f"{name} has {len(checked)} checked cells"
    for cell in checked:
        assert cell.execution_count, "without a count nbval compares nothing"
        assert cell.outputs
        assert all(out.output_type == "stream" and out.name == "stdout" for out in cell.outputs)
    others = [c for c in code_cells(book) if c not in checked]
    assert not any(cell.outputs for cell in others)


SIX = [name for name in STEPS if name not in APPENDICES]
# nbval runs the defaults, and the appendices; the road alone is tested here: fewer steps do.
FEWER = {
    "02_finetune": {"num_train_steps": 8, "validate_every": 4, "num_prompts": 1},
    "03_invert": {"num_ddim_steps": 8, "num_compared": 1, "num_compared_steps": 2},
    "05_evaluate": {"baseline_steps": 4, "num_bootstrap": 50},
    "06_augment": {"num_bootstrap": 50},
}


@pytest.fixture(scope="module")
def road(root, tmp_path_factory):
    """The six notebooks by plain papermill, from another folder."""
    folder = tmp_path_factory.mktemp("road with a space")
    for name in SIX:
        papermill.execute_notebook(
            root / "notebooks" / f"{name}.ipynb",
            folder / f"{name}.ipynb",
            parameters={"run_dir": str(folder / "run"), "seed": 1, **FEWER.get(name, {})},
            cwd=folder,
            progress_bar=False,
        )
    return folder / "run"


def metrics_of(road, notebook):
    return json.loads((road / "metrics.json").read_text())[notebook]


def test_every_step_writes_what_it_promises(road):
    for name in SIX:
        step = STEPS[name]
        assert (road / "steps" / f"{name}.json").is_file()
        for path in step.writes:
            assert (road / path).exists(), f"{name} did not write {path}"
    for path in sorted((road / "tables").glob("*.csv")):
        assert len(pd.read_csv(path)) > 0, path.name


def test_the_cohort_is_whole(road):
    numbers = metrics_of(road, "01_caption")
    assert numbers["films"] == numbers["patients"] == 160
    assert numbers["films_train"] + numbers["films_val"] + numbers["films_test"] == 160
    assert numbers["rejected"] == 0


def test_fine_tuning_does_no_harm(road):
    numbers = metrics_of(road, "02_finetune")
    assert numbers["loss_after"] < 1.02 * numbers["loss_before"] < 0.2


def test_inversion_stays_near_the_vaes_floor(road):
    numbers = metrics_of(road, "03_invert")
    assert numbers["psnr_vae"] > 26
    assert numbers["psnr_inversion"] > numbers["psnr_vae"] - 5


def test_edits_move_films_the_right_way(road):
    numbers = metrics_of(road, "05_evaluate")
    # At smoke size the judge has seen a hundred films: only the columns that know the truth count.
    known = [value for value in numbers["auroc"].values() if value is not None]
    assert all(0 <= value <= 1 for value in known)
    assert max(numbers["tea_effectiveness"].values()) > 0.25
    assert max(numbers["error_outside"].values()) < 0.04


def test_table_2_holds_its_frame(road):
    table = pd.read_csv(road / "tables" / "table2.csv")
    assert {"do nothing", "VAE", "inversion", "sham edit", "ours", "perfect editor"} <= set(
        table["method"]
    )
    means = table.set_index(["method", "metric"])["mean"]
    assert (means["do nothing"].groupby("metric").mean()[["l1", "cpg"]] == 0).all()
    perfect = means["perfect editor"].groupby("metric").mean()
    assert perfect["error_inside"] < 1e-6
    assert perfect["tea_effectiveness"] == pytest.approx(1, abs=1e-5)


def test_every_arm_is_reported(road):
    numbers = metrics_of(road, "06_augment")
    arms = {"plain", "duplicates", "counterfactuals", "true_counterfactuals"}
    assert set(numbers["accuracy"]) == arms
    assert all(0 <= value <= 1 for value in numbers["accuracy"].values())
    assert set(numbers["difference"]) == arms - {"plain"}
