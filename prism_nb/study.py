"""The study of the arms: what their predictions say (Table 3, Figure 7, and what the paper lacks).

Accuracy alone hides a shortcut; so a target (effusion) is scored in the four groups that it makes
with what it must not listen to (devices), in the worst of them, where the two conflict, and on
pairs of films that differ in one thing alone. Differences between arms are paired by film, with
intervals by patient. N films, K heads, S training seeds; correct (S, N): 1, 0 or NaN.
Used by notebook 06.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from prism_nb import phantom
from prism_nb.arms import AugmentError, group_of
from prism_nb.classifiers import score_heads
from prism_nb.metrics import bootstrap_interval, patient_codes, percentile_bounds, resample_patients

LEVEL_FILE = "tables/differences.csv"
RECORD = "steps/06_augment.json"  # of a run whose notebook 06 has finished
MEASURES = ("accuracy", "auroc", "ece")
NO_LINK = 0.58  # P(device | effusion) below this: devices tell nothing of effusions
GROUPS = (  # in the order of group_of
    "no pleural effusion, no support devices",
    "no pleural effusion, support devices",
    "pleural effusion, no support devices",
    "pleural effusion, support devices",
)
DEVICE_ALONE, EFFUSION_ALONE = 1, 2  # the groups in which the shortcut misleads; see group_of


@dataclass
class Test:
    """Films that no arm was trained on. paired: each patient's four, effusion x device, in turn."""

    films: np.ndarray  # uint8 (N, H, W)
    labels: np.ndarray  # (N, K)
    patients: np.ndarray  # (N,)
    paired: bool = False

    __test__ = False  # not one of pytest's


def balanced_test(cohort, heads, num_patients):
    """New patients of a phantom cohort's population, each under all four do(): a Test."""
    size = cohort.settings["image_size"]
    films, labels, patients = phantom.balanced_films(cohort.image_root, num_patients, size=size)
    labels = pd.DataFrame(labels)[list(heads)].to_numpy(np.float32)
    return Test(films, labels, np.asarray(patients), paired=True)


def link_of(cohort, labels, columns):
    """P(device | effusion): as the phantom was told, else of these labels (N, K), or NaN."""
    if phantom.is_phantom(cohort.image_root):
        return phantom.patient_of(cohort.image_root, cohort.table["film_id"].iloc[0]).confounding
    _, _, alone, both = group_sizes(labels, columns)
    return float(both / (alone + both)) if alone + both else np.nan


def correct_predictions(labels, probabilities, threshold=0.5):
    """1 where a prediction is right, 0 where wrong, NaN where the label is missing; any shape."""
    labels, probabilities = np.asarray(labels, dtype=float), np.asarray(probabilities)
    if labels.shape != probabilities.shape:
        raise AugmentError(f"labels {labels.shape} and probabilities {probabilities.shape} differ.")
    if not np.isfinite(probabilities).all():  # NaN would count as "absent"
        raise AugmentError("probabilities are not finite: lower classifier_learning_rate.")
    if not (np.isin(labels, (0, 1)) | np.isnan(labels)).all():
        raise AugmentError("labels must be 1, 0 or NaN; resolve uncertain ones when captioning.")
    right = (probabilities >= threshold) == (labels == 1)
    return np.where(np.isnan(labels), np.nan, right.astype(float))


def group_sizes(labels, columns):
    """How many films (N, K) each of the four groups of group_of holds; those of none count not."""
    groups = group_of(labels, columns)
    return np.bincount(groups[groups >= 0], minlength=4)


def head_accuracies(outcomes, test, heads, name="i.i.d.", num_bootstrap=1000, seed=0):
    """Table 3's numbers: accuracy of each head on a test, one row an arm, seed and head.

    Columns: arm, seed, group (the head), n, accuracy, low, high.
    """
    rows = []
    for o in outcomes:
        right = correct_predictions(test.labels, o.probabilities[name])
        for head, column in zip(heads, right.T, strict=True):
            known = ~np.isnan(column)
            found = bootstrap_interval(column[known], test.patients[known], num_bootstrap, seed)
            row = {"arm": o.arm, "seed": o.seed, "group": head, "n": int(known.sum())}
            rows.append(row | dict(zip(("accuracy", "low", "high"), found, strict=True)))
    return pd.DataFrame(rows)


