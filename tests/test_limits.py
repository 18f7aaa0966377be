"""Where edits go wrong: the measures on editors whose faults are known, hard places, bad films."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from prism_nb import limits, phantom
from prism_nb.classifiers import ClassifierError, build_classifier, save_classifier
from prism_nb.editing import edit
from prism_nb.edits import Edit, plan_edits, truths
from prism_nb.images import uint8_to_unit
from prism_nb.inversion import load_inversion
from prism_nb.judging import HEADS
from prism_nb.params import validate
from prism_nb.phantom.renderer import burnt_in_text

SIZE = 64
PLAIN = {"template": "plain", "negatives": False}


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(24, SIZE)


@pytest.fixture(scope="module")
def plan(cohort):
    """Removals of devices, of films that show an effusion as well."""
    both = cohort.table[(cohort.table[limits.EFFUSION] == 1) & (cohort.table[limits.DEVICES] == 1)]
    return plan_edits(both.head(4), [Edit(limits.DEVICES, False)])


@pytest.fixture(scope="module")
def factual(cohort, plan):
    return uint8_to_unit(cohort.films(cohort.table.set_index("film_id").loc[plan["film_id"]]))


def rendered(cohort, plan, do):
    """The true films of a plan's patients under `do`, in [0, 1]."""
    root = cohort.image_root
    films = [phantom.true_counterfactual(root, film, do, SIZE)[0] for film in plan["film_id"]]
    return uint8_to_unit(np.stack(films))


# What goes along


def test_films_with_both_are_wet_first_and_then_of_the_test():
    columns = [limits.HEART, limits.PACEMAKER, limits.EFFUSION, "split"]
    rows = [(1, 1, 0, "test"), (1, 1, 1, "train"), (1, 0, 1, "test"), (1, 1, 1, "test")]
    table = pd.DataFrame(rows, columns=columns)
    assert limits.with_both(table, 9).index.to_list() == [3, 1, 0]
    assert limits.with_both(table, 1).index.to_list() == [3]
    with pytest.raises(ValueError, match="no film shows cardiomegaly and a pacemaker"):
        limits.with_both(table.iloc[[2]], 9)


def test_a_pacemaker_is_the_phantoms_own_and_elsewhere_any_device(cohort, tmp_path):
    table = limits.with_attributes(cohort)
    known = phantom.factors(cohort.image_root).set_index("film_id")["pacemaker"]
    assert (table.set_index("film_id")["pacemaker"] == known.loc[table["film_id"]]).all()
    elsewhere = limits.with_attributes(replace(cohort, image_root=tmp_path))
    assert (elsewhere["pacemaker"] == cohort.table[limits.DEVICES]).all()


def test_held_captions_differ_by_one_other_finding():
    labels = pd.Series({limits.HEART: 1.0, limits.EFFUSION: 0.0, limits.DEVICES: 1.0, "Edema": 1.0})
    held = limits.held_captions(labels, limits.HEART, PLAIN)
    assert held == ("chest x-ray showing cardiomegaly, edema",)
    assert limits.held_captions(labels, limits.DEVICES, PLAIN) == (
        "chest x-ray showing edema, support devices",
    )


def test_followed_is_a_share_of_the_true_change_within_a_region():
    x, truth = np.zeros((4, 4)), np.zeros((4, 4))
    truth[:2] = 0.4
    everywhere, above = np.ones((4, 4), bool), np.arange(4)[:, None] < [1] * 4
    half = np.where(above, truth, x)
    assert limits.followed(x, truth, truth, everywhere) == pytest.approx(1)
    assert limits.followed(x, half, truth, everywhere) == pytest.approx(0.5)
    assert limits.followed(x, half, truth, above) == pytest.approx(1)
    assert limits.followed(x, half, truth, ~above) == 0
    assert np.isnan(limits.followed(x, half, x, everywhere))


def test_what_goes_along_is_nothing_for_the_truth_and_all_for_one_that_takes_both(
    cohort, plan, factual
):
    truth, _ = truths(cohort, plan)
    both = rendered(cohort, plan, {limits.DEVICES: 0, limits.EFFUSION: 0})
    share = {}
    for name, films in (("nothing", factual), ("truth", truth), ("both", both)):
        found = limits.gone_along(cohort, plan, factual, films)
        assert len(found) == len(plan) * len(limits.ATTRIBUTES)
        share[name] = found.groupby("attribute")["share"]
    assert (share["nothing"].mean().dropna() == 0).all()
    assert share["truth"].min()[limits.DEVICES] == pytest.approx(1)
    assert share["truth"].max()[limits.EFFUSION] == 0
    assert share["both"].min()[limits.EFFUSION] == pytest.approx(1, abs=0.02)
    # A pacemaker is part of the devices: what is left of it beside them is nothing.
    assert share["both"].mean()[[limits.PACEMAKER]].isna().all()


# Hard places


