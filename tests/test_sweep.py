"""Sweeps: a run a combination, shared steps run once, one table; what fails stops no other run."""

import pandas as pd
import pytest

from prism_nb import sweep as module
from prism_nb.files import locked, read_json, write_text
from prism_nb.params import ProfileError
from prism_nb.run import RunFolderError
from prism_nb.sweep import combinations, run_one, sweep

STEPS = ["02_finetune", "03_invert"]
COMMON = 'run_dir: str = "runs/smoke"\nseed: int = 0\n'
BEGIN = "from prism_nb.run import Run\nfrom prism_nb.files import write_json\n"
TRAIN = "write_json(run.path('model/weight.json'), run.params.num_train_steps)\nrun.finish()"
INVERT = """
assert run.params.num_ddim_steps != 13, "unlucky"
psnr = {"test": 10.0 * run.params.num_ddim_steps, "n": 2}
run.save_metrics(psnr=psnr, tables={"long": {"a": 1}})
run.finish()
"""


@pytest.fixture
def road(tmp_path, make_notebook):
    """Two notebooks and a profile of their own."""
    for name, further, cell in (
        ("02_finetune", "num_train_steps: int = 24", TRAIN),
        ("03_invert", "num_ddim_steps: int = 10", INVERT),
    ):
        start = f"{BEGIN}run = Run({name!r}, globals())"
        make_notebook(tmp_path / "notebooks" / f"{name}.ipynb", COMMON + further, start, cell)
    return write_text(tmp_path / "mine.yaml", f'run_dir: "{tmp_path}/runs/mine"\n')


def go(road, *settings):
    return sweep(road, settings, notebooks=road.parent / "notebooks", steps=STEPS)


def test_a_run_a_combination_one_table_and_shared_steps_run_once(road, capsys):
    table, path, failed = go(road, "num_ddim_steps=2,13,4")
    assert failed.startswith("mine-num_ddim_steps=13: 03_invert failed in cell 4 of 4: Assertion")
    assert failed.endswith("; the same command goes on")
    assert "\n" not in failed
    assert table["run"].tolist() == [f"mine-num_ddim_steps={n}" for n in (2, 13, 4)]
    assert table["03_invert.psnr.test"].fillna(0).tolist() == [20, 0, 40]
    assert not any("tables" in name for name in table)
    assert path.name == "mine-num_ddim_steps.csv"
    assert pd.read_csv(path)["num_ddim_steps"].tolist() == [2, 13, 4]
    runs = [path.parent / name for name in table["run"]]
    assert len({(run / "model" / "weight.json").stat().st_ino for run in runs}) == 1
    said = capsys.readouterr().out
    assert (said.count("02_finetune     done"), said.count("03_invert       done")) == (1, 2)
    assert said.count("02_finetune     unchanged") == 2
    assert (runs[2] / "report" / "index.html").is_file()


def test_a_run_that_failed_shows_no_number_of_the_run_that_it_started_from(road, make_notebook):
    read = "n = read_json(run.need('inversions/n.json'))\nrun.save_metrics(n=n)\nrun.finish()"
    write = "\nwrite_json(run.path('inversions/n.json'), run.params.num_ddim_steps)\nrun.finish()"
    begin = "from prism_nb.files import read_json\n" + BEGIN
    for name, cell in (("03_invert", INVERT.replace("\nrun.finish()", write)), ("04_edit", read)):
        path = road.parent / "notebooks" / f"{name}.ipynb"
        further = "num_ddim_steps: int = 10" if name == "03_invert" else ""
        make_notebook(path, COMMON + further, f"{begin}run = Run({name!r}, globals())", cell)
    given = {"notebooks": road.parent / "notebooks", "steps": [*STEPS, "04_edit"]}
    table, _, failed = sweep(road, ["num_ddim_steps=2,13"], **given)
    assert "03_invert failed" in failed
    assert table["04_edit.n"].fillna(0).tolist() == [2, 0]


