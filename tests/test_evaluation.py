"""The evaluator: the do-nothing and the perfect editor frame every method."""

import numpy as np
import pytest

from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort, split_by_patient
from prism_nb.editing import Edited
from prism_nb.edits import FLOORS, OWN, Edit, plan_edits, save_edits, truths
from prism_nb.evaluation import FILTERED, NOTHING, PERFECT, measure_edits
from prism_nb.findings import PAPER_HEADS
from prism_nb.images import load_films, uint8_to_unit

HEADS = list(PAPER_HEADS)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    cohort = load_cohort(phantom.write_cohort(folder, 20, 64, seed=4))
    table = split_by_patient(cohort.table, 0.5, 0.2)
    cohort.table = table.assign(caption=captions(table))
    cohort.settings |= {"image_size": 64, "fit": "squash"}
    return cohort


def brightness(judge, films):
    """A stand-in for a judge: each head looks at the mean grey of one quarter of the film."""
    half = films.shape[1] // 2
    parts = (
        films[:, :half, :half],
        films[:, :half, half:],
        films[:, half:, :half],
        films[:, half:, half:],
    )
    return np.stack([part.mean(axis=(1, 2)) / 255 for part in parts], axis=1)


def everywhere(films):
    """Films as edited without a mask."""
    return Edited(films, np.ones(films.shape, bool), np.ones(len(films)))


def measure(cohort, folder, edited_of, kept=True):
    """Write edits made by edited_of(factual, truth) and measure them."""
    chosen = cohort.table[cohort.table["split"] == "test"].reset_index(drop=True)
    films = uint8_to_unit(load_films([cohort.image_root / p for p in chosen["path"]], 64))
    edits = [Edit("Support Devices", False), Edit("Pleural Effusion", True)]
    plan = plan_edits(chosen, edits).assign(s_clip=0.5, kept=kept)
    truth, _ = truths(cohort, plan)
    edited = everywhere(edited_of(films[plan["row"]], truth))
    floors = dict.fromkeys(FLOORS, films)
    table = save_edits(folder, plan, edited, chosen, floors, {})
    return measure_edits(cohort, table, folder, None, HEADS, brightness)


def test_a_perfect_method_scores_as_the_perfect_editor(cohort, tmp_path):
    measured = measure(cohort, tmp_path, lambda factual, truth: truth).set_index("method")
    names = ["l1", "cpg", "leakage", "error_inside", "error_outside", "tea_effectiveness"]
    own, perfect = measured.loc[OWN, names], measured.loc[PERFECT, names]
    np.testing.assert_allclose(own.to_numpy(float), perfect.to_numpy(float), atol=1e-6)
    np.testing.assert_allclose(perfect["error_inside"], 0, atol=1e-6)
    np.testing.assert_allclose(perfect["tea_effectiveness"], 1, atol=1e-5)


def test_a_lazy_method_scores_as_the_do_nothing_editor(cohort, tmp_path):
    measured = measure(cohort, tmp_path, lambda factual, truth: factual).set_index("method")
    for method in (OWN, NOTHING, *FLOORS.values()):
        assert (measured.loc[method, "l1"] == 0).all()
        assert (measured.loc[method, "cpg"] == 0).all()
        np.testing.assert_allclose(measured.loc[method, "tea_effectiveness"], 0, atol=1e-6)
    assert (measured.loc[PERFECT, "l1"] > 0).all()


def test_the_filter_only_selects(cohort, tmp_path):
    measured = measure(cohort, tmp_path, lambda factual, truth: truth, kept=False)
    assert FILTERED not in set(measured["method"])
    measured = measure(cohort, tmp_path, lambda factual, truth: truth, kept=True)
    counts = measured.groupby("method").size()
    assert counts[FILTERED] == counts[OWN] == counts[PERFECT] == counts[NOTHING]


def test_without_test_edits_the_way_out_is_named(cohort, tmp_path):
    chosen = cohort.table[cohort.table["split"] == "train"].reset_index(drop=True)
    plan = plan_edits(chosen, [Edit("Support Devices", False)]).assign(s_clip=0.5, kept=True)
    edited = everywhere(np.zeros((len(plan), 64, 64), np.float32))
    table = save_edits(tmp_path, plan, edited, chosen, {}, {})
    with pytest.raises(ValueError, match="raise num_test_films in 03_invert"):
        measure_edits(cohort, table, tmp_path, None, HEADS, brightness)
