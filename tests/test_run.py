"""The run folder as a notebook sees it."""

import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from prism_nb.files import read_json, sha256_file, write_json
from prism_nb.params import ParamError
from prism_nb.run import (
    ROOT_VARIABLE,
    STEPS,
    TOKEN_VARIABLE,
    MissingInput,
    Run,
    project_root,
    record_path,
    resolve_path,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a run"


def start(folder, notebook="03_invert", **values):
    return Run(notebook, {"run_dir": str(folder), "np": np, **values})


def test_parameters_come_from_the_namespace_checked(folder):
    run = start(folder, num_ddim_steps="1e1", seed=7, guidance_scale="another notebook's")
    assert (run.params.num_ddim_steps, run.params.seed, run.params.num_test_films) == (10, 7, 12)
    assert run.folder == folder
    with pytest.raises(ParamError, match="num_ddim_steps = 0: allowed is from 1, up to 999"):
        start(folder, num_ddim_steps=0)


def test_a_relative_run_folder_starts_from_the_project_root_not_from_here(tmp_path, monkeypatch):
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone" / "notebooks")
    assert Run("03_invert", {}).folder == tmp_path / "clone" / "runs" / "smoke"
    monkeypatch.delenv(ROOT_VARIABLE)
    assert (project_root() / "notebooks").is_dir()


def test_paths_are_looked_for_in_the_root_then_here_and_words_stay(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    for place, name in ((root, "both.csv"), (here, "both.csv"), (here, "mine.csv")):
        place.mkdir(exist_ok=True)
        (place / name).touch()
    (here / "phantom").mkdir()
    monkeypatch.chdir(here)
    assert resolve_path("csv", "both.csv", root) == str(root / "both.csv")
    assert resolve_path("csv", "mine.csv", root) == str(here / "mine.csv")
    assert resolve_path("csv", "none.csv", root) == str(root / "none.csv")
    assert resolve_path("csv", "phantom", root) == "phantom"
    assert resolve_path("base_model", "org/model", root) == "org/model"
    assert resolve_path("csv", str(here / "mine.csv"), root) == str(here / "mine.csv")


def test_a_word_has_its_meaning_for_its_own_parameter_alone(tmp_path):
    for name in ("train", "base", "clip", "none", "phantom"):
        (tmp_path / name).mkdir()
        assert resolve_path("image_root", name, tmp_path) == str(tmp_path / name)
    words = {"csv": "phantom", "clip_model": "base", "baseline": "none", "vqa_backend": "clip"}
    for key, word in words.items():
        assert resolve_path(key, word, tmp_path) == word
        assert resolve_path(key, "", tmp_path) == ""


def test_a_key_that_papermill_injected_and_no_notebook_has_is_refused(folder):
    cells = ["", "num_ddim_step = 1", "# Parameters\nseed = 1\nnum_ddim_step = 5\n"]
    with pytest.raises(ParamError, match="unknown key num_ddim_step; did you mean num_ddim_steps"):
        start(folder, In=cells)
    start(folder, In=["# Parameters\nseed = 1\nguidance_scale = 2.0\n"])


def test_a_missing_input_names_the_notebook_to_run(folder):
    run = start(folder)
    with pytest.raises(MissingInput, match=r"model is missing: run notebooks/02_finetune\.ipynb"):
        run.need("model")
    (folder / "model").mkdir(parents=True)
    with pytest.raises(MissingInput, match=r"model is incomplete, 02_finetune did not finish"):
        run.need("model")
    start(folder, "02_finetune").finish()
    assert run.need("model") == folder / "model"
    with pytest.raises(ValueError, match="does not declare that it reads edits"):
        run.need("edits")


def test_a_missing_input_names_the_runs_that_have_it_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "smoke.yaml").touch()
    for name in ("done", "begun"):
        write_json(tmp_path / "runs" / name / "cohort.json", {})
    Run("01_caption", {"run_dir": "runs/done"}).finish()
    with pytest.raises(MissingInput) as error:
        Run("04_edit", {}).need("cohort.json")
    command = "prism-nb run params/smoke.yaml --only 01_caption"
    assert f"({command}); or set run_dir, to a run that has it: runs/done" in str(error.value)
    assert "begun" not in str(error.value)
    assert not (tmp_path / "runs" / "smoke").exists()
    monkeypatch.setenv("PRISM_NB_PROFILE", "smoke")
    with pytest.raises(MissingInput, match=r"params/smoke\.yaml --name begun --only 01_caption"):
        Run("04_edit", {"run_dir": "runs/begun"}).need("cohort.json")


def test_every_input_is_written_by_an_earlier_notebook():
    written = set()
    for step in STEPS.values():
        assert set(step.reads) <= written
        written |= set(step.writes)


def test_the_gan_of_05_is_an_input_of_06():
    assert "baseline" in STEPS["06_augment"].reads


def test_outputs_stay_in_the_run_folder(folder):
    run = start(folder)
    assert run.path("inversions/deep/x.npz").parent.is_dir()
    with pytest.raises(ValueError, match="leaves the run folder"):
        run.path("../elsewhere")


def test_a_table_keeps_an_index_that_says_something(folder):
    run = start(folder)
    counted = pd.DataFrame({"psnr": [1 / 3, np.nan]})
    assert run.save_table(counted, "a").read_text() == 'psnr\n0.33333333\n""\n'
    named = pd.DataFrame({"films": [5]}, index=["Train"])
    assert run.save_table(named, "b").read_text() == ",films\nTrain,5\n"
    assert run.save_table(named, "b") == folder / "tables" / "b.csv"


def test_equal_figures_are_equal_bytes(folder):
    run = start(folder)
    digests = set()
    for _ in range(2):
        figure, axes = plt.subplots(1, 2)
        axes[0].plot([1, 2])
        digests |= {sha256_file(run.save_figure(it, "03_x")) for it in (figure, axes, axes[0])}
        plt.close(figure)
    assert len(digests) == 1
    with pytest.raises(ValueError, match="must start 03_"):
        run.save_figure(figure, "x")
    with pytest.raises(TypeError, match="give Axes or a Figure"):
        run.save_figure([1], "03_x")


def test_metrics_of_notebooks_stand_side_by_side_and_a_new_run_replaces(folder):
    start(folder).save_metrics(old=1)
    run = start(folder)
    run.save_metrics(psnr=np.float32(31.5), floor=np.nan)
    run.save_metrics(n=3)
    start(folder, "04_edit").save_metrics(flip=0.5)
    assert read_json(folder / "metrics.json") == {
        "03_invert": {"psnr": 31.5, "floor": None, "n": 3},
        "04_edit": {"flip": 0.5},
    }


def test_finish_records_what_was_written_with_the_token_of_this_execution(folder, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "abc")
    run = start(folder)
    run.path("inversions/a.bin").write_bytes(b"abc")
    (folder / "inversions" / ".partial-x").write_bytes(b"left behind")
    write_json(run.path("extra.json"), {})
    run.save_metrics(psnr=1.0)
    assert not record_path(folder, "03_invert").exists()
    files = run.finish()
    assert dict(files.values) == {"extra.json": 3, "inversions/a.bin": 3, "metrics.json": 41}
    record = read_json(record_path(folder, "03_invert"))
    assert record["token"] == "abc"
    assert record["outputs"]["inversions/a.bin"][2].startswith("ba7816bf8f01cfea")
    assert list(record["outputs"]) == ["extra.json", "inversions/a.bin"]


@pytest.mark.parametrize(
    "write", [lambda run: run.path("inversions/b.bin"), lambda run: run.save_metrics(psnr=2)]
)
def test_what_is_written_anew_is_no_success_until_it_is_finished(folder, write):
    run = start(folder)
    run.save_table(pd.DataFrame({"n": [1]}), "a")
    run.finish()
    again = start(folder)
    assert record_path(folder, "03_invert").exists()  # a look at it changes nothing
    write(again)
    assert not record_path(folder, "03_invert").exists()
    again.finish()
    again.save_table(pd.DataFrame({"n": [2]}), "a")  # a cell once more, of a notebook that is done
    assert record_path(folder, "03_invert").exists()


def test_provenance_has_no_time_and_no_path(folder):
    made = start(folder, seed=3).provenance()
    assert made["seed"] == 3
    assert made["versions"]["torch"] != "missing"
    assert str(folder) not in str(made)
    assert made == start(folder, seed=3).provenance()


def test_device_auto_is_resolved(folder):
    import torch

    assert start(folder).device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert start(folder, device="cpu").device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ParamError, match="torch finds none; use auto"):
            _ = start(folder, device="cuda").device


def test_a_full_disk_is_not_a_success(folder):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    run = start(folder)
    (folder / "steps").mkdir(parents=True)
    os.symlink("/dev/full", folder / "steps" / "03_invert.json")
    run.finish()  # the rename replaces the link, whatever it pointed at
    assert read_json(record_path(folder, "03_invert"))["notebook"] == "03_invert"


def test_work_is_measured_by_itself():
    def work():
        kept = np.ones(64 * 2**20, np.uint8)  # 64 MiB
        return int(kept[0])

    before = Run.peak_memory()
    result, seconds, most = Run.measure(work)
    assert result == 1
    assert seconds > 0
    assert 0 < most < before + 0.2
