"""Augmentation: does training on counterfactuals make the classifier robust? (Table 3, Fig. 7)

An arm is a training set: the real films plus as many extra ones as every other arm has, so that
a gain is not the gain of having more. Counterfactuals come from the training split only; their
labels are the factual's with one finding changed and "No Finding" recomputed. What matters is
accuracy by group (effusion x device), its worst group, and differences paired by film.
N films uint8 (N, H, W), labels float (N, K) with NaN missing, correct (N,) 1, 0 or NaN.
Used by notebook 06.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from prism_nb.captions import edit_labels
from prism_nb.findings import FINDINGS, nearest, slug
from prism_nb.metrics import bootstrap_interval

ARMS = ("plain", "duplicates", "counterfactuals", "true_counterfactuals")


class AugmentError(ValueError):
    """An arm that cannot be built, or a comparison that would not be fair."""


def build_arm(name, images, labels, extra=None, seed=0):
    """Make one arm's training set: (images, labels).

    extra: {"counterfactuals": (images, labels), "true_counterfactuals": ...}; the smallest sets
    the budget. plain has the real films alone (train it for the same number of steps), duplicates
    repeats as many real films as the budget, the others add so many of their own.
    Raises AugmentError for an unknown arm, an arm without films, and films that do not match.
    """
    if name not in ARMS:
        raise AugmentError(f"arm {name!r} is not known; the nearest is {nearest(name, ARMS)!r}.")
    images, labels = _films("real films", images, labels)
    if len(images) == 0:
        raise AugmentError("there are no real films; give the films of the training split.")
    if name == "plain":
        return images, labels
    extra = {
        arm: _films(arm, *films, like=(images, labels)) for arm, films in (extra or {}).items()
    }
    budget = min((len(films) for films, _ in extra.values()), default=0)
    source = (images, labels) if name == "duplicates" else extra.get(name)
    if budget == 0 or source is None:
        counts = ", ".join(f"{arm} {len(films)}" for arm, (films, _) in extra.items()) or "none"
        raise AugmentError(
            f"arm {name} cannot be built: extra films are {counts}; make edits of training films "
            "in 04_edit."
        )
    rows = _draw(len(source[0]), budget, seed)
    return tuple(
        np.concatenate([real, more[rows]])
        for real, more in zip((images, labels), source, strict=True)
    )


def _films(name, images, labels, like=None):
    images, labels = np.asarray(images), np.asarray(labels, dtype=np.float32)
    if images.ndim != 3 or labels.ndim != 2 or len(images) != len(labels):
        raise AugmentError(
            f"{name} have shape {images.shape} and labels {labels.shape}; (N, H, W) and (N, K) "
            "are needed."
        )
    if like is not None:
        given = images.dtype, images.shape[1:], labels.shape[1:]
        needed = like[0].dtype, like[0].shape[1:], like[1].shape[1:]
        if given != needed:
            raise AugmentError(
                f"{name} are {given[0]} {given[1]} with {given[2][0]} labels; the real films are "
                f"{needed[0]} {needed[1]} with {needed[2][0]}."
            )
    return images, labels


def _draw(count, budget, seed):
    """Which of `count` films make up the budget: whole copies, then a random rest, in order."""
    rest = np.random.default_rng(seed).permutation(count)[: budget % count]
    return np.sort(np.concatenate([np.tile(np.arange(count), budget // count), rest]))


@dataclass
class Outcome:
    """One trained arm: the classifier, and its probabilities (N, K) on each test set."""

    arm: str
    seed: int
    model: object
    probabilities: dict


def train_arms(arms, films, labels, rows, extra, tests, heads, params, device="cpu"):
    """Train every arm on every seed for the same number of steps, yielding an Outcome each.

    films, labels: the cohort; rows: {"train": indices, "val": indices}; extra: as for build_arm;
    tests: {name: films}; params: the notebook's (seed, num_augment_seeds, classifier_...).
    Steps are those the larger arms need for classifier_epochs; the best validation weights count.
    """
    from prism_nb.classifiers import build_classifier, fit, predict

    train, val = ((films[rows[name]], labels[rows[name]]) for name in ("train", "val"))
    largest = max(len(build_arm(arm, *train, extra)[0]) for arm in arms)
    steps = params.classifier_epochs * math.ceil(largest / params.classifier_batch_size)
    recipe = (params.classifier_epochs, params.classifier_batch_size)
    recipe += (params.classifier_learning_rate,)
    for seed in range(params.seed, params.seed + params.num_augment_seeds):
        for arm in arms:
            weights, sees = params.classifier_weights, params.classifier_size
            model = build_classifier(params.classifier, len(heads), weights, seed, sees)
            chosen = build_arm(arm, *train, extra, seed)
            for _ in fit(model, *chosen, *val, *recipe, seed=seed, num_steps=steps, device=device):
                pass
            yield Outcome(arm, seed, model, {name: predict(model, x) for name, x in tests.items()})


def counterfactual_labels(labels, finding, present):
    """Labels of edited films: one finding changed, the others kept, No Finding recomputed.

    labels: DataFrame of the factuals' 14 findings; finding, present: one for all, or one a row.
    """
    findings = [finding] * len(labels) if isinstance(finding, str) else list(finding)
    values = [present] * len(labels) if np.ndim(present) == 0 else list(present)
    rows = [row for _, row in labels[list(FINDINGS)].iterrows()]
    edits = zip(rows, findings, values, strict=True)
    edited = [edit_labels(row, name, bool(value)) for row, name, value in edits]
    return pd.DataFrame(edited, index=labels.index, columns=list(FINDINGS), dtype=np.float32)


def check_source(patients, table):
    """Refuse edits of patients outside the training split: they would leak the test set.

    patients: of the edits; table: the cohort with patient_id and split.
    """
    train = set(table.loc[table["split"] == "train", "patient_id"])
    outside = [patient for patient in dict.fromkeys(patients) if patient not in train]
    if outside:
        raise AugmentError(
            f"{len(outside)} patients of the edits are not in the training split (the first is "
            f"{outside[0]}); train on edits of training films only."
        )


def correct_predictions(labels, probabilities, threshold=0.5):
    """1 where a prediction is right, 0 where wrong, NaN where the label is missing; any shape."""
    labels, probabilities = np.asarray(labels, dtype=float), np.asarray(probabilities)
    if labels.shape != probabilities.shape:
        raise AugmentError(f"labels {labels.shape} and probabilities {probabilities.shape} differ.")
    if not (np.isin(labels, (0, 1)) | np.isnan(labels)).all():
        raise AugmentError("labels must be 1, 0 or NaN; resolve uncertain ones when captioning.")
    right = (probabilities >= threshold) == (labels == 1)
    return np.where(np.isnan(labels), np.nan, right.astype(float))


def group_scores(
    labels,
    probabilities,
    heads,
    by=("Pleural Effusion", "Support Devices"),
    target="Pleural Effusion",
    patients=None,
    num_bootstrap=1000,
    seed=0,
):
    """Accuracy of one head in every group of two or more labels: one row a group.

    labels, probabilities (N, K) with K heads. Columns: one a label of `by` (its slug, 0 or 1),
    group (in words), n, accuracy, low, high (NaN without patients (N,)). A group without films
    has n = 0 and NaN; films with a missing label of `by` or of the target are in none.
    """
    labels, heads = np.asarray(labels, dtype=float), list(heads)
    for name in (*by, target):
        if name not in heads:
            raise AugmentError(f"{name} is no head; the classifier has {', '.join(heads)}.")
    column = heads.index(target)
    correct = correct_predictions(labels, probabilities)[:, column]
    known = ~np.isnan(correct)
    rows = []
    for values in product((0, 1), repeat=len(by)):
        wanted = zip(by, values, strict=True)
        inside = known & np.all([labels[:, heads.index(name)] == v for name, v in wanted], axis=0)
        who = np.arange(inside.sum()) if patients is None else np.asarray(patients)[inside]
        draws = 0 if patients is None else num_bootstrap
        accuracy, low, high = bootstrap_interval(correct[inside], who, draws, seed)
        row = {slug(name): value for name, value in zip(by, values, strict=True)}
        row |= {"group": _group_name(by, values), "n": int(inside.sum())}
        rows.append(row | {"accuracy": accuracy, "low": low, "high": high})
    return pd.DataFrame(rows)


def _group_name(by, values):
    return ", ".join(f"{'' if v else 'no '}{n.lower()}" for n, v in zip(by, values, strict=True))


def worst_group(scores, min_films=1):
    """The row of group_scores with the lowest accuracy, among groups of min_films or more."""
    able = scores[scores["n"] >= max(1, min_films)]
    if able.empty:
        raise AugmentError(f"no group has {max(1, min_films)} films; test on more films.")
    return able.loc[able["accuracy"].idxmin()]


def paired_difference(correct_a, correct_b, patients, num_bootstrap=1000, seed=0, level=0.95):
    """Mean of a - b over the same films, with an interval by patient: (mean, low, high).

    correct_ (N,): 1, 0 or NaN, or a mean over seeds; above 0: a is right more often.
    """
    a, b = _same_films(correct_a, correct_b)
    return bootstrap_interval(a - b, patients, num_bootstrap, seed, level)


class McNemar(NamedTuple):
    """Films that only a, and only b, got right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a, correct_b):
    """Test whether two classifiers differ on the same films: exact McNemar test (1 or 0 or NaN).

    It takes films as independent: with several films a patient, trust paired_difference.
    """
    from scipy.stats import binomtest

    a, b = _same_films(correct_a, correct_b)
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    differing = only_a + only_b
    p_value = binomtest(only_a, differing).pvalue if differing else 1.0
    return McNemar(only_a, only_b, float(p_value))


