"""A phantom cohort on disk, in CheXpert's own layout: nothing downstream knows that it is not real.

    train.csv        CheXpert's columns and values: 1.0, 0.0, -1.0 or blank; written last
    train/patient00001/study1/view1_frontal.png
    masks/patient00001/study1/view1_frontal.png    the film's layers, see `film_masks`
    phantom.parquet  what lies behind each film, see `factors`
    phantom.json     the recipe, from which every patient can be drawn again; written first

A film is never rendered twice: a run that was killed goes on where it stopped, and leaves the same
bytes, whatever the number of workers. Films (H, W) uint8.
"""

import csv
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context, parent_process
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from prism_nb.files import TEMPORARY, atomic_path, read_json, write_json
from prism_nb.findings import FINDINGS
from prism_nb.images import resize, save_png
from prism_nb.phantom.graph import DEVICE_KINDS, SEVERITIES, intervene, sample_patient
from prism_nb.phantom.renderer import MAX_SIZE, MIN_SIZE, VERSION, render

SIDECAR, FACTORS, LABELS = "phantom.json", "phantom.parquet", "train.csv"
NEW_PATIENTS = 5_000_000  # no cohort has so many
ENOUGH = 16  # films that are worth starting a process for
SYNTHETIC = "SYNTHETIC chest film, the phantom of prism_nb"

# How often a report denies an absent finding (0.0); otherwise it does not mention it (blank). The
# rates are ours: round numbers of the order of those in CheXpert's train.csv.
DENIED = {
    "Enlarged Cardiomediastinum": 0.11,
    "Cardiomegaly": 0.06,
    "Lung Opacity": 0.06,
    "Lung Lesion": 0.01,
    "Edema": 0.13,
    "Consolidation": 0.15,
    "Pneumonia": 0.02,
    "Atelectasis": 0.01,
    "Pneumothorax": 0.28,
    "Pleural Effusion": 0.28,
    "Pleural Other": 0.01,
    "Fracture": 0.01,
    "Support Devices": 0.06,
}

# Of the films that show a finding, the share whose report is certain of it: CheXpert's certain
# positives over certain and uncertain ones.
CERTAIN = {
    "Enlarged Cardiomediastinum": 4.8 / 10.2,
    "Cardiomegaly": 27_000 / 35_087,
    "Lung Opacity": 49.4 / 51.7,
    "Lung Lesion": 3.7 / 4.2,
    "Edema": 26.1 / 32.2,
    "Consolidation": 6.8 / 19.6,
    "Pneumonia": 2.4 / 10.8,
    "Atelectasis": 15.6 / 31.3,
    "Pneumothorax": 9.2 / 10.7,
    "Pleural Effusion": 86_187 / 97_815,
    "Pleural Other": 1.3 / 2.2,
    "Fracture": 3.9 / 4.1,
}


def write_cohort(
    folder,
    num_patients,
    size=512,
    seed=0,
    confounding=0.75,
    mode="confounded",
    uncertain=False,
    workers=0,
    progress=False,
    replace=False,
):
    """Render a cohort, one frontal film a patient, and return the path of its labels CSV.

    size: pixels a side. confounding: P(device | effusion). uncertain: reports hedge about the
    mildest cases (-1.0), which "uncertain = present" undoes exactly. workers: processes, 0 for
    none but this one, None for one a core; a script that asks for some needs the usual guard,
    `if __name__ == "__main__"`. progress: show a bar. replace: delete another phantom cohort that
    is in the folder. Films that are there already from the same recipe are kept.
    Raises ValueError for an impossible number and for a folder that holds something else.
    """
    folder = Path(folder)
    recipe = {"seed": seed, "patients": num_patients, "size": size, "confounding": confounding}
    recipe |= {"mode": mode, "uncertain": bool(uncertain), "version": VERSION}
    _check(recipe, workers)
    _claim(folder, recipe, replace)
    missing = sum(not _is_there(folder, number) for number in range(1, num_patients + 1))
    if missing or not (folder / LABELS).is_file():
        _render(folder, recipe, _num_workers(workers, missing), progress)
    return folder / LABELS


def _check(recipe, workers):
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 (this process) or more")
    for name, low, high in (("patients", 1, NEW_PATIENTS - 1), ("size", MIN_SIZE, MAX_SIZE)):
        if not isinstance(recipe[name], Integral) or not low <= recipe[name] <= high:
            raise ValueError(f"{name} is {recipe[name]}; it must be from {low} to {high:,}")
    if recipe["seed"] < 0:
        raise ValueError(f"seed is {recipe['seed']}; it must be 0 or more")
    _patient(recipe, 1)  # refuses a confounding or a mode that the graph does not know


