"""The study: groups, the worst of them, pairs, differences by patient, and honest sentences."""

import numpy as np
import pandas as pd
import pytest

from prism_nb import study as a
from prism_nb.arms import AugmentError, Outcome
from prism_nb.files import write_json
from prism_nb.findings import PAPER_HEADS
from prism_nb.run import record_path

HEADS = list(PAPER_HEADS)
EFFUSION, DEVICES = COLUMNS = [HEADS.index("Pleural Effusion"), HEADS.index("Support Devices")]


def test_correct_predictions():
    right = a.correct_predictions([[1, 0, np.nan, 1]], [[0.6, 0.6, 0.6, 0.5]])
    assert np.array_equal(right, [[1, 0, np.nan, 1]], equal_nan=True)
    with pytest.raises(AugmentError, match="1, 0 or NaN"):
        a.correct_predictions([-1], [0.5])
    with pytest.raises(AugmentError, match="differ"):
        a.correct_predictions([1, 0], [0.5])
    with pytest.raises(AugmentError, match="not finite"):
        a.correct_predictions([1, 0], [0.5, np.nan])


def cells():
    """Films in three of the four cells: 3, 2 and 1; and one whose device is not known."""
    labels = np.zeros((7, 4))
    labels[:, EFFUSION] = [0, 0, 0, 1, 1, 1, 1]
    labels[:, DEVICES] = [0, 0, 0, 1, 1, 0, np.nan]
    probabilities = np.full((7, 4), 0.5)
    probabilities[:, EFFUSION] = [0.1, 0.2, 0.9, 0.9, 0.8, 0.1, 0.9]
    return labels, probabilities


def test_group_cells_are_counted_and_scored():
    scores = a.group_scores(*cells(), COLUMNS, list("abcdefg"), num_bootstrap=50)
    assert scores["group"].tolist() == [
        "no pleural effusion, no support devices",
        "no pleural effusion, support devices",
        "pleural effusion, no support devices",
        "pleural effusion, support devices",
    ]
    assert scores["n"].tolist() == [3, 0, 1, 2]
    assert np.allclose(scores["accuracy"], [2 / 3, np.nan, 0, 1], equal_nan=True)
    assert scores.loc[0, "low"] < 2 / 3 < scores.loc[0, "high"]


def test_films_of_no_group_are_in_no_size():
    assert a.group_sizes(cells()[0], COLUMNS).tolist() == [3, 0, 1, 2]


def test_worst_groups_are_compared_each_with_its_own():
    groups, patients = np.array([0, 0, 0, 0, 1, 1]), list("aabbcc")
    b = np.array([[1, 1, 1, 0, 0, 0]])  # worst: group 1, 0 of 2
    a_ = np.array([[1, 0, 0, 0, 1, 1]])  # worst: group 0, 1 of 4
    assert a.worst_difference(a_, b, groups, patients, 20)[0] == pytest.approx(0.25)
    both = np.concatenate([a_, b]), np.concatenate([b, b])
    assert a.worst_difference(*both, groups, patients, 20)[0] == pytest.approx(0.125)
    assert a.worst_difference(b, b, groups, patients, 20) == (0, 0, 0)
    outside = np.where(groups == 1, -1, groups)  # then both have one group
    assert a.worst_difference(a_, b, outside, patients, 20)[0] == pytest.approx(-0.5)


def test_intervals_of_the_worst_group_are_those_of_resampled_patients():
    rng = np.random.default_rng(0)
    groups, patients = np.tile(np.arange(4), 30), np.repeat(np.arange(30), 4)
    a_, b = rng.random((2, 3, 120)) < np.array([0.8, 0.6])[:, None, None]
    mean, low, high = a.worst_difference(a_, b, groups, patients, 400, seed=1)

    def worst(correct, rows):
        by_group = [correct[:, rows[groups[rows] == g]].mean(axis=1) for g in range(4)]
        return np.min(by_group, axis=0).mean()

    assert mean == pytest.approx(worst(a_, np.arange(120)) - worst(b, np.arange(120)))
    draws = []
    for _ in range(400):
        rows = np.concatenate([np.arange(4) + 4 * p for p in rng.integers(0, 30, 30)])
        draws.append(worst(a_, rows) - worst(b, rows))
    assert np.allclose((low, high), np.quantile(draws, (0.025, 0.975)), atol=0.04)


def test_one_group_alone_is_the_paired_difference_and_narrower_than_unpaired():
    rng = np.random.default_rng(1)
    plain = (rng.random(400) < 0.6).astype(float)
    better = np.where(rng.random(400) < 0.1, 1.0, plain)
    one = np.zeros(400, int)
    mean, low, high = a.worst_difference(better, plain, one, np.arange(400), 500)
    assert mean == pytest.approx(better.mean() - plain.mean())
    assert 0 < low < mean < high
    assert high - low < 0.1  # unpaired: 2 x 1.96 x sqrt(2 x 0.24 / 400) = 0.14
    with pytest.raises(AugmentError, match="the same films"):
        a.worst_difference(better[:3], plain, one, np.arange(400))
    assert np.isnan(a.worst_difference(better, plain, one - 1, np.arange(400), 5)).all()


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


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ((0.02, 0.3), ", n = 60; by training +2.0 to +30.0): a gain that the interval confirms."),
        ((-0.02, 0.3), "-2.0 to +30.0): a gain on these films, but not in every training."),
        ((0.12, 0.12), "n = 60): a gain that the interval confirms."),
    ],
)
def test_a_sentence_says_whether_the_trainings_agree(seeds, words):
    said = a.finding_sentence((0.12, 0.04, 0.2), "duplicates", "plain", "all films", 60, seeds)
    assert said.endswith(words)