def _same_films(correct_a, correct_b):
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise AugmentError(f"shapes are {a.shape} and {b.shape}; the same films (N,) are needed.")
    return a, b


def finding_sentence(difference, arm, baseline, where, num_films):
    """Say in one sentence what a paired difference shows, whichever way it came out.

    difference: (mean, low, high) of paired_difference, arm minus baseline; where: what was tested
    ("the worst group (pleural effusion, no support devices)").
    """
    mean, low, high = (100 * value for value in difference)
    arm, baseline = arm.replace("_", " "), baseline.replace("_", " ")
    if np.isnan(mean):
        return f"Nothing can be said of {arm} against {baseline} in {where}: no film was tested."
    change = f"changed accuracy in {where} by {mean:+.1f} points against {baseline}"
    if np.isnan(low):
        return (
            f"Training on {arm} {change} (n = {num_films}), but too few patients were tested "
            "for an interval."
        )
    facts = f"(95 % interval {low:+.1f} to {high:+.1f}, n = {num_films})"
    if low > 0:
        verdict = "a gain that the interval confirms"
    elif high < 0:
        verdict = "a loss that the interval confirms"
    else:
        verdict = "the interval includes 0, so this run shows neither gain nor loss"
    return f"Training on {arm} {change} {facts}: {verdict}."
