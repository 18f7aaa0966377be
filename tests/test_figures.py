"""Figures and the pager: data in, Axes out, nothing shown or left open."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from prism_nb import figures

FILMS = np.random.default_rng(0).random((3, 16, 16), np.float32)


def legend(ax):
    """What the legend below the axes says; it hides no data."""
    assert ax.get_legend() is None
    (below,) = ax.figure.legends
    return [text.get_text() for text in below.get_texts()]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_films_are_shown_on_one_scale():
    axes = figures.plot_films((FILMS * 255).astype(np.uint8), ["a"] * 3, columns=2)
    image = axes.flat[0].images[0]
    assert image.get_clim() == (0, 1)
    assert image.get_array().max() <= 1
    assert axes.shape == (2, 2)
    assert not axes.flat[3].images


def test_difference_is_counterfactual_minus_factual():
    brighter = np.clip(FILMS + 0.2, 0, 1)
    axes = figures.plot_edits(FILMS, brighter, ["x"] * 3, truth=brighter)
    assert axes.shape == (3, 5)
    difference = axes[0, 2].images[0]
    np.testing.assert_allclose(difference.get_array(), brighter[0] - FILMS[0], atol=1e-6)
    low, high = difference.get_clim()
    assert low == -high


def test_masks_stand_beside_edits_and_the_truth_after_them():
    axes = figures.plot_edits(FILMS, FILMS, ["x"] * 3, FILMS > 0.5, FILMS)
    names = ["mask", "true counterfactual", "true difference"]
    assert [ax.get_title() for ax in axes[0]][3:] == names
    np.testing.assert_array_equal(axes[1, 3].images[0].get_array(), FILMS[1] > 0.5)


def test_reconstructions_show_the_absolute_difference():
    axes = figures.plot_reconstructions(FILMS, FILMS, FILMS[::-1], ["x"] * 3)
    shown = axes[0, 3].images[0]
    np.testing.assert_allclose(shown.get_array(), abs(FILMS[2] - FILMS[0]))
    assert shown.get_clim() == (0, 0.2)


def test_doses_show_films_differences_and_the_true_value():
    axes = figures.plot_doses(FILMS[0], FILMS, [0, 1, 2], [0.0, 0.1, 0.2], truth=0.15)
    assert axes.shape == (2, 3)
    np.testing.assert_allclose(axes[1, 1].images[0].get_array(), FILMS[1] - FILMS[0])
    curve = axes[0, 0].figure.axes[-1]
    assert [line.get_label() for line in curve.lines] == ["the edit", "the true counterfactual"]
    assert curve.get_ylabel() == "mean change of the pixels\nthat truly change"
    unknown = figures.plot_doses(FILMS[0], FILMS, [0, 1, 2], [0.0, 0.1, 0.2])
    assert unknown[0, 0].figure.axes[-1].get_ylabel() == "mean change inside the mask"


def test_prevalence_counts_what_is_present():
    table = pd.DataFrame({"split": ["train"] * 4, "Edema": [1.0, 1.0, 0.0, np.nan]})
    ax = figures.plot_prevalence(table, ["Edema"])
    widths = [bar.get_width() for bar in ax.patches if bar.get_width() > 0]
    assert widths[0] == pytest.approx(200 / 3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train, n = 4"]


def test_levels_show_the_change_film_by_film():
    before = np.random.default_rng(0).random((5, 2)) + 1
    left, right = figures.plot_levels([1, 9], {"before": before, "after": 0.9 * before})
    assert [line.get_label() for line in left.lines] == ["before", "after"]
    assert left.get_title().endswith("n = 5")
    np.testing.assert_allclose(right.lines[0].get_ydata(), [-10, -10])


def test_methods_show_their_intervals():
    rows = [("nothing", "e", 0.0, -0.1, 0.1), ("own", "e", 0.5, 0.4, 0.7)]
    table = pd.DataFrame(rows, columns=["method", "edit", "cpg", "cpg_low", "cpg_high"])
    ax = figures.plot_methods(table.assign(n=7), "cpg", "title")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["nothing", "own"]
    assert legend(ax) == ["e, n = 7"]
    (bars,) = ax.collections
    np.testing.assert_allclose(
        [line[:, 0] for line in bars.get_segments()], [[-0.1, 0.1], [0.4, 0.7]]
    )
    assert ax.get_xlabel() == "signed CPG (mean, 95 % interval)"
    assert legend(figures.plot_methods(table, "cpg", "title")) == ["e"]


def test_names_are_those_that_a_reader_knows():
    axes = figures.plot_pairs([[FILMS[0]] * 3], ["original", "sdedit", "ours, S_CLIP filter"])
    assert [ax.get_title() for ax in axes[0]] == ["original", "SDEdit", "ours, S_CLIP filter"]


def test_lines_of_a_title_stay_apart():
    (ax,) = figures.plot_films(FILMS[:1], ["remove Pneumothorax and more\nS_CLIP 0.90"], 1).flat
    assert ax.get_title() == "remove Pneumothorax and\nmore\nS_CLIP 0.90"


def test_predictions_and_arms_and_losses_draw():
    pairs = [(FILMS[0], np.array([0.1, 0.9]))]
    assert figures.plot_predictions(pairs, pairs, ["a", "b"], ["t"]).shape == (1, 3)
    frame = pd.DataFrame({"group": ["g", "g"], "arm": ["a", "b"], "accuracy": [0.5, 0.7]})
    assert figures.plot_arms(frame).get_ylabel() == "accuracy"
    ax = figures.plot_arms(frame.assign(n=60, low=0.4, high=0.9, arm=["a", "true_b"]))
    assert legend(ax) == ["a", "true b"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["g\nn = 60"]
    reaches = [bars.get_segments()[0][:, 1] for bars in ax.collections]
    np.testing.assert_allclose(reaches, [[0.4, 0.9], [0.4, 0.9]])
    losses = pd.DataFrame({"step": [0, 1], "loss": [1.0, 0.5]})
    assert len(figures.plot_losses(losses, {0: 1.0, 2: 0.4}).lines) == 3


def test_labels_stand_beside_the_probabilities():
    pairs = [(FILMS[0], np.array([0.1, 0.9]))]
    truth = [([0.0, 1.0], [0.0, 0.0])]
    bars = figures.plot_predictions(pairs, pairs, ["a", "b"], ["t"], truth)[0, 2]
    diamonds = [line for line in bars.lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in diamonds] == [[0, 1], [0, 0]]
    factual, edited = (line.get_ydata() for line in diamonds)
    assert (factual < edited).all()  # as the bars stand


def test_leakage_has_one_scale_for_made_and_true():
    change = pd.DataFrame([[0.5, -0.2]], index=["add Edema"], columns=["Edema", "Fracture"])
    both = figures.plot_leakage(change, change / 2)
    assert both.shape == (1, 2)
    assert {ax.collections[0].get_clim() for ax in both.flat} == {(-1, 1)}
    (ax,) = figures.plot_leakage(change, numbers={"add Edema": 4}).flat
    assert [text.get_text() for text in ax.get_yticklabels()] == ["add Edema, n = 4"]
    assert [text.get_text() for text in ax.texts] == ["+0.50", "-0.20"]


def test_matrices_of_shares_have_one_scale():
    share = pd.DataFrame([[1.0, 0.3]], index=["Edema"], columns=["Edema", "Fracture"])
    axes = figures.plot_matrices({"trained": share, "went along": share / 2})
    assert [ax.get_title() for ax in axes.flat] == ["trained", "went along"]
    assert {ax.collections[0].get_clim() for ax in axes.flat} == {(0, 1)}


def test_the_filter_is_a_line():
    own = pd.DataFrame({"s_clip": [0.0, 0.5], "error": [2.0, 0.3], "edit": ["a", "b"]})
    ax = figures.plot_filter(own, 0.1, "error")
    assert [0.1, 0.1] in [list(line.get_xdata()) for line in ax.lines]
    assert len(ax.collections[0].get_offsets()) == 2
    assert legend(ax) == ["a, n = 1", "b, n = 1"]


def test_scores_say_how_many_edits_there_are():
    rows = {"s_clip": [0.5, 0.6, 0.7], "edit": ["a", "a", "b"], "split": ["test", "train", "test"]}
    ax = figures.plot_scores(pd.DataFrame(rows), 0.1)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a, n = 2", "b, n = 1"]
    assert legend(ax)[-1] == "filter, 0.1"


def test_scores_drawn_twice_are_equal_byte_for_byte():
    rows = {"s_clip": [0.5, 0.6, 0.7], "edit": ["a", "a", "b"], "split": ["test", "train", "test"]}
    drawn = []
    for _ in range(2):  # numpy's global generator has moved on by the second
        file = io.BytesIO()
        figures.plot_scores(pd.DataFrame(rows), 0.1).figure.savefig(file)
        drawn.append(file.getvalue())
    assert drawn[0] == drawn[1]


def test_the_sweep_keeps_intervals_of_one_level_apart():
    row = {"measure": "worst group", "baseline": "plain", "level": 0.75, "films": 240}
    row |= {"accuracy": 0.6, "baseline_accuracy": 0.5, "mean": 0.1, "low": 0.0, "high": 0.2}
    levels = pd.DataFrame([row | {"arm": arm} for arm in ("duplicates", "true_counterfactuals")])
    left, right = figures.plot_sweep(levels)
    assert legend(left) == ["plain", "duplicates", "true counterfactuals"]
    assert len({float(bars.get_segments()[0][0, 0]) for bars in right.collections}) == 2
