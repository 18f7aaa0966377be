"""Executing notebooks: what runs, what is skipped, what counts as success, what a kill leaves.

The notebooks are small ones made here; environment variables make them fail in chosen ways, so
that their code, and with it what counts as changed, stays the same.
"""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from prism_nb.cli import app
from prism_nb.execute import (
    Progress,
    StepFailed,
    _portable,
    chosen_steps,
    prepare,
    run_job,
    states,
)
from prism_nb.files import atomic_folder, locked, read_json, write_text
from prism_nb.params import ParamError, ProfileError
from prism_nb.run import RunFolderError, record_path

STEPS = ["01_caption", "02_finetune", "03_invert"]
START = "from prism_nb.run import Run\nrun = Run({!r}, globals())"
COHORT = """
from prism_nb.files import write_json
write_json(run.path("cohort.json"), {"films": run.params.max_films})
"""
# Training that goes on where it stopped, one file a step, as slow as the test likes.
TRAIN = """
import os, time
from prism_nb.files import read_json, write_json
films = read_json(run.need("cohort.json"))["films"]
for step in range(run.params.num_train_steps):
    path = run.path(f"model/{step}.json")
    if not path.exists():
        before = read_json(run.path(f"model/{step - 1}.json"))["weight"] if step else films
        time.sleep(float(os.environ.get("SLOW", 0)))
        write_json(path, {"weight": 0.9 * before + run.params.seed})
run.save_metrics(weight=read_json(path)["weight"])
"""
INVERT = """
import os, sys
weight = read_json(run.need("model") / "3.json")["weight"] if True else None
trouble = os.environ.get("TROUBLE", "")
"""
TROUBLE = """
if trouble == "raise":
    raise RuntimeError("no luck\\nsecond line")
if trouble == "kill":
    os.kill(os.getpid(), 9)
if trouble == "exit":
    sys.exit(0)
with atomic_path(run.path("inversions/a.bin")) as partial:
    partial.write_bytes(b"x" * (3_000_000 if trouble == "disk" else 3))
"""
FINISH = 'if trouble != "unfinished":\n    run.finish()'
LATE = 'assert trouble != "late"'


@pytest.fixture(scope="module")
def road(tmp_path_factory, make_notebook):
    """A folder with spaces that holds three notebooks and a profile of its own."""
    folder = tmp_path_factory.mktemp("the road") / "with spaces"
    books = folder / "notebooks"
    common = 'run_dir: str = "runs/smoke"\nseed: int = 0\n'
    make_notebook(
        books / "01_caption.ipynb",
        f"{common}max_films: int = 0",
        START.format("01_caption"),
        COHORT,
        "run.finish()",
    )
    make_notebook(
        books / "02_finetune.ipynb",
        f"{common}num_train_steps: int = 24",
        START.format("02_finetune"),
        TRAIN,
        "run.finish()",
    )
    make_notebook(
        books / "03_invert.ipynb",
        f"{common}num_ddim_steps: int = 10",
        "from prism_nb.files import atomic_path, read_json\n" + START.format("03_invert"),
        INVERT,
        TROUBLE,
        FINISH,
        LATE,
    )
    profile = f'run_dir: "{folder}/runs/mine"\nseed: 1\nmax_films: 5\nnum_train_steps: 4\n'
    write_text(folder / "mine.yaml", profile)
    return folder


def weight(films=5, seed=1, steps=4):
    value = films
    for _ in range(steps):
        value = 0.9 * value + seed
    return value


def go(road, *settings, steps=STEPS, run="mine", force=False):
    """Run the road and return the notebooks that were executed."""
    settings = (*settings, f"run_dir={road}/runs/{run}")
    job = prepare(road / "mine.yaml", settings=settings, notebooks=road / "notebooks")
    said = io.StringIO()
    run_job(job, steps, force, said)
    return [line.split()[0] for line in said.getvalue().splitlines() if " done " in line]


@pytest.fixture
def done(road):
    """The run folder, with everything up to date."""
    go(road)
    return road / "runs" / "mine"


def test_all_run_once_and_then_none(road):
    assert go(road) == STEPS
    folder = road / "runs" / "mine"
    assert read_json(folder / "metrics.json") == {"02_finetune": {"weight": weight()}}
    assert sorted(p.name for p in (folder / "notebooks").iterdir()) == [f"{n}.ipynb" for n in STEPS]
    began = time.monotonic()
    assert go(road) == []
    assert time.monotonic() - began < 5
    rows = {row["notebook"]: row["state"] for row in states(folder, road / "notebooks")}
    assert [rows[name] for name in STEPS] == ["done"] * 3


