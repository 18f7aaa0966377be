"""The command line: what it prints, and its exit codes."""

import pytest
from typer.testing import CliRunner

from prism_nb import doctor
from prism_nb.cli import app
from prism_nb.files import write_json, write_text


def call(*arguments):
    """Exit code, standard output and error output of a command."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_alone_it_shows_help():
    code, said, _ = call()
    assert code == 0
    for command in ("run", "status", "params", "report", "doctor"):
        assert f"  {command} " in said


def test_params_lists_type_default_help_and_what_is_allowed():
    code, said, _ = call("params", "02_finetune")
    assert code == 0
    assert "learning_rate: float = 1e-05" in said
    assert "[above 0, up to 1]" in said
    assert "fp32 or bf16" in said
    assert call("params")[1].count("run_dir") == 6


@pytest.mark.parametrize(
    ("profile", "further", "words"),
    [
        ("seed: 1\nseed: 2\n", [], "seed stands on line 1 and 2"),
        ("num_ddim_step: 5\n", [], "did you mean num_ddim_steps?"),
        ("num_ddim_steps: 0\n", [], "num_ddim_steps = 0: allowed is from 1, up to 1000"),
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
    assert "is no run folder (it holds mine.yaml)" in error
    assert [each.name for each in path.parent.iterdir()] == ["mine.yaml"]


def test_status_says_what_stands_and_why_not(tmp_path, make_notebook):
    for name in ("01_caption", "02_finetune", "03_invert", "04_edit", "05_evaluate", "06_augment"):
        make_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "seed: int = 0")
    write_json(tmp_path / "run" / "manifest.json", {"profile": "mine", "steps": {}})
    code, said, _ = call("status", tmp_path / "run", "--notebooks", tmp_path / "notebooks")
    assert code == 0
    assert "03_invert     to do       first time" in said


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