def _claim(folder, recipe, replace):
    """Put the recipe into an empty folder; refuse one that holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if is_phantom(folder):
        held = read_json(folder / SIDECAR)
        if held == recipe:
            return
        if not replace:
            raise ValueError(
                f"{folder} holds another phantom cohort ({_difference(held, recipe)}); "
                "give another folder, or delete that one"
            )
        for name in (LABELS, FACTORS):  # the sidecar last: it says that all this is ours
            (folder / name).unlink(missing_ok=True)
        for name in ("train", "masks"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif any((folder / name).exists() for name in (LABELS, FACTORS, "train", "masks")):
        raise ValueError(f"{folder} holds a cohort that is not the phantom's; give another folder")
    write_json(folder / SIDECAR, recipe)


def _difference(held, recipe):
    for name, here in recipe.items():
        there = held.get(name, "unknown") if isinstance(held, dict) else "unknown"
        if there != here:
            return f"{name}: {there} there, {here} here"
    return "it has more in its recipe"


def num_processors():
    """How many processors this process may use: on a cluster fewer than the machine has."""
    able = getattr(os, "sched_getaffinity", None)
    return len(able(0)) if able else os.cpu_count() or 1


def _num_workers(workers, missing):
    if workers is None:
        workers = min(num_processors(), missing // ENOUGH)
        return workers if workers > 1 else 0
    return min(workers, max(missing, 1))


def _render(folder, recipe, workers, progress):
    """Render what is missing, then write factors and labels."""
    from tqdm.auto import tqdm

    for left in folder.glob(f"{TEMPORARY}*"):
        left.unlink()
    numbers = range(1, recipe["patients"] + 1)
    with _mapping(workers) as mapped:
        films = mapped(partial(_film, folder, recipe), numbers)
        bar = tqdm(films, "rendering", len(numbers), unit="film", disable=not progress)
        rows, about = zip(*bar, strict=True)
    _write_factors(folder, about)
    with atomic_path(folder / LABELS) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _mapping(workers):
    """Yield `map`, or one over processes that use a single thread each."""
    if not workers:
        yield map
        return
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process imports NumPy
    # Spawned, for a fork of a notebook's many threads can hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        yield partial(pool.map, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _start_worker():
    """Leave Ctrl-C to the parent, and end with it: a killed one would leave its workers waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    parent_process().join()
    os._exit(1)


def _path(number, study=1):
    return f"patient{number:05d}/study{study}/view1_frontal.png"


def _is_there(folder, number):
    return (folder / "train" / _path(number)).is_file()  # its masks were written before it


def _film(folder, recipe, number):
    """Write one film and its masks, unless they are there; its rows of the two tables."""
    patient, path = _patient(recipe, number), _path(number)
    if not _is_there(folder, number):
        for part in ("train", "masks"):
            for left in (folder / part / path).parent.glob(f"{TEMPORARY}*"):
                left.unlink(missing_ok=True)
        film = render(patient, recipe["size"])
        _save_masks(folder / "masks" / path, film.masks)
        save_png(folder / "train" / path, film.image, {"Description": SYNTHETIC})
    row = {"Path": f"train/{path}", "Sex": patient.sex, "Age": patient.age}
    row |= {"Frontal/Lateral": "Frontal", "AP/PA": patient.view}
    return row | report(patient, recipe["uncertain"]), _about(patient, path)


def report(patient, uncertain=False):
    """What a report of the patient's film says: finding -> 1.0, 0.0, -1.0 or "" (no mention).

    uncertain: of each finding the mildest cases are -1.0, as many as CheXpert's reports hedge.
    """
    chances, said = patient.draw("report").random(len(FINDINGS)), {}
    for finding, chance in zip(FINDINGS, chances, strict=True):
        if patient.labels[finding]:
            said[finding] = -1.0 if uncertain and _is_mild(patient, finding) else 1.0
        else:
            said[finding] = 0.0 if chance < DENIED.get(finding, 0) else ""
    return said


def _is_mild(patient, finding):
    return finding in CERTAIN and patient.mildness(finding) < 1 - CERTAIN[finding]


def _about(patient, path):
    """A row of phantom.parquet: what the film truly shows."""
    world = intervene(patient)
    row = {"film_id": path.removesuffix(".png").replace("/", "_"), "number": patient.number}
    row |= {"study": patient.study, "Sex": patient.sex, "Age": patient.age}
    row |= {"view": patient.view, "supine": patient.supine} | world.labels
    row |= {name: float(world.severity[name]) for name in SEVERITIES}
    row |= {
        "effusion_side": world.severity["effusion_side"] if world.severity["effusion_ml"] else ""
    }
    return row | {kind: int(kind in world.devices) for kind in DEVICE_KINDS}


