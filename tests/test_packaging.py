"""What is written twice is in step; nothing names an index, a machine or a secret place."""

import os
import re
import shutil
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prism_nb import __version__
from prism_nb.params import known_keys, load_profile

SKIPPED = {".git", ".venv", "runs", "build", "dist", "__pycache__", "data", "shared"}
SKIPPED |= {
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "prism_nb.egg-info",
}
TEXT = {".py", ".toml", ".txt", ".yml", ".yaml", ".md", ".cff", ".ipynb", ".css", ".json", ""}
# Assembled here, so that this file does not hold what it looks for.
UNWANTED = ["index" + "-url", "extra" + "-index", "find" + "-links", "/simp" + "le/", "/ho" + "me/"]
UNWANTED += ["pypi" + ".org", "download." + "pytorch", "conda.anaconda" + ".org", "/wo" + "rk/"]


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_every_requirement_is_pinned_inside_its_range(project, pins):
    extras = chain.from_iterable(project["optional-dependencies"].values())
    for need in map(Requirement, chain(project["dependencies"], extras)):
        pin = pins[canonicalize_name(need.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert need.specifier.contains(exact.version), f"{need} and {pin}"


def test_every_constraint_is_one_exact_version(pins):
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins.values())
    assert not any(pin.url for pin in pins.values())


def test_environment_yml_is_in_step(root, project):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    python, *_, pip = environment["dependencies"]
    assert environment["name"] == project["name"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(
        python.removeprefix("python=") + ".0"
    )
    # Everything else comes from pyproject.toml in the versions of constraints.txt.
    assert pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    assert "test" in project["optional-dependencies"]


def test_the_version_is_written_once(root, project):
    assert project["dynamic"] == ["version"]
    assert f"version: {__version__}" in (root / "CITATION.cff").read_text()
    assert f"## {__version__}" in (root / "CHANGELOG.md").read_text()


def texts(root):
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not SKIPPED & set(parts) and path.suffix in TEXT:
            yield path, path.read_text(encoding="utf-8", errors="ignore")


def test_no_index_address_and_no_path_of_a_machine(root):
    for path, text in texts(root):
        for word in UNWANTED:
            assert word not in text, f"{path} holds {word}"


@pytest.mark.parametrize("name", ["smoke", "phantom", "real", "chexpert"])
def test_profiles_are_valid_and_every_key_has_a_remark(root, name):
    path = root / "params" / f"{name}.yaml"
    values = load_profile(path)
    assert values["run_dir"] == f"runs/{name}"
    for line in path.read_text().splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"  # \S|\" # \S", line), line


def test_chexpert_is_the_paper(root):
    values = load_profile(root / "params" / "chexpert.yaml")
    paper = {"image_size": 512, "uncertain": "ones", "views": "frontal", "template": "listing1"}
    paper |= {
        "learning_rate": 1e-5,
        "train_batch_size": 8,
        "accumulation": 4,
        "guidance_scale": 7.5,
    }
    paper |= {"num_ddim_steps": 50, "s_clip_min": 0.1, "test_share": 0.15, "val_share": 0.15}
    assert {key: values[key] for key in paper} == paper
    assert set(values) <= set(known_keys())


def test_make_alone_lists_the_targets(root):
    listed = subprocess.run(["make"], cwd=root, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "lab", "lint", "clean"):
        assert f"make {target} " in listed


@pytest.fixture
def clone(root, tmp_path):
    """A folder with the Makefile and a stand-in for Python that only writes down its calls."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder)
    python = folder / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> calls\n'
        'case "$1 $2" in "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac\n'
        'case "$1 $2" in "-m pip") exit "${PIP:-0}";; esac\n'
    )
    python.chmod(0o755)
    return folder


def install(clone: Path, *settings: str) -> tuple[int, str, list[str]]:
    """Ask make for the installation: exit code, what it printed, what Python was asked to do."""
    (clone / "calls").write_text("")
    command = ["make", "PYTHON=./python", *settings, ".venv/.ready"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, (clone / "calls").read_text().splitlines()


def test_installation_happens_once_and_is_repeated_when_cut_short(clone):
    code, said, calls = install(clone, "PIP=1")
    assert code == 2
    assert "6 GB" in said
    code, said, calls = install(clone)
    assert code == 0
    assert [call.split()[1] for call in calls] == ["venv", "pip"]  # half a .venv is made anew
    assert "--clear" in calls[0]
    assert "-c constraints.txt -e .[test]" in calls[1]
    code, said, calls = install(clone)
    assert (code, calls) == (0, [])
    os.utime(clone / ".venv" / ".ready", (0, 0))  # older than constraints.txt on any clock
    code, said, calls = install(clone)
    assert [call.split()[1] for call in calls] == ["pip"]


def test_without_a_fitting_python_make_says_so_in_one_line(clone):
    code, said, _ = install(clone, "PYTHON=")
    assert code == 2
    assert "Python 3.11, 3.12 or 3.13 is needed and none was found" in said