def group_scores(labels, probabilities, columns, patients, num_bootstrap=1000, seed=0):
    """Accuracy of the target's head in each of the four groups: group, n, accuracy, low, high.

    labels, probabilities (N, K); columns: as for group_of, the target first. A group without films
    has n = 0 and NaN.
    """
    right, groups = correct_predictions(labels, probabilities), group_of(labels, columns)
    rows = []
    for group, name in enumerate(GROUPS):
        own = groups == group
        found = bootstrap_interval(
            right[own, columns[0]], np.asarray(patients)[own], num_bootstrap, seed
        )
        row = {"group": name, "n": int(own.sum())}
        rows.append(row | dict(zip(("accuracy", "low", "high"), found, strict=True)))
    return pd.DataFrame(rows)


def score_outcome(outcome, tests, columns):
    """One trained arm in numbers, all of the target's head: a dict, one row of tables/arms.csv.

    Accuracy, AUROC and ECE of each test, and of the balanced one where the two labels conflict,
    with and without a device; the worst group; and, where films are paired, paired_effects.
    """
    row = {"arm": outcome.arm, "seed": outcome.seed}
    for name, test in tests.items():
        said, groups = outcome.probabilities[name], group_of(test.labels, columns)
        parts = {name: groups >= -1}
        if name == "balanced":
            parts["conflict"] = np.isin(groups, (DEVICE_ALONE, EFFUSION_ALONE))
            parts |= {"with device": groups % 2 == 1, "without device": groups % 2 == 0}
            parts["with device"] &= groups >= 0
            right = correct_predictions(test.labels, said)[None, :, columns[0]]
            row["worst group"] = float(_worst(right, groups, test.patients)().mean())
        for part, rows in parts.items():
            shown = test.labels[rows], said[rows]
            shown = [values[:, [columns[0]]] for values in shown]
            scores = score_heads(*shown, test.patients[rows], ["target"], 0).iloc[0]
            row |= {f"{part} {measure}": scores[measure] for measure in MEASURES}
        if test.paired:
            row |= paired_effects(said[:, columns[0]])
    return row


def paired_effects(probabilities):
    """What changing one thing alone does to a head; (4 P,): P patients x effusion x device.

    flip_device: share of pairs whose answer the device turns, reliance: mean change of the
    probability that it makes, both best at 0; follow_effusion: share of pairs in which the answer
    follows the effusion, best at 1.
    """
    q = np.asarray(probabilities, dtype=float).reshape(-1, 2, 2)  # patient, effusion, device
    yes = q >= 0.5
    return {
        "flip_device": float((yes[..., 0] != yes[..., 1]).mean()),
        "reliance": float(np.abs(q[..., 1] - q[..., 0]).mean()),
        "follow_effusion": float((yes[:, 1] & ~yes[:, 0]).mean()),
    }


def worst_difference(
    correct_a, correct_b, groups, patients, num_bootstrap=1000, seed=0, level=0.95
):
    """Accuracy of a in its worst group less that of b in its own: (mean, low, high).

    correct_ (S, N); groups (N,), below 0: in none. The worst group is looked for in each seed and
    each resample anew, so that none is chosen for having come out badly; then seeds are averaged.
    One group alone gives the plain paired difference. NaN where no film is in any group.
    """
    a, b = (np.atleast_2d(np.asarray(c, dtype=float)) for c in (correct_a, correct_b))
    if a.shape[1:] != b.shape[1:]:
        raise AugmentError(f"shapes are {a.shape} and {b.shape}; the same films (N,) are needed.")
    worst = [_worst(correct, groups, patients) for correct in (a, b)]
    num_patients = len(np.unique(patient_codes(patients)))
    draws = [
        worst[0](weights).mean(axis=1) - worst[1](weights).mean(axis=1)
        for weights in resample_patients(num_patients, num_bootstrap, seed)
    ]
    mean = float(worst[0]().mean() - worst[1]().mean())
    return mean, *percentile_bounds(draws, level)


