"""The command line: what it prints, and its exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from prism_nb import doctor
from prism_nb.cli import app
from prism_nb.files import write_json, write_text
from prism_nb.images import load_film, save_png


def call(*arguments):
    """Exit code, standard output and error output of a command."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("what", ["04_edit", "all"])  # less, and more than a pipe's buffer
def test_a_reader_that_has_read_enough_ends_it_quietly(what):
    command = [sys.executable, "-m", "prism_nb.cli", "params", what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 1


def test_alone_it_shows_help():
    code, said, _ = call()
    assert code == 0
    for command in ("run", "status", "params", "report", "edit", "benchmark", "doctor"):
        assert f"  {command} " in said
    for command in ("edit-cohort", "sweep", "plan"):
        assert f"  {command} " in said


def test_help_of_edit_says_what_its_caption_must_name():
    assert "T must name every finding that the film shows" in call("edit", "--help")[1]


def test_params_lists_type_default_help_and_what_is_allowed():
    code, said, _ = call("params", "02_finetune")
    assert code == 0
    assert "learning_rate: float = 1e-05" in said
    assert "[above 0, up to 1]" in said
    assert "fp32 or bf16" in said
    assert call("params")[1].count("run_dir") == 9


@pytest.mark.parametrize(
    ("profile", "further", "words"),
    [
        ("seed: 1\nseed: 2\n", [], "seed stands on line 1 and 2"),
        ("num_ddim_step: 5\n", [], "did you mean num_ddim_steps?"),
        ("num_ddim_steps: 0\n", [], "num_ddim_steps = 0: allowed is from 1, up to 999"),
        ("seed: 1\n", ["--only", "07"], "there is no notebook 07"),
        ("seed: 1\n", ["--only", "04", "--from", "05"], "exclude each other"),
        ("seed: 1\n", ["--set", "seed"], "write --set key=value"),
        ("seed: 1\n", ["--name", "a/b"], "no plain folder name"),
        ("seed: 1\n", ["--notebooks", "/nowhere"], "01_caption.ipynb is missing"),
    ],
)
def test_bad_usage_is_exit_2_and_one_line(tmp_path, profile, further, words):
    path = write_text(tmp_path / "mine.yaml", profile)
    code, said, error = call("run", path, *further)
    assert (code, said) == (2, "")
    assert words in error
    assert error.startswith("prism-nb: ")
    assert error.count("\n") == 1


def test_usage_that_typer_refuses_is_exit_2_too(tmp_path):
    assert call("run")[0] == 2
    assert call("run", tmp_path / "none.yaml")[0] == 2
    assert call("fly")[0] == 2
    assert call("status", tmp_path)[0] == 2
    assert call("report", tmp_path)[0] == 2


def test_a_foreign_folder_is_left_alone(tmp_path):
    path = write_text(tmp_path / "thesis" / "mine.yaml", "seed: 1\n")
    books = tmp_path / "notebooks"
    for name in ("01_caption", "02_finetune", "03_invert", "04_edit", "05_evaluate", "06_augment"):
        write_text(books / f"{name}.ipynb", "{}")
    code, _, error = call("run", path, "--set", f"run_dir={path.parent}", "--notebooks", books)
    assert code == 2
    assert "is no run folder (it holds mine.yaml, and" in error
    assert [each.name for each in path.parent.iterdir()] == ["mine.yaml"]


def test_status_says_what_stands_and_why_not(tmp_path, make_notebook):
    for name in ("01_caption", "02_finetune", "03_invert", "04_edit", "05_evaluate", "06_augment"):
        make_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "seed: int = 0")
    write_json(tmp_path / "run" / "manifest.json", {"profile": "mine", "steps": {}})
    code, said, _ = call("status", tmp_path / "run", "--notebooks", tmp_path / "notebooks")
    assert code == 0
    assert "03_invert       to do       first time" in said


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A project with a run whose manifest is damaged, and one that is whole."""
    monkeypatch.setenv("PRISM_NB_ROOT", str(tmp_path))
    write_text(tmp_path / "runs" / "bad" / "manifest.json", "{")
    write_json(tmp_path / "runs" / "good" / "manifest.json", {"profile": "mine", "steps": {}})
    return tmp_path / "runs"


def test_a_damaged_run_is_a_line_among_the_others(runs):
    code, said, error = call("status")
    assert (code, error) == (1, "")
    assert f"unreadable      {runs}/bad/manifest.json is no readable JSON" in said
    assert "03_invert       to do" in said.partition(f"{runs}/good")[2]
    for command in ("status", "report"):
        code, said, error = call(command, runs / "bad")
        assert (code, error.count("\n")) == (2, 1)
        assert "manifest.json is no readable JSON" in error
    assert call("report", runs / "good")[0] == 0


def test_the_news_is_the_notebook_that_failed_not_its_report(tmp_path, monkeypatch):
    from prism_nb import execute, report

    def fail(*_):
        raise execute.StepFailed("03_invert failed in cell 1 of 2: no luck")

    monkeypatch.setattr(execute, "run_job", fail)
    monkeypatch.setattr(report, "write_report", lambda *_: {}["no such part"])
    code, _, error = call("run", write_text(tmp_path / "mine.yaml", "seed: 1\n"))
    assert (code, error) == (1, "prism-nb: 03_invert failed in cell 1 of 2: no luck\n")


@pytest.fixture
def film(tmp_path):
    """A smooth film, wider than high, on disk."""
    y, x = np.mgrid[:80, :96] / 96
    save_png(tmp_path / "mine.png", (127 + 100 * np.sin(5 * x) * np.cos(4 * y)).astype(np.uint8))
    return tmp_path / "mine.png"


def test_edit_writes_film_mask_and_difference_and_says_how(film, random_base):
    out = film.with_name("made.png")
    words = ["--from", "chest x-ray showing edema", "--to", "chest x-ray showing a stent"]
    given = ["--model", random_base, "--steps", 2, "--guidance", 3, "--out", out]
    code, said, error = call("edit", film, *words, *given)
    assert code == 0, error
    assert "size          given 96 x 80 px, edited and written at 64 x 64 px, the model's\n" in said
    assert "words         gone: edema; new: a stent\n" in said
    assert "takes the map of" not in said
    code, said, error = call("edit", film, *words, *given, "--verbose")
    for line in ("takes the map of", "(gone)", "S_CLIP", "mask ", f"wrote         {out}"):
        assert line in said
    assert "stent (4 tokens)        none: keeps its own" in said  # a word, not its letters
    with Image.open(out) as made, Image.open(film.with_name("made_mask.png")) as mask:
        assert made.size == mask.size == (64, 64)
        assert mask.mode == "1"
        assert "SYNTHETIC" in made.text["Description"]
        assert made.text["T"] == "chest x-ray showing edema"
        how = json.loads(made.text["Recipe"])
        outside = ~np.array(mask)
    assert (how["guidance_scale"], how["num_steps"], how["inversion"]) == (3, 2, "direct")
    with Image.open(film.with_name("made_difference.png")) as difference:
        assert "SYNTHETIC" in difference.text["Description"]
    same = load_film(film, 64, "pad")[outside] == load_film(out, 64)[outside]
    assert same.all(), "outside its mask an edit is the film"


@pytest.mark.parametrize("bits", [8, 16])
def test_edit_writes_dicom_that_refers_to_a_dicom_film_and_copies_nothing(film, random_base, bits):
    pydicom = pytest.importorskip("pydicom")
    from prism_nb.dicom import save_secondary_capture

    source, out = film.with_suffix(".dcm"), film.with_name("made.dcm")
    save_secondary_capture(source, load_film(film, 64), {}, patient="Doe^Jane")
    given = ["--edit", "remove Cardiomegaly", "--model", random_base, "--steps", 1]
    code, said, error = call("edit", source, *given, "--bits", bits, "--out", out)
    assert code == 0, error
    assert f"wrote         {out}" in said
    old, new = pydicom.dcmread(source), pydicom.dcmread(out)
    assert (new.BitsStored, new.ImageType) == (bits, ["DERIVED", "SECONDARY"])
    assert "SYNTHETIC" in new.SeriesDescription
    assert "Doe" not in str(new)
    assert new.SourceImageSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
    how = json.loads(new.ImageComments)
    assert (how["inversion"], how["num_steps"], how["seed"]) == ("direct", 1, 0)
    assert len(how["model_key"]) == 64
    assert how["target"] != how["source"]
    assert "prism_nb" in how["versions"]
    with Image.open(film.with_name("made_mask.png")) as mask:
        outside = ~np.array(mask)
    levels = load_film(film, 64).astype(int) * (2**bits - 1) // 255
    assert (new.pixel_array == levels)[outside].all(), "outside its mask an edit is the film"
    code, _, error = call("edit", film, *given, "--out", out)
    assert code == 0, error
    assert "SourceImageSequence" not in pydicom.dcmread(out)  # of a PNG


def test_edit_writes_png_of_16_bits(film, random_base):
    given = ["--edit", "remove Cardiomegaly", "--model", random_base, "--steps", 1]
    out = film.with_name("made.png")
    code, _, error = call("edit", film, *given, "--bits", 16, "--out", out)
    assert code == 0, error
    with Image.open(out) as made, Image.open(film.with_name("made_mask.png")) as mask:
        assert made.mode == "I;16"
        assert "SYNTHETIC" in made.text["Description"]
        assert "prism_nb" in made.text["Software"]
        how = json.loads(made.text["Recipe"])
        pixels, outside = np.array(made), ~np.array(mask)
    assert len(how["model_key"]) == 64
    assert how["seed"] == 0
    assert (pixels == load_film(film, 64, "pad").astype(int) * 257)[outside].all()
    assert (pixels % 257 != 0).any()  # finer than 8 bits where the edit acted


def test_dicom_without_pydicom_is_refused_before_anything_is_made(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("prism_nb.diffusion.load_model", lambda *_: pytest.fail("loaded"))
    code, _, error = call("edit", film, "--edit", "remove Cardiomegaly", "--out", "x.dcm")
    assert (code, error) == (2, "prism-nb: DICOM needs pydicom: pip install 'prism_nb[dicom]'.\n")


def test_edit_takes_a_run_warns_of_new_words_and_needs_its_model(film, random_base, tmp_path):
    from prism_nb import phantom
    from prism_nb.captions import captions
    from prism_nb.cohort import load_cohort, split_by_patient, write_cohort
    from prism_nb.diffusion import load_model, save_unet

    run = tmp_path / "run"
    cohort = load_cohort(phantom.write_cohort(run / "phantom", 8, 64, seed=1))
    table = split_by_patient(cohort.table, 0.3, 0.2)
    cohort.table = table.assign(caption=captions(table))
    cohort.settings |= {"image_size": 64, "fit": "squash"}
    write_cohort(cohort, run)
    words = ["--from", "chest x-ray", "--to", "chest x-ray showing a stent", "--steps", 1]
    code, _, error = call("edit", film, *words, "--model", run)
    assert code == 2
    assert "has no model yet: run 02_finetune" in error
    save_unet(load_model(str(random_base), device="cpu"), run / "model")
    out = tmp_path / "new" / "it.png"
    code, said, error = call("edit", film, *words, "--model", run, "--out", out)
    assert code == 0, error
    assert "prism-nb: never trained, so of no known effect: " in error
    assert "stent" in error
    assert "paper's 0.1, but never trained: a, stent\n" in said
    assert out.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--from and --to, or --edit and one of: remove Support Devices;"),
        (["--from", "chest x-ray"], "--from and --to, or --edit"),
        (["--edit", "remove devices"], "there are: remove Support Devices; remove"),
        (["--edit", "remove Cardiomegaly", "--to", "x"], "give either it or both of those"),
        (["--edit", "remove Cardiomegaly", "--out", "x.jpg"], "in .png or .dcm"),
        (["--edit", "remove Cardiomegaly", "--bits", 12], "--bits 12: it must be 8 or 16"),
        (["--edit", "remove Cardiomegaly", "--model", "nowhere"], "no such folder; give a run,"),
        (["--edit", "remove Cardiomegaly", "--preset", "prisma"], "one of default, prism, sdedit"),
        (["--edit", "remove Cardiomegaly", "--method", "dirct"], "one of ddim, fixed_point"),
        (["--edit", "remove Cardiomegaly", "--guidance", 99], "a number from 0 to 50"),
        (["--edit", "remove Cardiomegaly", "--steps", 0], "--steps 0: it must be"),
    ],
)
def test_what_edit_cannot_do_is_exit_2_and_one_line(film, random_base, given, words):
    model = [] if "--model" in given else ["--model", random_base]
    code, _, error = call("edit", film, *given, *model)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1


def test_wrong_names_paths_and_numbers_are_said_before_the_slow_imports(film):
    script = f"""
