"""Counterfactuals of a cohort: every id once, whatever the shards, also when one is killed."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import huggingface_hub
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prism_nb.cohort import read_cohort
from prism_nb.diffusion import ModelError
from prism_nb.edits import load_edit_films, save_edits
from prism_nb.files import locked, read_json, write_json, write_text
from prism_nb.findings import slug
from prism_nb.images import load_films
from prism_nb.jobs import JobsDied
from prism_nb.shards import (
    FROZEN,
    _weights,
    edit_cohort,
    make_batch,
    make_shard,
    plan_batches,
    read_request,
)

EDITS = ["remove Support Devices", "add Support Devices", "remove Pleural Effusion"]
OWN = {"edits": EDITS, "num_ddim_steps": 2, "edit_batch_size": 2}
SETTINGS = {"split": "all"} | OWN


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run folder of our own, and one thread, as two shards on two cores have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield shutil.copytree(tiny_run, tmp_path_factory.mktemp("cohort") / "run")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """All counterfactuals in one go, by one shard: their folder and table."""
    out = tmp_path_factory.mktemp("whole") / "films"
    return out, edit_cohort(run, out, **SETTINGS)


def test_every_film_gets_every_edit_that_it_can_take_once(run, whole):
    out, made = whole
    table = read_cohort(run).table
    films = {"remove": 1.0, "add": 0.0}
    wanted = set()
    for verb, finding in (name.split(" ", 1) for name in EDITS):
        able = table.loc[table[finding] == films[verb], "film_id"]
        wanted |= set(able + f"/{slug(f'{verb} {finding}')}")
    assert made["id"].is_unique
    assert set(made["id"]) == wanted
    assert pd.read_parquet(out / "edits.parquet").equals(made)
    assert (made["kept"] | (made["reason"] != "")).all()
    assert not list(out.rglob(".partial-*"))
    assert not list(out.rglob("*.pkl"))


def test_films_are_the_originals_outside_the_masks_and_name_no_patient(run, whole):
    out, made = whole
    table = read_cohort(run).table.set_index("film_id")
    root = read_cohort(run).image_root
    films = load_films([root / path for path in table.loc[made["film_id"], "path"]], 64)
    edited = load_edit_films(out, made)
    for film, new, row in zip(films, edited, made.itertuples(), strict=True):
        mask = np.array(Image.open(out / row.mask_path))
        assert (film == new)[~mask].all()
        with Image.open(out / row.path) as png:
            assert "SYNTHETIC" in png.text["Description"]
            assert row.patient_id not in "".join(png.text.values())


def test_a_batch_depends_on_the_order_of_hashes_alone(run):
    request = read_request(run, "all", OWN)
    plan = plan_batches(run, request)
    assert plan.groupby("batch")["film_id"].nunique().max() == 2
    assert plan.groupby("film_id")["batch"].nunique().max() == 1  # one inversion, all its edits
    few = plan_batches(run, request, max_films=4)
    assert set(few["batch"]) <= set(plan["batch"])
    other = plan_batches(run, request | {"preset": "sdedit"})
    assert not set(other["batch"]) & set(plan["batch"])


def test_a_part_made_with_other_weights_or_other_films_is_never_taken_over(
    run, random_base, tmp_path
):
    own, base = shutil.copytree(run, tmp_path / "run"), tmp_path / "base"
    keys = [set(plan_batches(own, read_request(own, "all", OWN))["batch"])]

    def another():
        keys.append(set(plan_batches(own, read_request(own, "all", OWN))["batch"]))
        return not keys[-1] & keys[-2]

    shutil.copytree(random_base, base)
    write_json(own / "model" / "base.json", {"base_model": str(base), "revision": ""})
    assert not another()  # the same weights in another place
    for name in ("vae", "text_encoder", "clip"):
        (path,) = (base / name).glob("*.safetensors")
        path.write_bytes(path.read_bytes() + b"?")
        assert another(), name
    (base / "README.md").write_text("no weights")
    assert not another()
    for change in ({"image_size": 32}, {"fit": "pad"}):
        cohort = read_json(own / "cohort.json")
        write_json(own / "cohort.json", cohort | {"settings": cohort["settings"] | change})
        assert another(), change
    (own / "model" / "unet" / "config.json").write_text("{}")
    assert another()


@pytest.fixture
def own(run, tmp_path):
    """A run with films of its own, which a test may change."""
    own, films = shutil.copytree(run, tmp_path / "run"), tmp_path / "films"
    about = read_json(own / "cohort.json")
    shutil.copytree(own / about["image_root"], films)
    write_json(own / "cohort.json", about | {"image_root": str(films)})
    return own


def test_a_film_that_changed_is_edited_anew_and_its_old_part_goes(own, tmp_path):
    out = tmp_path / "out"
    first = edit_cohort(own, out, max_films=4, **SETTINGS)
    cohort = read_cohort(own)
    paths = cohort.table.set_index("film_id")["path"]
    film = cohort.image_root / paths[first["film_id"][0]]
    os.utime(film, (1, 1))  # the same bytes
    assert edit_cohort(own, out, max_films=4, **SETTINGS).equals(first)
    with Image.open(film) as image:
        image.transpose(Image.FLIP_LEFT_RIGHT).save(film)
    made = edit_cohort(own, out, max_films=4, **SETTINGS)
    assert made["id"].equals(first["id"])
    old, new = (set(table["path"].str.split("/").str[1]) for table in (first, made))
    assert len(old & new) == 1  # the batch of the other films
    assert {part.name for part in (out / "parts").iterdir()} == new


def test_a_shard_stops_where_the_model_is_another_than_was_asked_for(own, tmp_path):
    out, request = tmp_path / "out", read_request(own, "all", OWN)
    out.mkdir()
    plan_batches(own, request, 2).to_parquet(out / "plan.parquet")
    write_json(out / "request.json", request)
    (own / "model" / "note.txt").touch()  # nothing of the weights
    (path,) = (own / "model" / "unet").glob("*.safetensors")
    save_file({name: 0.9 * w for name, w in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"^the model in .*run was replaced .*: give .*again$"):
        make_shard(own, out)
    assert not (out / "parts").exists()


def test_a_base_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--model"
    for name in ("refs/main", *(f"snapshots/{n * 40}/vae/config.json" for n in "ab")):
        write_text(folder / name, "a" * 40)
    assert _weights("someone/model", FROZEN) == "a" * 40
    assert _weights("someone/model", FROZEN, "b" * 40) == "b" * 40
    with pytest.raises(ModelError, match=r"^cannot look up someone/other: [^\n]*$"):
        _weights("someone/other", FROZEN)


def test_parts_of_another_model_go_once_all_is_there_and_those_of_other_settings_stay(
    run, tmp_path, monkeypatch, capsys
):
    few = SETTINGS | {"max_films": 2}
    first = edit_cohort(run, tmp_path, **few)
    old, foreign = (tmp_path / "parts" / name for name in ("00000000-of-another-model", "mine"))
    write_text(old / "rejected.csv", "film_id,reason\n")
    foreign.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("prism_nb.shards.make_batch", _unlucky)
        with pytest.raises(JobsDied):
            edit_cohort(run, tmp_path, **few | {"preset": "sdedit"})
    assert old.is_dir()
    assert not capsys.readouterr().out
    edit_cohort(run, tmp_path, **few | {"preset": "sdedit"})
    assert not old.exists()
    assert foreign.exists()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "  removed       1 batches made with another model, cohort or code"
    assert said[1] == "  kept          1 batches of other settings, for a call with those"
    monkeypatch.setattr("prism_nb.shards.load_tools", lambda *_: pytest.fail("nothing is missing"))
    assert edit_cohort(run, tmp_path, **few).equals(first)


def _unlucky(*_):
    raise ValueError("unlucky")


def test_what_is_finished_is_kept_and_more_films_continue(run, tmp_path, monkeypatch):
    own = tmp_path / "jobs" / "mine.txt"  # a folder of one's own, with another thing in it
    own.parent.mkdir()
    own.touch()
    few = edit_cohort(run, tmp_path, max_films=4, **SETTINGS)
    assert few["film_id"].nunique() == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    more = edit_cohort(run, tmp_path, max_films=6, **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert set(few["id"]) < set(more["id"])
    monkeypatch.setattr("prism_nb.shards.load_tools", lambda *_: pytest.fail("nothing is missing"))
    assert edit_cohort(run, tmp_path, max_films=6, **SETTINGS).equals(more)
    assert own.exists()


def test_a_run_folder_that_was_moved_keeps_what_is_finished(run, tmp_path, monkeypatch):
    first = shutil.copytree(run, tmp_path / "first")
    made = edit_cohort(first, max_films=2, **SETTINGS)
    moved = shutil.move(first, tmp_path / "moved")
    monkeypatch.setattr("prism_nb.shards.load_tools", lambda *_: pytest.fail("nothing is missing"))
    assert edit_cohort(moved, max_films=2, **SETTINGS).equals(made)


def test_a_full_disk_leaves_whole_batches_and_the_same_call_goes_on(run, tmp_path, monkeypatch):
    written = []

    def fill(folder, *given):
        made = save_edits(folder, *given)
        written.append(folder)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return made

    monkeypatch.setattr("prism_nb.shards.save_edits", fill)
    with pytest.raises(OSError, match="No space left"):
        edit_cohort(run, tmp_path, max_films=4, **SETTINGS)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    assert not (tmp_path / "edits.parquet").exists()
    made = edit_cohort(run, tmp_path, max_films=4, **SETTINGS)
    assert len(written) == 3  # the first was kept
    assert made["id"].is_unique


def test_shards_that_outlived_their_command_keep_the_folder(run, tmp_path):
    kept = tmp_path / ".partial-of-a-shard"
    kept.mkdir()
    with (
        locked(tmp_path / ".lock-1"),
        pytest.raises(ValueError, match="in use: shards of an edit-cohort that ended still run"),
    ):
        edit_cohort(run, tmp_path, max_films=2, **SETTINGS)
    assert kept.exists()
    edit_cohort(run, tmp_path, max_films=2, **SETTINGS)
    assert not kept.exists()
    with (
        locked(tmp_path / ".lock-0"),
        pytest.raises(RuntimeError, match="another process makes shard 1"),
    ):
        make_shard(run, tmp_path)


def test_films_of_16_bits_and_dicom_on_request(run, whole, tmp_path):
    out, expected = whole
    made = edit_cohort(run, tmp_path / "fine", max_films=2, format="png16", **SETTINGS)
    with Image.open(tmp_path / "fine" / made["path"][0]) as png:
        assert png.mode == "I;16"
        assert "SYNTHETIC" in png.text["Description"]
    plain = expected.set_index("id").loc[made["id"]]
    films, eight = load_edit_films(tmp_path / "fine", made), load_edit_films(out, plain)
    assert abs(films.astype(int) - eight).max() <= 1
    pydicom = pytest.importorskip("pydicom")
    made = edit_cohort(run, tmp_path / "dicom", max_films=2, format="dicom", **SETTINGS)
    for row, film in zip(made.itertuples(), load_edit_films(tmp_path / "dicom", made), strict=True):
        read = pydicom.dcmread((tmp_path / "dicom" / row.path).with_suffix(".dcm"))
        assert (read.pixel_array == film).all()
        assert "SYNTHETIC" in read.SeriesDescription
        how = json.loads(read.ImageComments)
        assert (how["edit"], how["seed"]) == (row.edit, row.seed)
        assert {"model_key", "target", "versions"} <= set(how)
        assert row.film_id not in str(read)
        assert row.patient_id not in str(read)


def _kill_one(parts):
    """Kill one of two shards once the first batch of either is there."""
    while True:
        jobs = [p for p in psutil.Process().children(recursive=True) if _is_shard(p)]
        if len(jobs) == 2 and parts.is_dir() and any(parts.iterdir()):
            return jobs[0].send_signal(signal.SIGKILL)
        time.sleep(0.01)


def _is_shard(process):
    try:
        return "submitit.core._submit" in process.cmdline()
    except psutil.Error:
        return False


def test_when_one_of_two_shards_is_killed_the_same_call_makes_what_is_missing(
    run, whole, tmp_path, monkeypatch
):
    pytest.importorskip("submitit")
    from submitit.core.core import Job

    monkeypatch.setattr(Job, "_results_timeout_s", 0.1)
    killer = threading.Thread(target=_kill_one, args=[tmp_path / "parts"], daemon=True)
    killer.start()
    with pytest.raises(JobsDied, match=r"^shard [12] of 2 died: killed.*the same command") as error:
        edit_cohort(run, tmp_path, shards=2, **SETTINGS)
    killer.join()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "edits.parquet").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("[0-9a-f]*")}
    out, expected = whole
    assert 0 < len(done) < expected["path"].str.split("/").str[1].nunique()
    made = edit_cohort(run, tmp_path, shards=2, **SETTINGS)
    assert made.equals(expected)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for name in [*made["path"], *made["mask_path"]]:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    assert not (tmp_path / ".jobs").exists()


def test_a_command_that_is_stopped_stops_its_shards_and_goes_on_later(run, whole, tmp_path):
    pytest.importorskip("submitit")
    own, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    write_json(own / "steps" / "04_edit.json", {"parameters": OWN})
    command = [sys.executable, "-m", "prism_nb.cli", "edit-cohort", own, "--out", out]
    command += ["--split", "all", "--shards", "2", "--steps", "2"]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("parts/[0-9a-f]*")):
        assert stopped.poll() is None
        time.sleep(0.01)
    children = psutil.Process(stopped.pid).children(recursive=True)
    assert sum(_is_shard(child) for child in children) == 2
    stopped.terminate()
    said = stopped.communicate(timeout=30)[1].splitlines()
    assert said[-1] == "prism-nb: interrupted; the same command continues"
    assert stopped.returncode == 130
    assert not [child for child in children if child.is_running()]
    done = {path: path.stat().st_mtime_ns for path in out.glob("parts/[0-9a-f]*")}
    assert 0 < len(done) < whole[1]["path"].str.split("/").str[1].nunique()
    made = edit_cohort(own, out, **SETTINGS)
    assert made["id"].to_list() == whole[1]["id"].to_list()
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize("batch_size", [1, 2])
def test_films_that_cannot_be_read_are_set_aside_and_tried_again(run, tmp_path, batch_size):
    how = SETTINGS | {"max_films": 6, "edit_batch_size": batch_size}
    plan = plan_batches(run, read_request(run, "all", OWN), max_films=6)
    cohort, film = read_cohort(run), plan["film_id"].iloc[0]
    path = cohort.image_root / cohort.table.set_index("film_id").loc[film, "path"]
    shutil.move(path, tmp_path / "film")
    try:
        made = edit_cohort(run, tmp_path / "out", **how)
    finally:
        shutil.move(tmp_path / "film", path)
    assert made["id"].to_list() == plan.loc[plan["film_id"] != film, "id"].to_list()
    rejected = pd.read_csv(tmp_path / "out" / "rejected.csv")
    assert rejected["film_id"].to_list() == [film]
    assert "there is no such" in rejected["reason"][0]
    again = edit_cohort(run, tmp_path / "out", **how)
    assert again["id"].to_list() == plan["id"].to_list()
    assert pd.read_csv(tmp_path / "out" / "rejected.csv").empty


def test_a_batch_that_fails_is_named_and_does_not_stop_the_others(run, tmp_path, monkeypatch):
    calls = []

    def fail(*given):
        calls.append(given[-1])
        if len(calls) == 1:
            raise ValueError("unlucky")
        return make_batch(*given)

    with monkeypatch.context() as patch:
        patch.setattr("prism_nb.shards.make_batch", fail)
        with pytest.raises(JobsDied, match=r"1 of 3 batches failed, the first: unlucky"):
            edit_cohort(run, tmp_path, max_films=6, **SETTINGS)
    assert len(calls) == 3
    assert edit_cohort(run, tmp_path, max_films=6, **SETTINGS)["id"].is_unique


def test_the_runs_own_settings_hold_where_none_are_given(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    own = {"num_ddim_steps": 7, "inversion": "null_text", "preset": "prism", "edits": EDITS[:1]}
    write_json(copy / "steps" / "04_edit.json", {"parameters": {"seed": 3, "preset": "sdedit"}})
    assert read_request(copy)["dials"] == {"seed": 3}
    write_json(copy / "manifest.json", {"parameters": own, "steps": {}})
    request = read_request(copy)
    assert request["inversion"] == {"method": "null_text", "num_steps": 7, "seed": 0}
    assert (request["preset"], request["edits"]) == ("prism", EDITS[:1])
    request = read_request(copy, settings={"preset": "default", "num_ddim_steps": 3})
    assert request["inversion"] == {"method": "direct", "num_steps": 3, "seed": 0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shards": 0}, "shards is 0"),
        ({"split": "tests"}, "it must be one of train, val, test, all"),
        ({"preset": "prisma"}, "preset"),
        ({"edits": ["remove Devices"]}, "edits"),
        ({"num_ddim_steps": 0}, "num_ddim_steps = 0: allowed is from 1"),
        ({"executor": "ray"}, "it must be local or slurm"),
        ({"format": "jpeg"}, "it must be one of png, png16, dicom"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, tmp_path, given, words):
    with pytest.raises(ValueError, match=words) as error:
        edit_cohort(run, tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["edits/edits.parquet", "rejected.csv"])
def test_what_a_notebook_wrote_is_not_written_over(run, tmp_path, name):
    own = shutil.copytree(run, tmp_path / "run")
    write_text(own / name, "mine")
    out = (own / name).parent
    with pytest.raises(ValueError, match=r"has a [a-z.]+ of something else: give another folder"):
        edit_cohort(own, out, max_films=2, **SETTINGS)
    assert (own / name).read_text() == "mine"
    assert not (out / "request.json").exists()


def test_a_run_without_model_a_folder_in_use_and_a_missing_submitit(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no model yet: run 02_finetune"):
        edit_cohort(tmp_path)
    os.makedirs(tmp_path / "out")
    with (
        locked(tmp_path / "out" / ".lock"),
        pytest.raises(ValueError, match="is in use by another"),
    ):
        edit_cohort(run, tmp_path / "out", max_films=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'prism_nb\[slurm\]'"):
        edit_cohort(run, tmp_path / "out", shards=2)
