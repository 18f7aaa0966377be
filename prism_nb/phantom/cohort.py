"""A phantom cohort on disk, in CheXpert's own layout: nothing downstream knows that it is not real.

`train.csv` with CheXpert's columns, `train/patientNNNNN/study1/view1_frontal.png`, and a sidecar
`phantom.json` from which every film's patient can be drawn again, for its true counterfactual.
"""

import csv
import re
from itertools import product
from pathlib import Path

import numpy as np

from prism_nb.files import atomic_path, read_json, write_json
from prism_nb.findings import FINDINGS
from prism_nb.images import save_png
from prism_nb.phantom.graph import DRAWN, sample_patient
from prism_nb.phantom.renderer import counterfactual, render

SIDECAR = "phantom.json"
NEW_PATIENTS = 5_000_000  # no cohort has so many


def write_cohort(folder, num_patients, size=512, seed=0, device_given_effusion=0.75):
    """Render one frontal film for each of `num_patients` and return the path of the labels CSV."""
    folder = Path(folder)
    rows = []
    for number in range(1, num_patients + 1):
        patient = sample_patient(seed, number, device_given_effusion)
        path = f"train/patient{number:05d}/study1/view1_frontal.png"
        save_png(folder / path, render(patient, size).image)
        rows.append(_row(path, patient))
    with atomic_path(folder / "train.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    recipe = {"seed": seed, "size": size, "device_given_effusion": device_given_effusion}
    write_json(folder / SIDECAR, recipe)
    return folder / "train.csv"


def _row(path, patient):
    labels = dict.fromkeys(FINDINGS, "")
    labels |= {finding: float(patient.labels[finding]) for finding in DRAWN}
    labels["No Finding"] = 1.0 if patient.labels["No Finding"] else ""
    about = {"Path": path, "Sex": patient.sex, "Age": patient.age}
    return about | {"Frontal/Lateral": "Frontal", "AP/PA": patient.view} | labels


def is_phantom(folder):
    """Whether the folder holds a phantom cohort, so that true counterfactuals can be had."""
    return (Path(folder) / SIDECAR).is_file()


def patient_of(folder, film_id):
    """The patient behind a film of a phantom cohort; raises ValueError for another kind of film."""
    number = re.search(r"patient(\d+)", film_id)
    if not is_phantom(folder) or not number:
        raise ValueError(
            f"{film_id} in {folder} is not a phantom film: it has no true counterfactual"
        )
    recipe = read_json(Path(folder) / SIDECAR)
    return sample_patient(recipe["seed"], int(number[1]), recipe["device_given_effusion"])


def true_counterfactual(folder, film_id, do, size=None):
    """The true counterfactual (H, W) uint8 under do={finding: 0 or 1}, and its change mask."""
    size = size or read_json(Path(folder) / SIDECAR)["size"]
    film, mask = counterfactual(patient_of(folder, film_id), do, size)
    return film.image, mask


def balanced_films(folder, num_patients, pair=("Pleural Effusion", "Support Devices"), size=None):
    """New patients of the cohort's population, each under all four do() of a pair of findings.

    Returns films (4 * num_patients, H, W) uint8, a list of their labels, and their patients'
    names. No such patient is in the cohort: their numbers start at NEW_PATIENTS.
    """
    recipe = read_json(Path(folder) / SIDECAR)
    films, labels, patients = [], [], []
    for number in range(NEW_PATIENTS, NEW_PATIENTS + num_patients):
        patient = sample_patient(recipe["seed"], number, recipe["device_given_effusion"])
        for values in product((0, 1), repeat=2):
            film = render(patient, size or recipe["size"], dict(zip(pair, values, strict=True)))
            films.append(film.image)
            labels.append(film.labels)
            patients.append(f"patient{number:07d}")
    return np.stack(films), labels, patients
