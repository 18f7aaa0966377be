"""The judge: a classifier that took no part in the edits (section 3.2).

It is of another architecture and seed than the classifiers of notebook 06, never filters an edit,
never lends its weights, and never judges a film that it learned from: its card says which. On the
phantom it may learn from other patients, in whom devices are not linked to effusions, so that it
does not itself lean on the shortcut. Heads: the paper's four, then who it is (IDENTITY).
The baseline that it compares with is made here, too. Films (N, H, W) uint8; labels (N, K) with NaN
missing. Used by notebook 05.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from prism_nb import phantom
from prism_nb.classifiers import (
    ClassifierError,
    build_classifier,
    check_judge,
    film_keys,
    fit,
    fit_temperature,
    load_classifier,
    predict,
    save_classifier,
)
from prism_nb.cohort import load_cohort
from prism_nb.files import read_json
from prism_nb.findings import PAPER_HEADS, known_labels
from prism_nb.ganterfactual import BUNDLED, build_gan, fit_gan, load_gan, resize, save_gan
from prism_nb.images import load_films
from prism_nb.networks import CARD_FILE, weights_file
from prism_nb.phantom.graph import LEAST

IDENTITY = ("male", "over 60")  # what no edit may change
HEADS = (*PAPER_HEADS, *IDENTITY)
SEED = 6_000_011  # of the patients that are rendered for it, besides the run's
VAL_SHARE = 8  # one in so many of them chooses the best weights
DEVICES = "Support Devices"  # what the paper's baseline takes and gives
log = logging.getLogger(__name__)


def judge_labels(table):
    """Labels (N, 6) of HEADS from a cohort's table; who it is, where sex and age are known."""
    sex = table["Sex"].map({"Male": 1.0, "Female": 0.0})
    old = (table["Age"] > 60).astype(float).where(table["Age"].notna())
    findings = known_labels(table, PAPER_HEADS)
    return np.column_stack([findings, sex, old]).astype(np.float32)


def keys_of(cohort, film_ids):
    """The film_keys of a cohort's films; phantom populations number their patients alike."""
    root, film_ids = cohort.image_root, list(film_ids)
    known = film_ids and phantom.is_phantom(root)
    source = f"phantom {phantom.patient_of(root, film_ids[0]).seed}" if known else ""
    return film_keys(film_ids, source)


def make_judge(cohort, films, params, folder, device="cpu"):
    """Load the judge that params.judge names, or train it: (judge, card, Epochs of the training).

    films: the cohort's; folder: where it is written, with what was rendered for it. Raises
    ClassifierError for an architecture that is the classifier's too, and for a folder's judge
    that may not judge the test films.
    """
    judge, card, epochs = None, {"architecture": params.judge}, []
    if (found := Path(params.judge)).is_dir():
        judge, card = load_classifier(found)
    if card["architecture"] == params.classifier:
        raise ClassifierError(
            f"judge and classifier are both {params.classifier}; a judge must be another "
            "architecture."
        )
    if judge is None:
        judge, card, epochs = _train(cohort, films, params, Path(folder), device)
    table = cohort.table
    check_judge(card, keys_of(cohort, table.loc[table["split"] == "test", "film_id"]))
    if missing := [head for head in HEADS if head not in card["heads"]]:
        raise ClassifierError(f"the judge in {found} has no head {missing[0]}: train one here.")
    return judge.to(device), card, epochs


def asker(judge, card, precision="fp32"):
    """A function of films (R, H, W) that gives the judge's probabilities (R, 6) of HEADS.

    precision: fp32, or bf16, which is quicker where the processor or GPU multiplies in it.
    """
    columns, bf16 = [card["heads"].index(head) for head in HEADS], precision == "bf16"
    device = next(judge.parameters()).device.type

    def ask(films):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return predict(judge, films)[:, columns]

    return ask