def test_a_parameter_runs_what_depends_on_it(road, done):
    assert go(road, "num_ddim_steps=7") == ["03_invert"]
    assert go(road, "num_ddim_steps=7", "guidance_scale=3") == []
    assert go(road, steps=["03_invert"]) == ["03_invert"]


def test_a_damaged_output_is_made_again_and_equal_bytes_stop_there(road, done):
    (done / "model" / "2.json").write_text("{}")
    assert go(road) == ["02_finetune"]
    assert read_json(done / "metrics.json")["02_finetune"] == {"weight": weight()}
    assert go(road) == []


def test_force_runs_what_is_unchanged(road, done):
    assert go(road, steps=["01_caption"], force=True) == ["01_caption"]


@pytest.fixture(scope="module")
def troubled(road):
    """A run folder in which the first two notebooks are done."""
    go(road, steps=STEPS[:2], run="troubled")
    return road / "runs" / "troubled"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("raise", "failed in cell 5 of 7: RuntimeError: no luck second line"),
        ("kill", "failed in cell 5 of 7: the kernel died"),
        ("exit", "failed in cell 5 of 7: SystemExit: 0; a cell may not end the kernel"),
        ("unfinished", "failed in cell 7 of 7: the notebook ended without run.finish()"),
        ("late", "failed in cell 7 of 7: AssertionError"),
    ],
)
def test_only_a_whole_notebook_is_a_success(road, troubled, monkeypatch, trouble, words):
    monkeypatch.setenv("TROUBLE", trouble)
    with pytest.raises(StepFailed) as error:
        go(road, steps=["03_invert"], run="troubled")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not record_path(troubled, "03_invert").exists()
    left = troubled / "notebooks" / "03_invert.ipynb"
    assert str(left) in str(error.value)
    assert ('"ename": "RuntimeError"' in left.read_text()) == (trouble == "raise")
    (row,) = [r for r in states(troubled, road / "notebooks") if r["notebook"] == "03_invert"]
    assert row["state"] == "unfinished"


def test_after_a_failure_only_the_rest_runs(road, done):
    record_path(done, "02_finetune").unlink()
    assert go(road) == ["02_finetune"]


def command(road, run, *further):
    settings = ["--set", f"run_dir={road}/runs/{run}", "--notebooks", str(road / "notebooks")]
    return [
        sys.executable,
        "-m",
        "prism_nb.cli",
        "run",
        str(road / "mine.yaml"),
        *settings,
        *further,
    ]


