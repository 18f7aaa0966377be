"""Checkpoints: whole or not at all, of one training only, the two newest kept."""

import pytest
import torch
from safetensors.torch import save_file

from prism_nb import checkpoints
from prism_nb.checkpoints import Checkpoints, newest_first
from prism_nb.files import TEMPORARY


def tensors(value):
    return {"weights": torch.full((3,), float(value)), "step": torch.tensor(float(value))}


def names(folder):
    return [path.name for path in newest_first(folder)]


def test_what_is_saved_comes_back_and_two_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, "key")
    for step in (5, 10, 15):
        kept.save(step, tensors(step))
    assert names(tmp_path) == ["step-00000015", "step-00000010"]
    for last_step, found in ((99, 15), (14, 10)):
        loaded = Checkpoints(tmp_path, "key").load(last_step)
        assert {name: t.tolist() for name, t in loaded.items()} == {
            "weights": [found] * 3,
            "step": found,
        }
    assert Checkpoints(tmp_path, "key").load(9) is None


def test_another_key_is_another_training_and_gives_way(tmp_path):
    Checkpoints(tmp_path, "old").save(20, tensors(20))
    other = Checkpoints(tmp_path, "new")
    assert other.load(99) is None
    assert names(tmp_path) == ["step-00000020"]  # not before there is a new one
    other.save(5, tensors(5))
    assert names(tmp_path) == ["step-00000005"]


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, "key")
    kept.save(5, tensors(5))

    def full(content, path):
        save_file(content, path)
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        kept.save(10, tensors(10))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    (tmp_path / f"{TEMPORARY}0123").mkdir()
    (tmp_path / "tensorboard").mkdir()
    Checkpoints(tmp_path, "key").save(5, tensors(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "tensorboard"]


def test_a_folder_that_is_not_there_has_none(tmp_path):
    assert Checkpoints(tmp_path / "none", "key").load(9) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"key": "key", "step": "one"}'])
def test_a_damaged_description_is_passed_over(tmp_path, caplog, text):
    kept = Checkpoints(tmp_path, "key")
    kept.save(5, tensors(5))
    kept.save(10, tensors(10))
    (tmp_path / "step-00000010" / "checkpoint.json").write_text(text)
    assert Checkpoints(tmp_path, "key").load(99)["step"] == 5
    assert "is damaged" in caplog.text