def _train(cohort, films, params, folder, device):
    """A new judge on its own films, calibrated and saved."""
    seed, weights = params.seed + 1, params.classifier_weights
    if weights_file(weights):  # of the classifier's architecture, and so not of the judge's
        weights = ""
    if params.judge_films and phantom.is_phantom(cohort.image_root):
        train, val, keys = _rendered(cohort, params.judge_films, SEED + params.seed, folder)
    else:
        train, val, keys = _of_cohort(cohort, films)
    judge = build_classifier(params.judge, len(HEADS), weights, seed, params.classifier_size)
    recipe = params.judge_epochs, params.classifier_batch_size, params.classifier_learning_rate
    training = fit(judge, *train, *val, *recipe, seed=seed, device=device, augment=True)
    epochs = list(tqdm(training, "judge", params.judge_epochs))
    fit_temperature(judge, *val)
    card = {"role": "judge", "seed": seed, "start": weights or "from scratch"}
    card |= {"training_films": len(train[0]), "trained_on": sorted(keys)}
    save_classifier(folder / "judge", judge, HEADS, card)
    return judge, read_json(folder / "judge" / CARD_FILE), epochs


def _of_cohort(cohort, films):
    """Training and validation sets (films, labels) of the cohort's splits, and all their keys."""
    labels, split = judge_labels(cohort.table), cohort.table["split"].to_numpy()
    sets = [(films[split == name], labels[split == name]) for name in ("train", "val")]
    return *sets, keys_of(cohort, cohort.table.loc[split != "test", "film_id"])


def _rendered(cohort, count, seed, folder):
    """The same of new patients without the link; rendered once, in a hidden folder."""
    size = cohort.settings["image_size"]
    csv = phantom.write_cohort(
        folder / ".films", count, size, seed, LEAST, workers=None, replace=True
    )
    own = load_cohort(csv, check_images=False)
    films = load_films([own.image_root / path for path in own.table["path"]], size)
    labels, cut = judge_labels(own.table), count - max(1, count // VAL_SHARE)
    sets = [(films[part], labels[part]) for part in (slice(cut), slice(cut, None))]
    return *sets, keys_of(own, own.table["film_id"])


def make_baseline(cohort, films, params, folder, device="cpu"):
    """The GANterfactual that params.baseline names and its finding, or (None, "") for "none".

    "train": on the cohort's training split at baseline_size, guided by an AlexNet that takes a
    quarter as many steps; goes on if it was stopped; none where films with or without devices
    lack. Whichever it is, `folder`, the run's baseline/, holds it afterwards: notebook 06 takes it
    from there. Raises GanError.
    """
    if params.baseline == "none":
        return _no_baseline(folder)
    if params.baseline != "train":
        gan, card = load_gan(BUNDLED if params.baseline == "bundled" else params.baseline)
        save_gan(folder, gan, card)
        return gan.to(device), card["finding"]
    shown, seed, steps = known_labels(cohort.table, [DEVICES]), params.seed, params.baseline_steps
    small, split = resize(films, params.baseline_size), cohort.table["split"].to_numpy()
    train, val = ((small[split == x], shown[split == x]) for x in ("train", "val"))
    pair = [train[0][train[1][:, 0] == present] for present in (0, 1)]
    if not all(map(len, pair)):
        log.warning(
            "no GANterfactual is trained: of the training films %d are known to be without "
            "devices and %d with; it needs both",
            *map(len, pair),
        )
        return _no_baseline(folder)
    guide = build_classifier("alexnet", 1, seed=seed)
    settings = {"learning_rate": 3e-4, "num_steps": -(-steps // 4), "seed": seed, "device": device}
    list(fit(guide, *train, *val, **settings))
    gan = build_gan(params.baseline_size, seed=seed)
    work = Path(folder).parent / "training" / "baseline"  # `folder` is cleared for another attempt
    settings = {"folder": work, "seed": seed, "device": device}
    list(tqdm(fit_gan(gan, *pair, guide, steps, **settings), "GANterfactual", steps))
    save_gan(folder, gan, {"finding": DEVICES, "num_steps": steps, "films": len(train[0])})
    return gan.eval(), DEVICES


def _no_baseline(folder):
    (Path(folder) / CARD_FILE).unlink(missing_ok=True)  # an earlier one is no longer the run's
    return None, ""
