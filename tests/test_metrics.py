"""Metrics against closed-form truths: the perfect editor, the one that does nothing, a shuffle."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_nb import metrics as m

rng = np.random.default_rng(0)
FACTUAL = rng.uniform(0.2, 0.8, (6, 32, 32)).astype(np.float32)
MASK = np.zeros(FACTUAL.shape, dtype=bool)
for number in range(len(MASK)):
    MASK[number, 4 * number : 4 * number + 8, 6:18] = True
TRUTH = np.where(MASK, FACTUAL * 0.5, FACTUAL).astype(np.float32)
WANTED = np.abs(TRUTH - FACTUAL)


def test_perfect_editor_scores_perfectly():
    edit = FACTUAL, TRUTH, TRUTH
    assert np.allclose(m.tea_effectiveness(*edit), 1)
    assert np.allclose(m.tea_amplification(*edit), 0)
    assert np.array_equal(m.over_edit(*edit), np.zeros(6))
    assert np.array_equal(m.over_edit(*edit, mask=MASK), np.zeros(6))
    assert np.array_equal(m.under_edit(*edit), np.zeros(6))
    assert np.array_equal(m.iou_at_area(*edit), np.ones(6))
    assert np.array_equal(m.error_inside(TRUTH, TRUTH, MASK), np.zeros(6))
    assert np.array_equal(m.error_outside(TRUTH, TRUTH, MASK), np.zeros(6))
    assert np.allclose(m.psnr(TRUTH, TRUTH), m.PSNR_CAP)
    assert np.allclose(m.ssim(TRUTH, TRUTH), 1)
    assert np.array_equal(m.true_error(*edit), np.zeros(6))
    assert np.allclose(m.id_ratio(*edit), 1)
    assert np.array_equal(m.pointing_game(FACTUAL, TRUTH, MASK), np.ones(6))
    assert np.allclose(m.sparsity(FACTUAL, TRUTH), MASK.mean(axis=(1, 2)))


def test_doing_nothing_scores_zero():
    edit = FACTUAL, FACTUAL, TRUTH
    for metric in (m.tea_effectiveness, m.tea_amplification, m.over_edit, m.iou_at_area):
        assert np.array_equal(metric(*edit), np.zeros(6)), metric.__name__
    assert np.allclose(m.under_edit(*edit), 1)
    inside = [WANTED[i][MASK[i]].mean() for i in range(6)]
    assert np.allclose(m.error_inside(FACTUAL, TRUTH, MASK), inside, rtol=1e-5)
    assert np.array_equal(m.error_outside(FACTUAL, TRUTH, MASK), np.zeros(6))
    for metric in (m.l1, m.sparsity):
        assert np.array_equal(metric(FACTUAL, FACTUAL), np.zeros(6)), metric.__name__
    assert np.array_equal(m.pointing_game(FACTUAL, FACTUAL, MASK), np.zeros(6))
    assert np.allclose(m.true_error(*edit), 1)
    assert np.array_equal(m.id_ratio(*edit), np.zeros(6))


def test_shuffled_truth_fails():
    shuffled = np.roll(TRUTH, 1, axis=0)
    edit = FACTUAL, shuffled, TRUTH
    assert (m.tea_amplification(*edit) > 1).all()
    assert (m.over_edit(*edit) > 0.5).all()
    assert (m.iou_at_area(*edit) < 0.5).all()
    assert (m.error_outside(shuffled, TRUTH, MASK) > 0.1).all()
    assert (m.true_error(*edit) > 1).all()
    elsewhere = np.where(MASK, FACTUAL, FACTUAL * 0.5).astype(np.float32)
    assert np.array_equal(m.pointing_game(FACTUAL, elsewhere, MASK), np.zeros(6))


def test_half_and_overshooting_edits():
    half, double = (FACTUAL + TRUTH) / 2, 2 * TRUTH - FACTUAL
    assert np.allclose(m.tea_effectiveness(FACTUAL, half, TRUTH), 0.5, atol=1e-5)
    assert np.allclose(m.under_edit(FACTUAL, half, TRUTH), 0.5, atol=1e-5)
    assert np.allclose(m.tea_effectiveness(FACTUAL, double, TRUTH), 2, atol=1e-5)
    assert (m.tea_amplification(FACTUAL, half, TRUTH) < 1e-5).all()


def test_over_edit_and_amplification_by_hand():
    factual = np.zeros((1, 4, 4), dtype=np.float32)
    truth, edit = factual.copy(), factual.copy()
    truth[0, 0, :2] = 0.5  # two pixels wanted
    edit[0, 0, 0], edit[0, 3, 3] = 0.5, 0.3  # one made, one elsewhere
    assert m.over_edit(factual, edit, truth)[0] == pytest.approx(0.3 / 0.8)
    assert m.tea_effectiveness(factual, edit, truth)[0] == pytest.approx(0.5)
    beside = np.sqrt(0.25**2 + 0.25**2 + 0.3**2) / np.sqrt(0.5)
    assert m.tea_amplification(factual, edit, truth)[0] == pytest.approx(beside)
    assert m.iou_at_area(factual, edit, truth)[0] == pytest.approx(1 / 3)


def test_iou_counts_ties_in_proportion():
    factual = np.zeros((1, 2, 4), dtype=np.float32)
    truth = factual.copy()
    truth[0, 0, :2] = 0.5
    everywhere = factual + 0.5  # 8 tied pixels for an area of 2: half a hit is expected
    assert m.iou_at_area(factual, everywhere, truth)[0] == pytest.approx(0.5 / 3.5)


def test_nothing_wanted_and_empty_masks_are_nan():
    undefined = (m.tea_effectiveness, m.tea_amplification, m.under_edit, m.iou_at_area)
    for metric in (*undefined, m.true_error, m.id_ratio):
        assert np.isnan(metric(FACTUAL, TRUTH, FACTUAL)).all(), metric.__name__
    empty = np.zeros_like(MASK)
    assert np.isnan(m.error_inside(TRUTH, TRUTH, empty)).all()
    assert np.isnan(m.error_outside(TRUTH, TRUTH, ~empty)).all()
    assert np.isnan(m.pointing_game(FACTUAL, TRUTH, empty)).all()


def test_constant_images_are_defined():
    grey = np.full((2, 16, 16), 0.5, np.float32)
    assert np.allclose(m.ssim(grey, grey), 1)
    assert (m.ssim(grey, grey / 2) < 1).all()
    assert np.array_equal(m.sparsity(grey, grey + 0.02), np.zeros(2))
    assert np.allclose(m.l1(grey, grey + 0.02), 0.02)


def test_no_images_give_no_values():
    none = FACTUAL[:0]
    for metric in (m.l1, m.psnr, m.ssim, m.sparsity):
        assert metric(none, none).shape == (0,)
    for metric in (m.tea_effectiveness, m.true_error, m.iou_at_area):
        assert metric(none, none, none).shape == (0,)
    assert m.pointing_game(none, none, MASK[:0]).shape == (0,)


def test_l1_and_psnr_by_hand():
    dark = np.zeros((1, 2, 2), dtype=np.float32)
    grey = dark.copy()
    grey[0, 0, 0] = 0.2
    assert m.l1(dark, grey) == pytest.approx([0.05])
    assert m.psnr(dark, grey) == pytest.approx([20.0], abs=1e-4)  # -10 log10(0.04 / 4)


def test_ssim_is_that_of_each_film():
    from torchmetrics.functional.image import structural_similarity_index_measure as reference

    noisy = (FACTUAL + 0.05 * rng.standard_normal(FACTUAL.shape)).clip(0, 1).astype(np.float32)
    one = [torch.from_numpy(x[2:3])[None] for x in (noisy, FACTUAL)]
    assert m.ssim(FACTUAL, noisy)[2] == pytest.approx(reference(*one, data_range=1.0).item(), 1e-4)
    assert (m.ssim(FACTUAL, noisy) < 0.99).all()


def test_lpips_fetches_nothing_and_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(m.MetricError, match=r"put torchvision's alexnet-\S+ into") as error:
        m.lpips(FACTUAL, TRUTH)
    assert "\n" not in str(error.value)
    m.lpips_weights().parent.mkdir(parents=True)
    m.lpips_weights().touch()
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", untrained)
    films = np.repeat(np.repeat(FACTUAL[:2], 2, 1), 2, 2)  # AlexNet needs 63 pixels
    assert np.allclose(m.lpips(films, films), 0)
    assert (m.lpips(films, 1 - films) > 0).all()
    assert m.lpips(films[:1], films[:1]).shape == (1,)


def untrained(net, pretrained):
    from torchvision.models import alexnet

    return alexnet(weights=None).features


def test_composition_and_reversibility_count_cycles():
    def fade(films):
        return films * np.float32(0.9)

    def brighten(films):
        return films / np.float32(0.9)

    for cycles in (1, 5):
        lost = FACTUAL.mean(axis=(1, 2)) * (1 - 0.9**cycles)
        assert np.allclose(m.composition(FACTUAL, fade, cycles), lost, atol=1e-6)
        assert np.allclose(m.reversibility(FACTUAL, fade, brighten, cycles), 0, atol=1e-6)
        assert np.allclose(m.reversibility(FACTUAL, fade, lambda x: x, cycles), lost, atol=1e-6)


def test_kid_is_torchmetrics_and_near_zero_for_one_population():
    from torchmetrics.image.kid import poly_mmd

    a, b = rng.normal(size=(40, 8)), rng.normal(0.5, 1, (60, 8))
    subset = m.kid(a, b[:40], num_subsets=3, subset_size=99)  # whole sets, in any order
    assert subset[0] == pytest.approx(poly_mmd(torch.tensor(a), torch.tensor(b[:40])).item())
    assert subset[1] == pytest.approx(0, abs=1e-9)
    same, _ = m.kid(rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), 50, 100)
    assert abs(same) < 0.05 < m.kid(a, b)[0]
    assert m.kid(a, b, seed=1) == m.kid(a, b, seed=1) != m.kid(a, b, seed=2)
    with pytest.raises(m.MetricError, match="2 films or more"):
        m.kid(a[:1], b)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((FACTUAL * 255).astype(np.uint8), "uint8 and spans [51, 203]; float in [0, 1] is needed"),
        (FACTUAL * 255, "Use images.uint8_to_unit"),
        (FACTUAL * 2 - 1, "Use images.sd_to_unit"),
        (FACTUAL.astype(int), "float in [0, 1] is needed"),
        (np.where(MASK, np.nan, FACTUAL), "not finite"),
        (FACTUAL[0], "(B, H, W)"),
        (FACTUAL[:, :16], "they must be the same"),
        (FACTUAL[:3], "they must be the same"),
    ],
)
def test_wrong_images_are_refused_in_one_line(bad, words):
    calls = [lambda f=f: f(FACTUAL, bad) for f in (m.l1, m.ssim, m.sparsity)]
    for call in (*calls, lambda: m.tea_effectiveness(FACTUAL, bad, TRUTH)):
        with pytest.raises(m.MetricError) as error:
            call()
        message = str(error.value).replace("[50,", "[51,")
        assert words in message
        assert "\n" not in message


def test_wrong_masks_are_refused():
    for bad in (MASK.astype(float), MASK[:, :16]):
        with pytest.raises(m.MetricError, match="bool of shape"):
            m.error_inside(TRUTH, TRUTH, bad)


def test_prediction_gain_is_signed_toward_the_edit():
    before, after = np.array([0.9, 0.9, 0.1]), np.array([0.2, 1.0, 0.7])
    assert np.allclose(m.cpg(before, after, 0), [0.7, -0.1, -0.6])
    assert np.allclose(m.cpg(before, after, [0, 0, 1]), [0.7, -0.1, 0.6])
    assert np.allclose(m.cpg_absolute(before, after), [0.7, 0.1, 0.6])


def test_flip_counts_only_what_could_flip():
    before, after = np.array([0.9, 0.9, 0.1]), np.array([0.2, 0.6, 0.7])
    assert np.array_equal(m.flip(before, after, 0), [1, 0, np.nan], equal_nan=True)
    assert np.array_equal(m.flip(before, after, 1), [np.nan, np.nan, 1], equal_nan=True)


def test_leakage_leaves_out_the_edited_head_and_what_the_truth_moves():
    before = np.array([[0.9, 0.5, 0.2]])
    after, true = np.array([[0.1, 0.7, 0.1]]), np.array([[0.2, 0.6, 0.2]])
    assert m.leakage(before, after, 0) == pytest.approx([0.15])
    assert m.leakage(before, after, 0, true) == pytest.approx([0.10])
    assert m.leakage(before, true, 0, true) == pytest.approx([0.0])
    assert m.leakage(before, before, 0, true) == pytest.approx([0.05])  # the truth moves one
    wrong_way = np.array([[0.1, 0.4, 0.2]])
    assert m.leakage(before, wrong_way, 0, true) == pytest.approx([0.10])
    assert np.isnan(m.leakage(before[:, :1], after[:, :1], 0)).all()
    with pytest.raises(m.MetricError, match="0 to 2"):
        m.leakage(before, after, 3)


def test_identity_shift_is_the_mean_over_who_it_is():
    before, after = np.array([[0.9, 0.5], [0.2, 0.2]]), np.array([[0.5, 0.7], [0.2, 0.2]])
    assert np.allclose(m.identity_shift(before, after), [0.3, 0.0])


def test_wrong_probabilities_are_refused():
    with pytest.raises(m.MetricError, match="0 to 1"):
        m.cpg([2.0], [0.5], 1)
    with pytest.raises(m.MetricError, match="0 to 1"):
        m.flip([np.nan], [0.5], 1)
    with pytest.raises(m.MetricError, match="shapes"):
        m.cpg([0.5, 0.5], [0.5], 1)
    with pytest.raises(m.MetricError, match="toward"):
        m.cpg([0.5], [0.5], -1)


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(size=(300, 40))
    inside = 0
    for seed, values in enumerate(draws):
        _, low, high = m.bootstrap_interval(values, np.arange(40), 300, seed)
        inside += low <= 0 <= high
    assert 0.89 < inside / 300 < 0.98  # the percentile interval is a little short at n = 40


def test_interval_by_patient_is_wider_than_by_film():
    patients = np.repeat(np.arange(30), 6)
    values = np.random.default_rng(2).normal(size=30)[patients]
    mean, low, high = m.bootstrap_interval(values, patients, 500)
    again, film_low, film_high = m.bootstrap_interval(values, np.arange(180), 500)
    assert mean == again == pytest.approx(values.mean())
    assert high - low > 1.8 * (film_high - film_low)  # root of 6 films in theory


def test_interval_weighs_films_and_ignores_their_order():
    values, patients = np.array([1.0, 1, 1, 0, np.nan]), np.array(["a", "a", "a", "b", "c"])
    one = m.bootstrap_interval(values, patients, 200, 3)
    assert one == m.bootstrap_interval(values[::-1], patients[::-1], 200, 3)
    assert one == (0.75, 0.0, 1.0)  # a resample of patient b alone is 0


def test_one_patient_or_none_has_no_interval():
    assert m.bootstrap_interval([0.5], ["a"])[0] == 0.5
    assert np.isnan(m.bootstrap_interval([0.5, 0.7], ["a", "a"])[1:]).all()
    assert np.isnan(m.bootstrap_interval([], [])).all()
    assert np.isnan(m.bootstrap_interval([np.nan], ["a"])).all()
    assert np.isnan(m.bootstrap_interval([0.1, 0.2], ["a", "b"], num_bootstrap=0)[1:]).all()


def test_unfit_patients_are_refused():
    with pytest.raises(m.MetricError, match="one patient a value"):
        m.bootstrap_interval([0.5, 0.6], ["a"])
    with pytest.raises(m.MetricError, match="no patient"):
        m.bootstrap_interval([0.5, 0.6], ["a", None])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-1, 1)), min_size=1, max_size=20),
    st.integers(0, 3),
)
def test_interval_stays_within_the_patients_means(rows, seed):
    patients, values = zip(*rows, strict=True)
    mean, low, high = m.bootstrap_interval(values, patients, 50, seed)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    if len(set(patients)) > 1:
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    else:
        assert np.isnan([low, high]).all()


def test_resampling_is_quick_and_the_same_in_pieces(monkeypatch):
    values, patients = rng.random(1000), np.arange(1000) % 500
    start = time.perf_counter()
    whole = m.bootstrap_interval(values, patients, 1000, 7)
    assert time.perf_counter() - start < 0.5
    monkeypatch.setattr(m, "_RESAMPLED_AT_ONCE", 70_000)
    assert m.bootstrap_interval(values, patients, 1000, 7) == pytest.approx(whole)


def test_summarise_is_tidy():
    frame = pd.DataFrame(
        {
            "method": ["a", "a", "a", "b"],
            "patient_id": ["p", "p", "q", "p"],
            "l1": [0.1, 0.2, 0.3, np.nan],
            "cpg": [1.0, 0.0, 0.5, 0.4],
        }
    )
    table = m.summarise(frame, "method", ["l1", "cpg"], num_bootstrap=50)
    assert list(table.columns) == ["method", "metric", "n", "patients", "mean", "low", "high"]
    row = table[(table["method"] == "a") & (table["metric"] == "l1")].iloc[0]
    assert (row["n"], row["patients"], row["mean"]) == (3, 2, pytest.approx(0.2))
    empty = table[(table["method"] == "b") & (table["metric"] == "l1")].iloc[0]
    assert empty["n"] == 0
    assert np.isnan(empty["mean"])
    assert len(m.summarise(frame, [], "cpg", num_bootstrap=10)) == 1
    with pytest.raises(m.MetricError, match="no column 'l2'"):
        m.summarise(frame, "method", "l2")