def test_kill_9_and_the_same_command_ends_with_the_same_metrics(road):
    go(road, steps=STEPS[:1], run="killed")
    folder = road / "runs" / "killed"
    process = subprocess.Popen(
        command(road, "killed", "--only", "02"),
        env=os.environ | {"SLOW": "0.3"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while not (folder / "model" / "1.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not record_path(folder, "02_finetune").exists()
    kept = (folder / "model" / "1.json").stat().st_mtime_ns
    assert go(road, steps=STEPS[:2], run="killed") == ["02_finetune"]
    assert (folder / "model" / "1.json").stat().st_mtime_ns == kept  # it went on, not over
    assert read_json(folder / "metrics.json")["02_finetune"] == {"weight": weight()}


@contextlib.contextmanager
def small_disk():
    """Let this process and its kernels write files of at most a megabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_exit_1_and_nothing_half_written_counts(road, done, monkeypatch):
    (done / "inversions" / "a.bin").unlink()
    monkeypatch.setenv("TROUBLE", "disk")
    with small_disk():
        result = CliRunner().invoke(app, command(road, "mine", "--only", "03")[3:])
    assert result.exit_code == 1
    assert result.stderr.startswith("prism-nb: 03_invert failed in cell 5 of 7: OSError")
    assert result.stderr.count("\n") == 1
    assert not list((done / "inversions").iterdir())
    assert not record_path(done, "03_invert").exists()
    report = (done / "report" / "index.html").read_text()
    assert "OSError" in report
    assert "failed or cut short" in report
    monkeypatch.delenv("TROUBLE")
    assert go(road) == ["03_invert"]


def test_plain_papermill_from_any_folder(road, tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill")
    monkeypatch.chdir(tmp_path)
    source, run = road / "notebooks" / "01_caption.ipynb", road / "runs" / "plain"
    values = {"run_dir": str(run), "max_films": 2, "guidance_scale": 3.0}
    papermill.execute_notebook(source, tmp_path / "out.ipynb", values, progress_bar=False)
    assert read_json(run / "cohort.json") == {"films": 2}
    assert record_path(run, "01_caption").exists()


@pytest.mark.parametrize("spec", [[sys.executable, "-c", "exit(3)"], ["/nowhere/python"], "{"])
def test_a_kernel_that_does_not_start_is_a_failed_step(road, tmp_path, monkeypatch, spec):
    about = {"argv": spec, "display_name": "", "language": "python"}
    text = spec if spec == "{" else json.dumps(about)
    write_text(tmp_path / "kernels" / "python3" / "kernel.json", text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="01_caption did not start") as error:
        go(road, steps=["01_caption"], run="dead")
    assert "prism-nb doctor" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_folder_in_use_is_refused(road, done):
    with locked(done / ".lock"), pytest.raises(RunFolderError, match="is in use by another run"):
        go(road)


def test_what_others_write_in_the_run_folder_meanwhile_is_left_alone(road, done):
    with atomic_folder(done / "counterfactuals" / "parts" / "a") as partial:
        write_text(partial / "film.png", "half of a batch")
        assert go(road) == []
    assert (done / "counterfactuals" / "parts" / "a" / "film.png").exists()


def test_a_path_that_is_another_parameters_word_is_a_path(road, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    job = prepare(road / "mine.yaml", settings=("image_root=train", "baseline=train"))
    assert job.values["image_root"] == str(tmp_path / "train")
    assert job.values["baseline"] == "train"
    values = _portable({"image_root": "train", "baseline": "train"}, tmp_path)
    assert values["image_root"] == str(tmp_path / "train")
    assert values["baseline"] == "train"


def test_a_run_folder_of_another_profile_is_refused(road, done):
    write_text(road / "other.yaml", (road / "mine.yaml").read_text())
    job = prepare(road / "other.yaml", notebooks=road / "notebooks")
    with pytest.raises(RunFolderError, match="of the profile mine, not other"):
        run_job(job, STEPS, stream=io.StringIO())


def test_a_missing_notebook_is_named_before_anything_runs(road, tmp_path):
    job = replace(prepare(road / "mine.yaml"), notebooks=tmp_path, folder=tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"01_caption\.ipynb is missing"):
        run_job(job, STEPS, stream=io.StringIO())
    assert not (tmp_path / "run").exists()


def test_settings_and_names(road, tmp_path, monkeypatch):
    write_text(tmp_path / "my films.csv", "path\n")
    monkeypatch.chdir(tmp_path)
    job = prepare(road / "mine.yaml", "fresh", ("csv=my films.csv", "learning_rate=1e-5"))
    assert job.values["csv"] == str(tmp_path / "my films.csv")
    assert job.values["learning_rate"] == 1e-5
    assert job.folder.parts[-2:] == ("runs", "fresh")
    write_text(tmp_path / "bare.yaml", "")
    assert prepare(tmp_path / "bare.yaml").values == {"run_dir": "runs/bare"}
    with pytest.raises(RunFolderError, match="no plain folder name"):
        prepare(road / "mine.yaml", "../elsewhere")
    with pytest.raises(RunFolderError, match="write --set key=value"):
        prepare(road / "mine.yaml", settings=("csv",))
    for key in ("run_dir", "csv"):
        with pytest.raises(ProfileError, match=f"{key} = '~nosuch/x': there is no such user"):
            prepare(road / "mine.yaml", settings=(f"{key}=~nosuch/x",))
    with pytest.raises(ProfileError, match="unknown key sed; did you mean seed"):
        prepare(road / "mine.yaml", settings=("sed=1",))
    with pytest.raises(ProfileError, match="seed = -1: allowed is from 0"):
        prepare(road / "mine.yaml", settings=("seed=-1",))


def test_which_steps():
    assert chosen_steps()[0] == "01_caption"
    assert chosen_steps(only="04") == ["04_edit"]
    assert chosen_steps(start="05_evaluate") == ["05_evaluate", "06_augment"]
    assert chosen_steps()[-1] == "06_augment"
    assert chosen_steps(appendices=True)[6:] == ["A1_vqa", "A2_confounders", "A3_limits"]
    assert chosen_steps(only="A1") == ["A1_vqa"]
    assert chosen_steps(start="A2") == ["A2_confounders", "A3_limits"]
    with pytest.raises(RunFolderError, match="exclude each other"):
        chosen_steps("04", "05")
    with pytest.raises(ParamError, match="there is no notebook 7"):
        chosen_steps("7")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "lines"), [(Terminal(), 2), (io.StringIO(), 2)])
def test_progress_is_a_line_a_notebook(stream, lines):
    progress = Progress(stream)
    progress.line("01_caption", "unchanged")
    progress.start("02_finetune", "first time")
    progress.cell(1, 3)
    progress.cell(3, 3)
    progress.stop("done")
    text = stream.getvalue()
    assert len(text.splitlines()[0:]) >= lines
    assert text.count("\n") == lines
    assert text.rstrip().endswith("(first time)")
    assert ("cell 1 of 3" in text) == stream.isatty()