def test_places_part_the_film(cohort, plan):
    found = limits.places(phantom.patient_of(cohort.image_root, plan["film_id"][0]), SIZE)
    bone, clear, near, middle, inside = found.values()
    assert (bone ^ clear).all()
    assert (near.astype(int) + middle + inside == 1).all()
    assert near[0].all()
    assert near[:, -1].all()
    assert inside[SIZE // 2, SIZE // 2]
    assert 0.2 < bone.mean() < 0.6


def test_devices_by_place_of_the_perfect_and_the_idle_editor(cohort, plan, factual):
    truth, changed = truths(cohort, plan)
    perfect = limits.removed_by_place(cohort, plan, factual, truth, truth)
    idle = limits.removed_by_place(cohort, plan, factual, factual, truth)
    assert perfect["share"].to_numpy() == pytest.approx(1)
    assert (perfect["error"] == 0).all()
    assert (idle["share"] == 0).all()
    assert (idle["error"] == idle["untouched"]).all()
    assert (idle["pixels"] >= limits.LEAST_PIXELS).all()
    whole = idle[idle["place"].isin(["over bone", "clear of bone"])].groupby("film_id")["pixels"]
    assert whole.sum().max() <= changed.sum(axis=(1, 2)).max()
    assert idle["place"].str.startswith("kind: ").any()


def test_letters_are_where_no_intervention_reaches(cohort, plan, factual):
    letters = limits.text_masks(cohort, plan["film_id"])
    first = phantom.patient_of(cohort.image_root, plan["film_id"][0])
    assert np.array_equal(letters[0], burnt_in_text(first, SIZE) > 0)
    bare = rendered(cohort, plan, dict.fromkeys(phantom.DRAWN, 0))
    assert letters.any(axis=(1, 2)).all()
    assert letters[:, SIZE // 2 :].sum() == 0
    around = limits.with_margin(letters, 2) & ~letters
    assert factual[letters].mean() > factual[around].mean() + 0.1
    assert abs(factual - bare)[letters].mean() < 0.02
    assert limits.with_margin(np.eye(7, dtype=bool)[None] & (np.arange(7) == 3), 1).sum() == 9


def test_the_corner_is_that_of_most_letters():
    letters = np.zeros((9, 9), bool)
    letters[0, 7:] = letters[1, 0] = True
    assert letters[limits.corner_of(letters)].sum() == 2
    assert letters[limits.corner_of(letters[:, ::-1])].sum() == 1


# Bad films


@pytest.mark.parametrize("name", limits.DISTORTIONS)
def test_a_spoilt_truth_differs_from_its_spoilt_film_where_they_did(name, factual, cohort, plan):
    truth, changed = truths(cohort, plan)
    films, true = (limits.distort(x, name, seed=3) for x in (factual, truth))
    assert films.dtype == np.float32
    assert films.min() >= 0
    assert films.max() <= 1
    assert (films == limits.distort(factual, name, seed=3)).all()
    assert (abs(films - factual).max() > 0.05) == (name != "as it is")
    if name not in ("blurred", "turned"):
        assert (films == true)[~changed].all()
    assert (films != true).any()


# As the run did it


def made():
    how = {"inversion": "direct", "num_ddim_steps": 3, "seed": 0}
    dials = validate("04_edit", {"mask": "none"}).model_dump()
    return {"03_invert": how, "04_edit": dials}


def test_films_are_edited_again_as_the_run_edited_them(tiny_run, model):
    from prism_nb.cohort import read_cohort

    cohort, inverted = read_cohort(tiny_run), load_inversion(tiny_run / "inversions")
    chosen = cohort.table.set_index("film_id", drop=False).loc[inverted.film_ids].head(2)
    films = uint8_to_unit(cohort.films(chosen))
    again = limits.invert_again(model, made(), films, chosen)
    np.testing.assert_allclose(again.noise, inverted.noise[:2], atol=1e-3)
    work = model, made(), again, films, [0, 1], ["chest x-ray", "chest x-ray showing edema"]
    first = limits.edit_again(*work)
    direct = edit(model, again, films, [0, 1], work[-1], mask="none")
    np.testing.assert_allclose(first.films, direct.films, atol=1e-5)
    assert first.raw is None
    held = limits.edit_again(*work, [("chest x-ray",), ()], keep_raw=True)
    assert held.raw.shape == held.films.shape == films.shape
    # Held from the very caption it asks for, the first edit has nothing left to do.
    still = edit(model, again, films, [0], [again.captions[0]], mask="none").films
    np.testing.assert_allclose(held.films[0], still[0], atol=1e-4)
    np.testing.assert_allclose(held.films[1], first.films[1], atol=1e-4)
    kept = limits.edit_again(*work, keep=np.ones(films.shape, bool))
    assert (kept.films == films).all(), "what is kept is kept bit for bit"


def test_the_judge_is_the_runs_own_or_the_one_that_was_named(tmp_path, factual):
    for folder, seed in (("classifiers/judge", 0), ("named", 1)):
        judge = build_classifier("test_efficientnet", len(HEADS), seed=seed)
        save_classifier(tmp_path / folder, judge, HEADS)
    films = (factual * 255).astype(np.uint8)
    own = limits.load_judge(tmp_path / "classifiers", "test_efficientnet")(films)
    named = limits.load_judge(tmp_path / "classifiers", str(tmp_path / "named"))(films)
    assert own.shape == named.shape == (len(films), len(HEADS))
    assert (own != named).any()
    with pytest.raises(ClassifierError, match="run 05_evaluate"):
        limits.load_judge(tmp_path / "none", "")