def _write_factors(folder, rows):
    import pandas as pd

    with atomic_path(folder / FACTORS) as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)


def _save_masks(path, masks):
    """Write a film's layers as a black and white strip, one below the other, and their names."""
    strip = np.concatenate(list(masks.values()))  # (layers * H, W) bool
    names = PngImagePlugin.PngInfo()
    names.add_text("Layers", ", ".join(masks))
    with atomic_path(path) as temporary:
        Image.fromarray(strip).save(temporary, format="PNG", pnginfo=names)


def film_masks(folder, film_id):
    """The layers of a film on disk: a dict of name -> (H, W) bool.

    Lungs, heart, fluid, each finding that is there, each kind of device, all devices. The file is
    a black and white PNG, the layers one below the other, named in its text "Layers".
    Raises ValueError for a film that the cohort does not have.
    """
    patient = patient_of(folder, film_id)
    path = Path(folder) / "masks" / _path(patient.number, patient.study)
    if not path.is_file():
        raise ValueError(f"{film_id} is no film of the cohort in {folder}")
    with Image.open(path) as image:
        names, strip = image.text["Layers"].split(", "), np.asarray(image)
    return dict(zip(names, strip.reshape(len(names), -1, strip.shape[1]), strict=True))


def factors(folder):
    """What lies behind each film of a phantom cohort: a table with a row a film.

    film_id, number, study, Sex, Age, view, supine, the 14 labels as they truly are (0 or 1), every
    severity (0 where the finding is absent, units in graph.SEVERITIES), effusion_side, and a
    column a kind of device (0 or 1). Raises ValueError if the folder holds no whole cohort.
    """
    import pandas as pd

    path = Path(folder) / FACTORS
    if not is_phantom(folder) or not path.is_file():
        raise ValueError(f"{folder} holds no whole phantom cohort; write one, or write it again")
    return pd.read_parquet(path)


def is_phantom(folder):
    """Whether the folder holds a phantom cohort, so that true counterfactuals can be had."""
    return (Path(folder) / SIDECAR).is_file()


def patient_of(folder, film_id):
    """The patient behind a film of a phantom cohort.

    Raises ValueError for another kind of film, and for a cohort of another version.
    """
    number = re.search(r"patient(\d+)(?:_study(\d+))?", film_id)
    if not is_phantom(folder) or not number:
        raise ValueError(
            f"{film_id} in {folder} is not a phantom film: it has no true counterfactual"
        )
    return _patient(_read_recipe(folder), int(number[1]), int(number[2] or 1))


def _read_recipe(folder):
    recipe = read_json(Path(folder) / SIDECAR)
    version = recipe.get("version") if isinstance(recipe, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{folder} was rendered by version {version} of the phantom and this is {VERSION}: "
            "its films cannot be rendered again; write the cohort anew"
        )
    return recipe


def _patient(recipe, number, study=1):
    return sample_patient(recipe["seed"], number, study, recipe["confounding"], recipe["mode"])


def true_counterfactual(folder, film_id, do, size=None, effect="direct", **options):
    """The true counterfactual of a cohort's film under `do`, (H, W) uint8, and its change mask.

    size: pixels a side, the cohort's own if not given; at another the film is resized as
    `load_film` resizes the one on disk, so that both compare. `do`, `effect` and options: as in
    `render`.
    """
    patient, recipe = patient_of(folder, film_id), _read_recipe(folder)
    films = (render(patient, recipe["size"], each, effect, **options).image for each in (None, do))
    factual, other = (_resized(film, size) for film in films)
    return other, factual != other


def balanced_films(folder, num_patients, pair=("Pleural Effusion", "Support Devices"), size=None):
    """New patients of the cohort's population, each under all four do() of a pair of findings.

    Returns films (4 * num_patients, H, W) uint8, a list of their labels, and their patients'
    names. No such patient is in the cohort: their numbers start at NEW_PATIENTS. size: as in
    `true_counterfactual`.
    """
    recipe, films, labels, patients = _read_recipe(folder), [], [], []
    for number in range(NEW_PATIENTS, NEW_PATIENTS + num_patients):
        patient = _patient(recipe, number)
        for values in product((0, 1), repeat=2):
            film = render(patient, recipe["size"], dict(zip(pair, values, strict=True)))
            films.append(_resized(film.image, size))
            labels.append(film.labels)
            patients.append(f"patient{number:07d}")
    return np.stack(films), labels, patients


def _resized(film, size):
    if size in (None, film.shape[0]):
        return film
    return np.array(resize(Image.fromarray(film), size))