def test_paired_effects_by_hand():
    ignores = [0.1, 0.1, 0.9, 0.9]  # films: neither, device, effusion, both
    leans = [0.1, 0.9, 0.1, 0.9]
    values = a.paired_effects([*ignores, *leans])
    assert values["flip_device"] == 0.5
    assert values["reliance"] == pytest.approx(0.4)
    assert values["follow_effusion"] == 0.5


@pytest.fixture
def tests():
    """Two i.i.d. films; three balanced patients."""
    labels = np.zeros((12, 4), np.float32)
    labels[:, EFFUSION], labels[:, DEVICES] = np.tile([0, 0, 1, 1], 3), np.tile([0, 1, 0, 1], 3)
    films = np.zeros((12, 4, 4), np.uint8)
    balanced = a.Test(films, labels, np.repeat(["p", "q", "r"], 4), paired=True)
    return {"i.i.d.": a.Test(films[:2], labels[[0, 3]], np.array(["x", "y"])), "balanced": balanced}


def outcome(arm, seed, effusion):
    """An arm that says of each film's effusion what a function of (effusion, device) says."""
    balanced = np.full((12, 4), 0.2)
    pairs = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (3, 1))
    balanced[:, EFFUSION] = [effusion(*pair) for pair in pairs]
    iid = np.full((2, 4), 0.2)
    iid[:, EFFUSION] = effusion(0, 0), effusion(1, 1)
    return Outcome(arm, seed, {"i.i.d.": iid, "balanced": balanced}, 1.0, None)


def outcomes():
    made = [outcome("plain", seed, lambda e, d: 0.1 + 0.8 * d) for seed in (0, 1)]
    made += [outcome("counterfactuals", seed, lambda e, d: 0.1 + 0.8 * e) for seed in (0, 1)]
    return made + [outcome("duplicates", seed, lambda e, d: 0.1 + 0.8 * d) for seed in (0, 1)]


def test_an_outcome_in_numbers(tests):
    plain, robust = (a.score_outcome(outcomes()[k], tests, COLUMNS) for k in (0, 2))
    assert (plain["i.i.d. accuracy"], robust["i.i.d. accuracy"]) == (1, 1)
    assert (plain["worst group"], robust["worst group"]) == (0, 1)
    assert (plain["conflict accuracy"], plain["conflict auroc"]) == (0, 0)
    assert (plain["with device auroc"], robust["without device auroc"]) == (0.5, 1)
    assert (plain["flip_device"], plain["follow_effusion"]) == (1, 0)
    assert robust["balanced ece"] == pytest.approx(0.1)
    unpaired = {name: a.Test(t.films, t.labels, t.patients) for name, t in tests.items()}
    assert "flip_device" not in a.score_outcome(outcomes()[0], unpaired, COLUMNS)


def test_accuracy_of_each_head(tests):
    table = a.head_accuracies(outcomes()[:2], tests["i.i.d."], HEADS)
    assert table["group"].tolist() == HEADS * 2
    assert table["accuracy"].tolist() == [1, 1, 1, 0.5] * 2  # of two films one has a device


def test_two_arms_compared(tests):
    rows = a.compare(outcomes(), tests, COLUMNS, "counterfactuals", num_bootstrap=30)
    rows = rows.set_index("measure")
    assert rows.loc["worst group", ["mean", "low", "high"]].tolist() == [1, 1, 1]
    assert rows.loc["conflict", ["films", "only_a", "only_b"]].tolist() == [6, 6, 0]
    assert rows.loc["i.i.d.", ["mean", "seed_low", "seed_high", "p_value"]].tolist() == [0, 0, 0, 1]
    assert rows.loc["worst group", ["accuracy", "baseline_accuracy"]].tolist() == [1, 0]
    tests["i.i.d."].labels[0, EFFUSION] = np.nan
    rows = a.compare(outcomes(), tests, COLUMNS, "counterfactuals", num_bootstrap=30)
    assert rows["films"].tolist() == [12, 6, 1]  # those of which something is known
    with pytest.raises(AugmentError, match="no outcome of the arm group_dro"):
        a.compare(outcomes(), tests, COLUMNS, "group_dro")


