"""Whole files or none."""

import json
import os
import platform
import resource
import subprocess
import sys

import numpy as np
import pytest

from prism_nb.files import (
    TEMPORARY,
    abandoned,
    atomic_folder,
    atomic_path,
    locked,
    plain,
    read_json,
    sha256_file,
    write_json,
    write_text,
)


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "deep" / "a file.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as partial:
        partial.write_text("half") and 1 / 0
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["a file.txt"]


def test_the_temporary_file_is_hidden_beside_the_target_with_its_suffix(tmp_path):
    with atomic_path(tmp_path / "x.npz") as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".npz"
        assert partial.name.startswith(".")
        np.savez(partial, a=np.zeros(2))
    assert np.load(tmp_path / "x.npz")["a"].shape == (2,)


def test_a_temporary_name_says_whether_its_writer_is_gone(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    with atomic_path(tmp_path / "x.safetensors") as partial:
        partial.touch()
        name = partial.name
    gone = name.replace(f"-{os.getpid()}-", f"-{int(done.stdout)}-")
    assert len(name) < 50
    assert not abandoned(name)
    assert abandoned(gone)
    assert abandoned(f"{TEMPORARY}0123456789ab.npz")  # of an older version
    assert not abandoned("x.npz")
    monkeypatch.setattr(platform, "node", lambda: "another machine")
    assert not abandoned(gone)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "metrics.json", {"old": 1})
    script = (
        "import sys; from prism_nb.files import write_text; write_text(sys.argv[1], 'x' * 9999)"
    )

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, "-B", "-c", script, str(path)]
    done = subprocess.run(command, preexec_fn=small_disk, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert read_json(path) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    for number in (1, 2):
        with atomic_folder(folder) as partial:
            (partial / f"{number}.txt").write_text("x")
    assert [file.name for file in folder.iterdir()] == ["2.txt"]
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as partial:
        (partial / f"{1 / 0}").mkdir()
    assert [file.name for file in folder.iterdir()] == ["2.txt"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_json_is_strict_sorted_and_takes_numpy(tmp_path):
    value = {
        "b": np.float32(0.5),
        "a": [np.nan, np.inf, np.int64(3), np.bool_(True)],
        "p": tmp_path,
    }
    path = write_json(tmp_path / "x.json", value)
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": [None, None, 3, True], "b": 0.5, "p": tmp_path.as_posix()}
    assert list(strict) == ["a", "b", "p"]
    assert plain(np.arange(3)) == [0, 1, 2]
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain(object())


def test_damaged_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json is no readable JSON"):
        read_json(path)


def test_sha256(tmp_path):
    path = write_text(tmp_path / "x", "abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea")


def test_a_lock_is_held_once_and_freed(tmp_path):
    with locked(tmp_path / ".lock") as first, locked(tmp_path / ".lock") as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / ".lock") as third:
        assert third