def _worst(correct, groups, patients):
    """A function of how often each patient counts, (r, P), to the worst accuracies (r, S)."""
    codes, groups = patient_codes(patients), np.asarray(groups)
    known = ~np.isnan(correct[0]) & (groups >= 0)
    shape = correct.shape[0], groups.max() + 1, codes.max() + 1  # (S, G, P)
    right, films = np.zeros(shape), np.zeros(shape[1:])
    np.add.at(films, (groups[known], codes[known]), 1)
    np.add.at(right, (slice(None), groups[known], codes[known]), correct[:, known])

    def worst(weights=None):
        weights = np.ones((1, shape[2])) if weights is None else weights
        hits, count = np.einsum("rp,sgp->rsg", weights, right), (weights @ films.T)[:, None]
        accuracy = np.divide(hits, count, out=np.full(hits.shape, np.inf), where=count > 0)
        least = accuracy.min(axis=2, initial=np.inf)  # a group without films is not the worst
        return np.where(np.isfinite(least), least, np.nan)  # NaN: no film in any group

    return worst


class McNemar(NamedTuple):
    """Films that only a, and only b, got right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a, correct_b):
    """Test whether two classifiers differ on the same films: exact McNemar test (1 or 0 or NaN).

    It takes films as independent: with several films a patient, trust the interval.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise AugmentError(f"shapes are {a.shape} and {b.shape}; the same films (N,) are needed.")
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    differing = only_a + only_b
    p_value = binomtest(only_a, differing).pvalue if differing else 1.0
    return McNemar(only_a, only_b, float(p_value))


def compare(outcomes, tests, columns, arm, baseline="plain", num_bootstrap=1000, seed=0):
    """One arm against another over the same films and seeds: a row a measure.

    measure: worst group, conflict (balanced films on which the shortcut misleads) and i.i.d.; NaN
    where no film tells.
    Columns: films, accuracy and baseline_accuracy (means over seeds), mean, low, high (of their
    difference), seed_low, seed_high (its range over seeds), and McNemar's test between the two
    means of the seeds' probabilities (only_a: films that the arm alone gets right).
    """
    groups = group_of(tests["balanced"].labels, columns)
    conflict = np.isin(groups, (DEVICE_ALONE, EFFUSION_ALONE)).astype(int) - 1
    every = np.zeros(len(tests["i.i.d."].labels), int)
    rows = []
    for measure, name, cells in (
        ("worst group", "balanced", groups),
        ("conflict", "balanced", conflict),
        ("i.i.d.", "i.i.d.", every),
    ):
        truth, who = tests[name].labels[:, columns[0]], tests[name].patients
        said = [_by_seed(outcomes, each, name)[..., columns[0]] for each in (arm, baseline)]
        right = [correct_predictions(np.broadcast_to(truth, q.shape), q) for q in said]
        mean, low, high = worst_difference(*right, cells, who, num_bootstrap, seed)
        by_seed = [_worst(each, cells, who)()[0] for each in right]
        voted = [correct_predictions(truth, q.mean(axis=0))[cells >= 0] for q in said]
        row = {"arm": arm, "baseline": baseline, "measure": measure}
        row |= {"films": ((cells >= 0) & ~np.isnan(truth)).sum()}
        row |= {"accuracy": by_seed[0].mean(), "baseline_accuracy": by_seed[1].mean()}
        row |= {"mean": mean, "low": low, "high": high}
        row |= {"seed_low": min(by_seed[0] - by_seed[1]), "seed_high": max(by_seed[0] - by_seed[1])}
        rows.append(row | mcnemar(*voted)._asdict())
    return pd.DataFrame(rows)