import sys
from typer.testing import CliRunner
from prism_nb.cli import app
edit = ["edit", {str(film)!r}, "--edit", "remove Cardiomegaly"]
for given in (["edit", "nowhere.png"], edit[:2], edit[:3] + ["lumps"], edit + ["--preset", "x"],
              edit + ["--guidance", "99"], edit + ["--steps", "0"], edit + ["--model", "nowhere"],
              ["plan", "nowhere.yaml"], ["status", "nowhere"]):
    assert CliRunner().invoke(app, given).exit_code == 2, given
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers"} & set(run.stdout.split())


def test_a_film_that_cannot_be_read_or_would_be_overwritten_is_named(film, random_base, tmp_path):
    name, model = ["--edit", "remove Cardiomegaly"], ["--model", random_base]
    code, _, error = call("edit", tmp_path / "none.png", *name, *model)
    assert (code, error.count("\n")) == (2, 1)
    assert "there is no such file" in error
    code, _, error = call("edit", film, *name, "--out", film)
    assert code == 2
    assert "is the film itself" in error
    mask = film.rename(film.with_name("other_mask.png"))  # as the mask of other.png is called
    code, _, error = call("edit", mask, *name, "--out", film.with_name("other.png"))
    assert code == 2
    assert "other_mask.png is the film itself" in error


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("folder.png", "folder.png is a folder"),
        ("half.png", "half_mask.png is a folder"),
        ("file/deep/it.png", "no file can be written in"),
        ("sealed/it.png", "no file can be written in"),
    ],
)
def test_where_edit_cannot_write_is_said_before_the_edit(film, monkeypatch, out, words):
    monkeypatch.setattr("prism_nb.diffusion.load_model", lambda *_: pytest.fail("loaded"))
    for name in ("folder.png", "half_mask.png", "sealed"):
        film.with_name(name).mkdir()
    film.with_name("file").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, how: "sealed" not in str(p) and access(p, how))
    out = film.with_name("x").with_name(out.split("/")[0]).joinpath(*out.split("/")[1:])
    code, _, error = call("edit", film, "--edit", "remove Cardiomegaly", "--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"prism-nb: --out {out}: ")
    assert words in error


def test_films_named_by_their_unique_ids_do_not_overwrite_each_other(film):
    from prism_nb.cli import _edited

    assert _edited(film).name == "mine_edited.png"
    for name in ("1.2.840.113619.1001", "1.2.840.113619.1002"):
        assert _edited(film.with_name(name)).name == f"{name}_edited.png"
    assert _edited(film.with_name("1.2.840.1.dcm")).name == "1.2.840.1_edited.png"


def test_a_preset_that_needs_another_method_says_so_as_it_was_given(film):
    given = ["--edit", "remove Cardiomegaly", "--preset", "prism", "--method", "ddim"]
    code, _, error = call("edit", film, *given)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("prism-nb: --preset prism with --method ddim: ")
    assert "null_text" in error


def test_edit_cohort_writes_every_edit_and_continues(tiny_run, tmp_path):
    given = ["--split", "all", "--max-films", 3, "--steps", 2, "--out", tmp_path / "films"]
    given += ["--edits", "remove Support Devices, add Support Devices"]
    code, said, error = call("edit-cohort", tiny_run, *given)
    assert code == 0, error
    assert f"wrote         {tmp_path}/films/edits.parquet" in said
    assert "Support Devices" in said
    assert call("edit-cohort", tiny_run, *given)[1] == said
    code, _, error = call("edit-cohort", tiny_run, "--preset", "prisma", *given)
    assert (code, error.count("\n")) == (2, 1)
    code, _, error = call("edit-cohort", tiny_run, "--format", "jpeg", *given)
    assert (code, error.count("\n")) == (2, 1)
    assert "must be one of png, png16, dicom" in error
    assert call("edit-cohort", tmp_path)[2].endswith("has no model yet: run 02_finetune in it\n")


def test_a_dead_shard_and_a_failed_run_are_exit_1(tiny_run, tmp_path, monkeypatch):
    from prism_nb import shards, sweep
    from prism_nb.jobs import JobsDied

    def die(*_, **__):
        raise JobsDied("shard 2 of 2 died: killed; the same command goes on")

    monkeypatch.setattr(shards, "edit_cohort", die)
    assert call("edit-cohort", tiny_run)[::2] == (1, f"prism-nb: {_text(die)}\n")
    table = pd.DataFrame({"run": ["a", "b"], "psnr": [31.0, None]})
    monkeypatch.setattr(sweep, "sweep", lambda *_: (table, tmp_path / "x.csv", "b: unlucky"))
    code, said, error = call("sweep", write_text(tmp_path / "mine.yaml", ""), "--set", "seed=1,2")
    assert (code, error) == (1, "prism-nb: b: unlucky\n")
    assert "psnr 31" in said


def _text(raises):
    with pytest.raises(RuntimeError) as error:
        raises()
    return str(error.value)


def test_plan_says_what_is_needed_and_what_to_change(random_base, tmp_path):
    profile = write_text(tmp_path / "mine.yaml", f"base_model: {random_base}\nimage_size: 64\n")
    code, said, error = call("plan", profile, "--gpus", 2)
    assert code == 0, error
    for line in ("160 films of 64 px, 2 GPUs", "  training ", "  latents ", "  06_augment "):
        assert line in said
    assert said.endswith("To fit into 80 GB: nothing has to change\n")
    code, said, error = call("plan", profile, "--gpus", 3)
    assert (code, error.count("\n")) == (2, 1)
    assert "give a multiple of 3" in error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["sweep", "--set", "seed=1"], "nothing to sweep"),
        (["sweep", "--set", "sed=1,2"], "did you mean seed?"),
        (["sweep", "--set", "seed=1,2", "--executor", "ray"], "must be local or slurm"),
        (["sweep", "--set", "seed=1,2", "--slurm", "x"], "write --slurm key=value"),
        (["plan", "--set", "csv=/nowhere/films.csv"], "give --films"),
    ],
)
def test_what_a_profile_cannot_is_exit_2_and_one_line(tmp_path, given, words):
    command, *further = given
    code, _, error = call(command, write_text(tmp_path / "mine.yaml", "seed: 1\n"), *further)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1


def test_doctor_passes_here_and_says_how_to_fix_what_lacks(monkeypatch):
    code, said, _ = call("doctor")
    assert tuple(
        word
        for word in ("python", "packages", "device", "memory", "disk", "kernel")
        if word in said
    ) == ("python", "packages", "device", "memory", "disk", "kernel")
    assert code == (1 if "MISSING" in said else 0)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["torch>=99", "nosuch>=1"])
    code, said, _ = call("doctor")
    assert code == 1
    assert 'python -m pip install "torch>=99"' in said
    assert "not installed, needs >=1" in said


@pytest.mark.parametrize("text", ["{", "{}", '{"argv": ["/nowhere/python"], "display_name": ""}'])
def test_doctor_survives_a_kernel_that_is_gone_or_damaged(tmp_path, monkeypatch, text):
    write_text(tmp_path / "kernels" / "python3" / "kernel.json", text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = doctor._kernel()
    assert not check.good
    assert "ipykernel install" in check.fix
    assert "\n" not in check.found