def test_a_run_folder_in_use_or_of_another_stops_no_other_run(road):
    runs = road.parent / "runs"
    write_text(runs / "mine-num_ddim_steps=3" / "thesis.tex", "mine")
    folder = runs / "mine-num_ddim_steps=2"
    folder.mkdir()
    with locked(folder / ".lock"):
        table, _, failed = go(road, "num_ddim_steps=2,3,4")
    assert "mine-num_ddim_steps=2: " in failed
    assert "is in use by another run" in failed
    assert "mine-num_ddim_steps=3 is no run folder (it holds thesis.tex" in failed
    assert table["03_invert.psnr.test"].fillna(0).tolist() == [0, 0, 40]
    assert [path.name for path in (runs / "mine-num_ddim_steps=3").iterdir()] == ["thesis.tex"]


def test_a_linked_run_can_change_without_the_other(road):
    notebooks = road.parent / "notebooks"
    run_one(road, (), notebooks, STEPS, road.parent / "none")
    first, second = road.parent / "runs" / "mine", road.parent / "runs" / "other"
    settings = (f"run_dir={second}", "num_train_steps=3")
    run_one(road, settings, notebooks, STEPS, first)
    assert read_json(first / "model" / "weight.json") == 24
    assert read_json(second / "model" / "weight.json") == 3


def test_a_run_that_another_command_began_meanwhile_is_not_replaced(road, monkeypatch):
    notebooks = road.parent / "notebooks"
    first, second = road.parent / "runs" / "mine", road.parent / "runs" / "other"
    run_one(road, (), notebooks, STEPS, first)
    copytree = module.shutil.copytree

    def slow(*given, **options):
        copytree(*given, **options)
        write_text(second / "begun.txt", "by another sweep")

    monkeypatch.setattr(module.shutil, "copytree", slow)
    monkeypatch.setattr(module, "run_job", lambda *_, **__: None)
    run_one(road, (f"run_dir={second}",), notebooks, STEPS, first)
    assert [path.name for path in second.glob("[!r]*")] == ["begun.txt"]
    assert not list(second.parent.glob(".partial-*"))


def test_each_sweep_has_jobs_of_its_own(road, monkeypatch):
    folders = []
    monkeypatch.setattr(
        module, "run_jobs", lambda _, __, folder, *___: folders.append(folder) or {}
    )
    for _ in range(2):
        go(road, "num_ddim_steps=3,4")
    assert len({folder.name for folder in folders if folder}) == 2


def test_which_run_starts_from_which(road, monkeypatch):
    ran = []
    monkeypatch.setattr(module, "run_jobs", lambda call, calls, *_: ran.append(calls) or {})
    go(road, "num_train_steps=1,2", "num_ddim_steps=3,4")
    names = [[(call[1][0].rpartition("mine-")[2], call[4]) for call in calls] for calls in ran]
    first, second = "num_train_steps=1-num_ddim_steps", "num_train_steps=2-num_ddim_steps"
    assert [name for name, _ in names[0]] == [f"{first}=3", f"{second}=3"]
    assert [parent.name for _, parent in names[0]] == [f"mine-{name}" for name, _ in names[0]]
    assert [(n, parent.name) for n, parent in names[1]] == [
        (f"{first}=4", f"mine-{first}=3"),
        (f"{second}=4", f"mine-{second}=3"),
    ]


def test_combinations_of_numbers_words_and_lists():
    found = combinations(["guidance_scale=2,4.5", "seed=0", "edits=[a, b],[c]"])
    assert len(found) == 4
    assert found[1] == {"guidance_scale": "2", "seed": "0", "edits": "[c]"}
    assert combinations(["mask=auto,none"]) == [{"mask": "auto"}, {"mask": "none"}]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (["seed"], RunFolderError, "write --set key=value,value"),
        (["seed=1,[2"], ProfileError, "seed = '\\[2'"),
        (["seed=1"], RunFolderError, "nothing to sweep"),
        ([], RunFolderError, "nothing to sweep"),
        (["seed=1,1"], RunFolderError, "nothing to sweep"),
        (["sed=1,2"], ProfileError, "did you mean seed"),
        (["seed=1,-2"], ProfileError, "seed = -2: allowed is from 0"),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_nothing_runs(road, settings, error, words):
    with pytest.raises(error, match=words):
        go(road, *settings)
    assert not (road.parent / "runs").exists()


def test_a_cluster_that_is_not_there(road):
    with pytest.raises(ValueError, match=r"submitit|no srun on this machine"):
        sweep(road, ["seed=1,2"], "slurm")