def _by_seed(outcomes, arm, test):
    """Probabilities (S, N, K) of an arm on a test, by seed."""
    own = sorted((o for o in outcomes if o.arm == arm), key=lambda o: o.seed)
    if not own:
        raise AugmentError(f"no outcome of the arm {arm}; train it, or leave it out.")
    return np.stack([o.probabilities[test] for o in own])


def finding_sentence(difference, arm, baseline, where, num_films, seeds=(0.0, 0.0)):
    """Say in one sentence what a paired difference shows, whichever way it came out.

    difference: (mean, low, high), arm minus baseline; where: what was tested ("all films");
    seeds: (low, high) over trainings, which the interval, over patients, knows nothing of.
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
    least, most = (100 * value for value in seeds)
    by_training = f"; by training {least:+.1f} to {most:+.1f}" if least < most else ""
    facts = f"(95 % interval {low:+.1f} to {high:+.1f}, n = {num_films}{by_training})"
    kind, agree = "gain" if low > 0 else "loss", least == most or least > 0 or most < 0
    verdict = f"a {kind} that the interval confirms"
    if not agree:
        verdict = f"a {kind} on these films, but not in every training"
    if low <= 0 <= high:
        verdict = "the interval includes 0, so this run shows neither gain nor loss"
    return f"Training on {arm} {change} {facts}: {verdict}."


def read_levels(folders):
    """Differences of finished runs, which hold their own level: (table, folders without any)."""
    folders = [Path(folder) for folder in folders]
    done = [f for f in folders if (f / LEVEL_FILE).is_file() and (f / RECORD).is_file()]
    tables = [pd.read_csv(f / LEVEL_FILE) for f in done]
    missing = [f.name for f in folders if f not in done]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), missing


def check_goals(differences, levels=None):
    """What was hoped for, fixed beforehand, against what came out: goal, found, met.

    differences: of compare, counterfactuals against every other arm, and true ones against plain;
    levels: the table of the sweep, for the negative control. What was not tested has no row.
    """
    worst = differences[differences["measure"] == "worst group"].set_index(["arm", "baseline"])
    everywhere = differences[differences["measure"] == "i.i.d."].set_index(["arm", "baseline"])
    own, true = "counterfactuals", "true_counterfactuals"
    gain, iid = (table.loc[(own, "plain")] for table in (worst, everywhere))
    met = gain["mean"] >= 0.1 and gain["low"] > 0
    goals = []
    if pd.notna(gain["mean"]):
        goals.append(
            ("10 points over plain in the worst group, interval above 0", _points(gain), met)
        )
    if (true, "plain") in worst.index and worst["mean"][true, "plain"] > 0:
        share = gain["mean"] / worst["mean"][true, "plain"]
        goals.append(
            ("70 % of what true counterfactuals gain", f"{100 * share:.0f} %", share >= 0.7)
        )
    others = worst.loc[own].drop(["plain", true], errors="ignore").dropna(subset="mean")
    if len(others):
        name = others["mean"].idxmin()
        goal = f"more than every other arm (nearest: {name.replace('_', ' ')})"
        goals.append((goal, _points(others.loc[name]), others["mean"][name] > 0))
    if pd.notna(iid["mean"]):
        goals.append(("no loss beyond 1 point i.i.d.", _points(iid), iid["mean"] >= -0.01))
    if levels is not None and len(levels):
        weakest = levels["level"] == levels["level"].min()
        free = levels[weakest & (levels["level"] < NO_LINK) & (levels["measure"] == "worst group")]
        free = free[(free["arm"] == own) & (free["baseline"] == "plain")].dropna(subset="mean")
        if len(free):  # several runs may stand at that level: the one that gained most is said
            most = free.sort_values("low", na_position="first").iloc[-1]
            goals.append(("no gain without a link", _points(most), not most["low"] > 0))
    return pd.DataFrame(goals, columns=["goal", "found", "met"])


def _points(row):
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['mean']:+.1f} points ({low:+.1f} to {high:+.1f})"