def test_what_no_film_tells_is_nan(tests):
    tests["balanced"].labels[:, DEVICES] = tests["balanced"].labels[:, EFFUSION]
    row = a.score_outcome(outcomes()[2], tests, COLUMNS)
    assert np.isnan([row["conflict accuracy"], row["conflict auroc"]]).all()
    rows = a.compare(outcomes(), tests, COLUMNS, "counterfactuals", num_bootstrap=30)
    rows = rows.set_index("measure")
    assert rows["films"].tolist() == [12, 0, 2]
    told = ["accuracy", "baseline_accuracy", "mean", "low", "high", "seed_low", "seed_high"]
    assert rows[told].isna().all(axis=1).tolist() == [False, True, False]
    tests["balanced"].labels[:, DEVICES] = np.nan  # a cohort without that label
    assert np.isnan(a.score_outcome(outcomes()[2], tests, COLUMNS)["worst group"])
    rows = a.compare(outcomes(), tests, COLUMNS, "counterfactuals", num_bootstrap=30)
    assert rows["mean"].isna().tolist() == [True, True, False]
    assert a.check_goals(rows)["goal"].tolist() == ["no loss beyond 1 point i.i.d."]


def test_a_resample_without_any_film_of_the_groups_counts_not():
    groups, right, wrong = [0, -1, -1, -1], np.ones((1, 4)), np.zeros((1, 4))
    assert a.worst_difference(right, wrong, groups, list("abcd"), 50) == (1, 1, 1)


def differences(gain, low, ceiling, other, iid, level=0.9):
    """The table of a study in which counterfactuals came out so."""
    rows = [
        ("counterfactuals", "plain", "worst group", gain, low),
        ("counterfactuals", "plain", "i.i.d.", iid, iid),
        ("true_counterfactuals", "plain", "worst group", ceiling, ceiling),
        ("counterfactuals", "true_counterfactuals", "worst group", gain - ceiling, -1),
        ("counterfactuals", "duplicates", "worst group", gain - other, -1),
    ]
    frame = pd.DataFrame(rows, columns=["arm", "baseline", "measure", "mean", "low"])
    return frame.assign(high=frame["mean"] + 0.01, level=level)


def test_goals_are_checked_both_ways():
    free = differences(0.01, -0.02, 0.02, 0.0, 0.0, level=0.567)
    good = a.check_goals(differences(0.12, 0.05, 0.15, 0.02, 0.0), free)
    assert good["met"].tolist() == [True] * 5
    assert good["found"][0] == "+12.0 points (+5.0 to +13.0)"
    assert good["found"][1] == "80 %"
    gains_anyway = differences(0.1, 0.02, 0.2, 0.0, 0.0, level=0.567)
    bad = a.check_goals(differences(0.08, 0.05, 0.15, 0.09, -0.02), gains_anyway)
    assert bad["met"].tolist() == [False] * 5
    both = pd.concat([free, differences(0.1, 0.02, 0.2, 0.0, 0.0, level=0.57)])
    assert a.check_goals(differences(0.12, 0.05, 0.15, 0.02, 0.0), both)["met"].all()  # the lower
    twice = pd.concat([free, free, differences(0.1, 0.02, 0.2, 0.0, 0.0, level=0.567)])
    same = a.check_goals(differences(0.12, 0.05, 0.15, 0.02, 0.0), twice).iloc[-1]
    assert same.tolist() == ["no gain without a link", "+10.0 points (+2.0 to +11.0)", False]
    unsure = pd.concat([free, free.assign(low=np.nan)])  # too few patients for an interval
    kept = a.check_goals(differences(0.12, 0.05, 0.15, 0.02, 0.0), unsure).iloc[-1]
    assert kept.tolist() == ["no gain without a link", "+1.0 points (-2.0 to +2.0)", True]
    untold = a.check_goals(differences(0.12, -0.01, -0.1, 0.02, 0.0))
    assert untold["met"].tolist() == [False, True, True]  # no ceiling to reach, no sweep


def test_levels_of_finished_runs(tmp_path):
    path = tmp_path / "study-75" / a.LEVEL_FILE
    path.parent.mkdir(parents=True)
    differences(0.1, 0.0, 0.1, 0.0, 0.0, level=0.75).to_csv(path, index=False)
    assert a.read_levels([tmp_path / "study-75"])[1] == ["study-75"]  # 06 was cut short
    write_json(record_path(tmp_path / "study-75", "06_augment"), {})
    levels, missing = a.read_levels([tmp_path / "study-75", tmp_path / "study-95"])
    assert levels["level"].unique() == [0.75]
    assert missing == ["study-95"]
    assert a.read_levels([])[0].empty


def test_balanced_films_and_the_link(make_cohort):
    cohort = make_cohort(8, 64)
    test = a.balanced_test(cohort, HEADS, 2)
    assert test.films.shape == (8, 64, 64)
    assert a.group_of(test.labels, COLUMNS).tolist() == [0, 1, 2, 3] * 2
    assert a.link_of(cohort, test.labels, COLUMNS) == 0.75
    cohort.image_root = cohort.image_root / "elsewhere"  # no phantom: the labels say it
    assert a.link_of(cohort, test.labels[:6], COLUMNS) == pytest.approx(1 / 2)
    assert np.isnan(a.link_of(cohort, test.labels[:2], COLUMNS))  # no film with an effusion
