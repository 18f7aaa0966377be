"""A phantom cohort on disk: CheXpert's layout, the truth behind it, the same bytes each time."""

import csv
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from prism_nb import phantom
from prism_nb.cohort import load_cohort
from prism_nb.files import read_json, write_json
from prism_nb.findings import FINDINGS
from prism_nb.images import load_film
from prism_nb.phantom.__main__ import main
from prism_nb.phantom.cohort import CERTAIN, DENIED, NEW_PATIENTS, factors, film_masks, report
from prism_nb.phantom.graph import DEVICE_KINDS, SEVERITIES, sample_patient

NUM_FILMS, SIZE, SEED = 10, 64, 5
HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
FIRST = "patient00001_study1_view1_frontal"


def tree(folder):
    """Every file below a folder, with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rows_of(labels_csv):
    with open(labels_csv, newline="") as file:
        return list(csv.DictReader(file))


def command(*arguments):
    return [sys.executable, "-m", "prism_nb.phantom", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    phantom.write_cohort(folder, NUM_FILMS, SIZE, SEED)
    return folder


@pytest.fixture(scope="module")
def people():
    """Patients of a larger population; their reports need no film."""
    return [sample_patient(1, number) for number in range(1, 1501)]


def test_layout_and_header_are_chexperts(folder):
    text = (folder / "train.csv").read_bytes().decode()
    assert text.splitlines()[0] == HEADER
    assert "\r" not in text
    rows = rows_of(folder / "train.csv")
    paths = [f"train/patient{n:05d}/study1/view1_frontal.png" for n in range(1, NUM_FILMS + 1)]
    assert [row["Path"] for row in rows] == paths
    assert all((folder / path).is_file() for path in paths)
    assert {row["Frontal/Lateral"] for row in rows} == {"Frontal"}
    assert {row["AP/PA"] for row in rows} <= {"AP", "PA"}
    assert {row["Sex"] for row in rows} <= {"Female", "Male"}
    assert all(18 <= int(row["Age"]) <= 90 for row in rows)


def test_values_follow_the_labels(folder):
    for row in rows_of(folder / "train.csv"):
        labels = phantom.patient_of(folder, row["Path"]).labels
        for finding in FINDINGS:
            assert row[finding] in (("1.0",) if labels[finding] else ("0.0", ""))
        assert row["No Finding"] in ("1.0", "")


def test_absent_findings_are_denied_at_their_rates(people):
    rows = pd.DataFrame(report(patient) for patient in people)
    for finding, rate in DENIED.items():
        absent = rows.loc[rows[finding] != 1.0, finding]
        denied = (absent == 0.0).mean()
        assert denied == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / len(absent)))


def test_load_cohort_reads_the_truth_back(folder):
    cohort = load_cohort(folder / "train.csv")
    assert cohort.settings["layout"] == "chexpert"
    assert cohort.rejected.empty
    assert len(cohort.table) == NUM_FILMS
    for _, film in cohort.table.iterrows():
        patient = phantom.patient_of(folder, film["film_id"])
        assert {finding: film[finding] for finding in FINDINGS} == patient.labels
        assert (film["Sex"], film["Age"], film["view"]) == (patient.sex, patient.age, patient.view)


def test_uncertain_labels_are_the_mildest_and_u_ones_is_the_truth(tmp_path, people):
    labels_csv = phantom.write_cohort(tmp_path, 6, SIZE, SEED, uncertain=True)
    for _, film in load_cohort(labels_csv, uncertain="ones").table.iterrows():
        patient = phantom.patient_of(tmp_path, film["film_id"])
        assert {finding: film[finding] for finding in FINDINGS} == patient.labels
    rows = pd.DataFrame(report(patient, uncertain=True) for patient in people)
    for name, severity in SEVERITIES.items():
        said = rows[severity.label]
        amount = pd.Series([patient.severity[name] for patient in people])
        assert amount[said == -1.0].max() <= amount[said == 1.0].min(), name
        share = CERTAIN[severity.label]
        present = said.isin([1.0, -1.0]).sum()
        certain = (said == 1.0).sum() / present
        assert certain == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / present))
    assert not rows[["No Finding", "Support Devices"]].isin([-1.0]).any(axis=None)
    certain = pd.DataFrame(report(patient) for patient in people)
    assert not certain[list(FINDINGS)].isin([-1.0]).any(axis=None)


def test_a_killed_command_goes_on_and_leaves_the_same_bytes(tmp_path):
    def arguments(folder, workers):
        return ("--out", folder, "--patients", 100, "--size", 96, "--seed", 3, "--workers", workers)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(*arguments(killed, 2)))
    until = time.monotonic() + 60
    while len(list(killed.glob("train/*/*/*.png"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("train/*/*/*.png")}
    assert not (killed / "train.csv").exists(), "it must be killed while at work"
    assert not psutil.wait_procs(workers, timeout=20)[1], "no worker outlives its parent"
    assert run(*arguments(killed, 0)).returncode == 0
    assert 3 <= len(before) < 100
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert run(*arguments(whole, 0)).returncode == 0
    assert tree(killed) == tree(whole)


def test_neither_workers_nor_order_matter(folder, tmp_path):
    expected = tree(folder)
    for workers in (1, 2):
        phantom.write_cohort(tmp_path / str(workers), NUM_FILMS, SIZE, SEED, workers=workers)
        assert tree(tmp_path / str(workers)) == expected
    for number in reversed(range(1, NUM_FILMS + 1)):
        film = phantom.render(sample_patient(SEED, number), SIZE).image
        path = folder / f"train/patient{number:05d}/study1/view1_frontal.png"
        assert (load_film(path, SIZE) == film).all()


def test_a_whole_cohort_is_left_alone_and_a_lost_film_comes_back(folder):
    expected = tree(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    phantom.write_cohort(folder, NUM_FILMS, SIZE, SEED)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == times
    lost = folder / "train/patient00004/study1/view1_frontal.png"
    lost.unlink()
    (lost.parent / ".partial-0123.png").write_bytes(b"half")
    phantom.write_cohort(folder, NUM_FILMS, SIZE, SEED)
    assert tree(folder) == expected


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 6}, "another phantom cohort .seed: 5 there, 6 here.; give another folder"),
        ({"num_patients": 11}, "patients: 10 there, 11 here"),
        ({"size": 65}, "size: 64 there, 65 here"),
        ({"confounding": 0.9}, "confounding: 0.75 there, 0.9 here"),
        ({"uncertain": True}, "uncertain: False there, True here"),
        ({"size": 63}, "size is 63; it must be from 64"),
        ({"size": 100_000}, "to 4,096"),
        ({"num_patients": 0}, "patients is 0; it must be from 1"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"workers": -1}, "workers is -1"),
        ({"mode": "random"}, "random"),
        ({"confounding": 0.3}, "0.3"),
        ({"confounding": 0.99}, "0.97"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(folder, changed, says):
    expected = tree(folder)
    arguments = {"num_patients": NUM_FILMS, "size": SIZE, "seed": SEED, **changed}
    with pytest.raises(ValueError, match=says) as caught:
        phantom.write_cohort(folder, **arguments)
    assert "\n" not in str(caught.value)
    assert tree(folder) == expected


def test_bad_input_makes_no_folder(tmp_path):
    for bad in ({"size": 32}, {"confounding": 0.2}, {"num_patients": 0}, {"workers": -2}):
        with pytest.raises(ValueError):
            phantom.write_cohort(tmp_path / "new", **{"num_patients": 2, **bad})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["train.csv", "train/patient00001/film.jpg"])
def test_a_folder_with_other_films_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    for replace in (False, True):
        with pytest.raises(ValueError, match="not the phantom's; give another folder"):
            phantom.write_cohort(tmp_path, 1, SIZE, replace=replace)
    assert tree(tmp_path) == {name: b"mine"}
    with pytest.raises(ValueError, match="is a file; give a folder"):
        phantom.write_cohort(tmp_path / name, 1, SIZE)


def test_a_phantom_cohort_is_replaced_only_when_asked(folder, tmp_path):
    phantom.write_cohort(tmp_path, 12, SIZE, seed=9)
    (tmp_path / "notes.txt").write_text("mine")
    phantom.write_cohort(tmp_path, NUM_FILMS, SIZE, SEED, replace=True)
    assert tree(tmp_path) == tree(folder) | {"notes.txt": b"mine"}


def test_truth_is_found_again_from_disk(folder):
    patient = sample_patient(SEED, 1)
    for do in ({"Support Devices": 1 - patient.labels["Support Devices"]}, {"effusion_ml": 1500}):
        film, mask = phantom.true_counterfactual(folder, FIRST, do)
        assert (film == phantom.render(patient, SIZE, do).image).all()
        factual = load_film(folder / "train/patient00001/study1/view1_frontal.png", SIZE)
        assert mask.any()
        assert (mask == (film != factual)).all()
    film, mask = phantom.true_counterfactual(folder, FIRST, {"Edema": 1}, effect="total")
    assert (film == phantom.render(patient, SIZE, {"Edema": 1}, "total").image).all()
    film, mask = phantom.true_counterfactual(folder, FIRST, {})
    assert not mask.any()


def test_truth_at_another_size_compares_with_the_film_as_it_is_loaded(folder):
    for size in (32, 128):  # shrunk as load_film does it, or grown
        film, _ = phantom.true_counterfactual(folder, FIRST, {}, size)
        path = folder / "train/patient00001/study1/view1_frontal.png"
        assert np.array_equal(film, load_film(path, size))
    film, mask = phantom.true_counterfactual(folder, FIRST, {"heart_ratio": 0.65}, 32)
    factual = load_film(folder / "train/patient00001/study1/view1_frontal.png", 32)
    assert film.shape == (32, 32)
    assert (mask == (film != factual)).all()
    assert 0 < mask.mean() < 0.7


def test_films_without_a_truth_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="not a phantom film"):
        phantom.true_counterfactual(folder, "00000075_000", {"Edema": 1})
    with pytest.raises(ValueError, match="not a phantom film"):
        phantom.patient_of(tmp_path, FIRST)
    with pytest.raises(ValueError, match="no film of the cohort"):
        film_masks(folder, "patient00011_study1_view1_frontal")
    with pytest.raises(ValueError, match="no whole phantom cohort"):
        factors(tmp_path)


def test_a_cohort_of_another_version_is_not_rendered_again(folder, tmp_path):
    write_json(tmp_path / "phantom.json", read_json(folder / "phantom.json") | {"version": 0})
    with pytest.raises(ValueError, match="version 0 of the phantom"):
        phantom.patient_of(tmp_path, FIRST)
    with pytest.raises(ValueError, match="version: 0 there"):
        phantom.write_cohort(tmp_path, NUM_FILMS, SIZE, SEED)


def test_masks_on_disk_are_those_of_the_renderer(folder):
    for number in range(1, NUM_FILMS + 1):
        masks = film_masks(folder, f"patient{number:05d}_study1_view1_frontal")
        expected = phantom.render(sample_patient(SEED, number), SIZE).masks
        assert list(masks) == list(expected)
        assert all((masks[name] == expected[name]).all() for name in masks)
        assert masks["lungs"].dtype == bool


def test_factors_say_what_each_film_shows(folder):
    table = factors(folder)
    assert table["number"].tolist() == list(range(1, NUM_FILMS + 1))
    assert table["film_id"].iloc[0] == FIRST
    for row in table.to_dict("records"):
        patient = sample_patient(SEED, row["number"])
        assert {finding: row[finding] for finding in FINDINGS} == patient.labels
        healthy = dict.fromkeys(SEVERITIES, 0.0) | {"heart_ratio": patient.severity["normal_ratio"]}
        for name, severity in SEVERITIES.items():
            ill = patient.labels[severity.label]
            assert row[name] == (patient.severity if ill else healthy)[name]
        kinds = [kind for kind in DEVICE_KINDS if row[kind]]
        assert set(kinds) == set(patient.kinds if patient.labels["Support Devices"] else ())
        assert bool(row["effusion_side"]) == bool(row["Pleural Effusion"])


def test_the_sidecar_is_the_recipe(folder):
    recipe = json.loads((folder / "phantom.json").read_text())
    wanted = {"seed": SEED, "patients": NUM_FILMS, "size": SIZE, "confounding": 0.75}
    assert recipe.items() >= (wanted | {"mode": "confounded", "uncertain": False}).items()


def test_balanced_films_hold_every_pair_for_every_new_patient(folder):
    pair = ["Pleural Effusion", "Support Devices"]
    films, labels, patients = phantom.balanced_films(folder, 3)
    frame = pd.DataFrame(labels)[pair].assign(patient=patients)
    assert films.shape == (12, SIZE, SIZE)
    assert frame.value_counts().tolist() == [1] * 12
    assert set(patients) == {f"patient{NEW_PATIENTS + n}" for n in range(3)}
    patient = sample_patient(SEED, NEW_PATIENTS)
    do = dict(zip(pair, (0, 1), strict=True))
    assert (films[1] == phantom.render(patient, SIZE, do).image).all()
    assert phantom.balanced_films(folder, 1, ("Edema", "Cardiomegaly"), 32)[0].shape == (4, 32, 32)


def test_the_command_writes_a_cohort_and_says_where(folder, tmp_path):
    options = ("--out", tmp_path / "new", "--patients", NUM_FILMS, "--size", SIZE, "--seed", SEED)
    done = run(*options)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{NUM_FILMS} films in {tmp_path / 'new'}" in done.stdout
    assert f"--set csv={tmp_path / 'new' / 'train.csv'}" in done.stdout
    assert tree(tmp_path / "new") == tree(folder)
    again = run(*options, "--mode", "treatment", "--uncertain")
    assert again.returncode == 2
    assert "holds another phantom cohort" in again.stderr
    assert tree(tmp_path / "new") == tree(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--patients", "2", "--size", "32"), "size is 32"),
        (("--patients", "2", "--confounding", "0.2"), "0.2"),
        (("--patients", "two"), "--patients"),
        (("--patients", "2", "--mode", "other"), "--mode"),
        ((), "--patients"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(tmp_path, capsys, options, says):
    try:
        code = main(["--out", str(tmp_path / "new"), *options])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_command_names_a_run_of_its_own(tmp_path, capsys):
    options = ["--out", str(tmp_path / "phantom"), "--patients", "1", "--size", "64"]
    assert main([*options, "--workers", "0"]) == 0
    run = f"params/phantom.yaml --name phantom_1 --set csv={tmp_path}/phantom/"
    assert f"next: prism-nb run {run}" in capsys.readouterr().out


def test_a_disk_that_refuses_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--out", str(tmp_path / "file" / "new"), "--patients", "1", "--size", "64"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
