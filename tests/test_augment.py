"""Augmentation: equal budgets, labels of counterfactuals, groups, and paired comparisons."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from prism_nb import augment as a
from prism_nb.findings import FINDINGS, PAPER_HEADS

HEADS = list(PAPER_HEADS)
EFFUSION, DEVICES = HEADS.index("Pleural Effusion"), HEADS.index("Support Devices")


def films(num, value, heads=4):
    """Films whose grey value says where they come from, and labels with their number in front."""
    labels = np.zeros((num, heads), dtype=np.float32)
    labels[:, 0] = np.arange(num) % 2
    return np.full((num, 4, 4), value, dtype=np.uint8), labels


REAL = films(10, 10)
EXTRA = {"counterfactuals": films(6, 20), "true_counterfactuals": films(6, 30)}


def test_arms_have_equal_budgets():
    sizes = {name: len(a.build_arm(name, *REAL, EXTRA)[0]) for name in a.ARMS}
    assert sizes == {
        "plain": 10,
        "duplicates": 16,
        "counterfactuals": 16,
        "true_counterfactuals": 16,
    }
    for name, value in (("duplicates", 10), ("counterfactuals", 20), ("true_counterfactuals", 30)):
        images, labels = a.build_arm(name, *REAL, EXTRA)
        assert np.array_equal(images[:10], REAL[0])
        assert (images[10:] == value).all()
        assert labels.shape == (16, 4)


def test_smallest_extra_sets_the_budget():
    extra = {"counterfactuals": films(7, 20), "true_counterfactuals": films(3, 30)}
    assert {len(a.build_arm(name, *REAL, extra)[0]) for name in a.ARMS[1:]} == {13}


def test_paired_extras_of_one_size_are_kept_whole_and_in_order():
    _, labels = a.build_arm("counterfactuals", *REAL, EXTRA)
    assert np.array_equal(labels[10:], EXTRA["counterfactuals"][1])


def test_duplicates_repeat_every_film_before_any_twice():
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), dtype=np.uint8)
    many = {"counterfactuals": films(12, 99, 1)}
    arm, _ = a.build_arm("duplicates", images, np.zeros((5, 1)), many, seed=1)
    times = np.bincount(arm[:, 0, 0])
    assert times.sum() == 17
    assert times.min() == 3
    assert times.max() == 4
    again, _ = a.build_arm("duplicates", images, np.zeros((5, 1)), many, seed=1)
    assert np.array_equal(arm, again)


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("counterfactual", EXTRA, "nearest is 'counterfactuals'"),
        ("counterfactuals", {}, "extra films are none"),
        ("duplicates", {"counterfactuals": films(0, 20)}, "counterfactuals 0"),
        ("true_counterfactuals", {"counterfactuals": films(6, 20)}, "counterfactuals 6"),
        ("counterfactuals", {"counterfactuals": films(6, 20, 3)}, "with 3 labels"),
        ("duplicates", {"counterfactuals": (REAL[0] / 255, REAL[1])}, "float64"),
        ("duplicates", {"counterfactuals": (REAL[0], REAL[1][:4])}, "are needed"),
    ],
)
def test_arms_that_cannot_be_built_are_one_line(name, extra, words):
    with pytest.raises(a.AugmentError) as error:
        a.build_arm(name, *REAL, extra)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_real_films_are_refused():
    with pytest.raises(a.AugmentError, match="no real films"):
        a.build_arm("plain", *films(0, 10))


def test_counterfactual_labels_change_one_finding_and_recompute_no_finding():
    factual = pd.DataFrame(0.0, index=[5, 6, 7], columns=list(FINDINGS))
    factual.loc[5, ["Pleural Effusion", "Support Devices"]] = 1
    factual.loc[6, ["Pleural Effusion", "Edema"]] = 1
    factual.loc[7, ["No Finding"]] = 1
    edited = a.counterfactual_labels(factual, "Pleural Effusion", [False, False, True])
    assert edited["Pleural Effusion"].tolist() == [0, 0, 1]
    assert edited["No Finding"].tolist() == [1, 0, 0]
    others = [name for name in FINDINGS if name not in ("Pleural Effusion", "No Finding")]
    assert edited[others].equals(factual[others].astype(np.float32))
    devices = a.counterfactual_labels(factual, ["Support Devices"] * 3, False)
    assert devices["No Finding"].tolist() == [0, 0, 1]
    assert a.counterfactual_labels(factual[:0], "Edema", True).shape == (0, 14)


def test_edits_of_test_patients_are_refused():
    table = pd.DataFrame({"patient_id": ["a", "b", "c"], "split": ["train", "test", "train"]})
    a.check_source(["a", "c", "a"], table)
    with pytest.raises(a.AugmentError, match=r"1 patients .*\(the first is b\)"):
        a.check_source(["a", "b", "b"], table)


def test_correct_predictions():
    right = a.correct_predictions([[1, 0, np.nan, 1]], [[0.6, 0.6, 0.6, 0.5]])
    assert np.array_equal(right, [[1, 0, np.nan, 1]], equal_nan=True)
    with pytest.raises(a.AugmentError, match="1, 0 or NaN"):
        a.correct_predictions([-1], [0.5])
    with pytest.raises(a.AugmentError, match="differ"):
        a.correct_predictions([1, 0], [0.5])


def cells():
    """Films in three of the four cells: 3, 2 and 1; and one whose device is not known."""
    labels = np.zeros((7, 4))
    labels[:, EFFUSION] = [0, 0, 0, 1, 1, 1, 1]
    labels[:, DEVICES] = [0, 0, 0, 1, 1, 0, np.nan]
    probabilities = np.full((7, 4), 0.5)
    probabilities[:, EFFUSION] = [0.1, 0.2, 0.9, 0.9, 0.8, 0.1, 0.9]
    return labels, probabilities


def test_group_cells_are_counted_and_scored():
    scores = a.group_scores(*cells(), HEADS)
    assert scores["group"].tolist() == [
        "no pleural effusion, no support devices",
        "no pleural effusion, support devices",
        "pleural effusion, no support devices",
        "pleural effusion, support devices",
    ]
    assert scores["n"].tolist() == [3, 0, 1, 2]
    assert np.allclose(scores["accuracy"], [2 / 3, np.nan, 0, 1], equal_nan=True)
    assert scores["pleural_effusion"].tolist() == [0, 0, 1, 1]
    assert scores["support_devices"].tolist() == [0, 1, 0, 1]
    assert scores["low"].isna().all()
    by_patient = a.group_scores(*cells(), HEADS, patients=list("abcdefg"), num_bootstrap=50)
    assert by_patient.loc[0, "low"] < 2 / 3 < by_patient.loc[0, "high"]


def test_worst_group_needs_films():
    scores = a.group_scores(*cells(), HEADS)
    assert a.worst_group(scores)["group"] == "pleural effusion, no support devices"
    assert a.worst_group(scores, min_films=2)["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(a.AugmentError, match="no group has 4 films"):
        a.worst_group(scores, min_films=4)
    with pytest.raises(a.AugmentError, match="Edema is no head"):
        a.group_scores(*cells(), HEADS, target="Edema")


def test_identical_arms_differ_by_exactly_nothing():
    correct = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    assert a.paired_difference(correct, correct, np.arange(50) // 2) == (0, 0, 0)
    assert a.mcnemar(correct, correct) == (0, 0, 1.0)


def test_paired_difference_is_signed_and_narrower_than_unpaired():
    rng = np.random.default_rng(1)
    plain = (rng.random(400) < 0.6).astype(float)
    better = np.where(rng.random(400) < 0.1, 1.0, plain)
    mean, low, high = a.paired_difference(better, plain, np.arange(400), 500)
    assert mean == pytest.approx(better.mean() - plain.mean())
    assert 0 < low < mean < high
    assert high - low < 0.1  # unpaired: 2 x 1.96 x sqrt(2 x 0.24 / 400) = 0.14
    gaps = np.where(np.arange(400) < 10, np.nan, better)
    assert np.isfinite(a.paired_difference(gaps, plain, np.arange(400), 50)).all()
    with pytest.raises(a.AugmentError, match="the same films"):
        a.paired_difference(better[:3], plain, np.arange(400))


def test_mcnemar_by_hand():
    only_a, only_b = [1] * 8 + [0], [0] * 8 + [1]
    test = a.mcnemar([*only_a, 1, 0, np.nan], [*only_b, 1, 0, 1])
    assert (test.only_a, test.only_b) == (8, 1)
    assert test.p_value == pytest.approx(2 * (1 + 9) / 2**9)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.12, 0.04, 0.2), "by +12.0 points against plain (95 % interval +4.0 to +20.0, n = 60)"),
        ((0.12, 0.04, 0.2), "a gain that the interval confirms."),
        ((-0.12, -0.2, -0.04), "a loss that the interval confirms."),
        ((0.02, -0.04, 0.08), "neither gain nor loss."),
        ((0.0, 0.0, 0.0), "neither gain nor loss."),
        ((0.12, np.nan, np.nan), "too few patients"),
        ((np.nan, np.nan, np.nan), "no film was tested"),
    ],
)
def test_sentence_is_honest_both_ways(difference, words):
    text = a.finding_sentence(difference, "true_counterfactuals", "plain", "the worst group", 60)
    assert words in text
    assert "true counterfactuals" in text
    assert text.count("\n") == 0


def test_arms_train_for_the_same_steps(monkeypatch, request):
    import torch

    from prism_nb import classifiers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 255, (20, 32, 32)).astype(np.uint8)
    labels = rng.integers(0, 2, (20, 4)).astype(np.float32)
    rows = {"train": np.arange(14), "val": np.arange(14, 20)}
    extra = {"counterfactuals": (shown[:5], labels[:5])}
    sane, steps = classifiers.fit, []

    def counted(*args, **settings):
        steps.append([epoch.step for epoch in sane(*args, **settings)][-1])
        yield

    monkeypatch.setattr(classifiers, "fit", counted)
    params = SimpleNamespace(
        classifier="test_efficientnet",
        classifier_weights="",
        classifier_size=0,
        classifier_epochs=2,
        classifier_batch_size=8,
        classifier_learning_rate=5e-3,
        num_augment_seeds=2,
        seed=3,
    )
    tests = {"i.i.d.": shown[:6], "balanced": shown[6:10]}
    arms = ["plain", "duplicates", "counterfactuals"]
    outcomes = list(a.train_arms(arms, shown, labels, rows, extra, tests, HEADS, params))
    assert [(o.arm, o.seed) for o in outcomes] == [(arm, seed) for seed in (3, 4) for arm in arms]
    assert steps == [2 * 3] * 6  # 14 + 5 films in batches of 8
    assert outcomes[0].probabilities["balanced"].shape == (4, 4)
