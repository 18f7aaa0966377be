"""Augmentation: labels of counterfactuals, no leak, and the films that each arm adds."""

import numpy as np
import pandas as pd
import pytest

from prism_nb import augment as a
from prism_nb import phantom
from prism_nb.arms import AugmentError
from prism_nb.diffusion import load_model
from prism_nb.edits import parse_edit, plan_edits
from prism_nb.findings import FINDINGS
from prism_nb.ganterfactual import BUNDLED, build_gan, load_gan, save_gan
from prism_nb.images import load_films
from prism_nb.latents import encode_cohort


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
    devices = a.counterfactual_labels(factual, ["Support Devices"] * 3, [False, True, True])
    assert devices["No Finding"].tolist() == [0, 0, 1]
    assert a.counterfactual_labels(factual[:0], "Edema", True).shape == (0, 14)
    with pytest.raises(AugmentError, match="remove Pleural Effusion of a film without it") as error:
        a.counterfactual_labels(factual, "Pleural Effusion", False)
    assert "another cohort" in str(error.value)


def test_edits_of_test_patients_are_refused():
    table = pd.DataFrame({"patient_id": ["a", "b", "c"], "split": ["train", "test", "train"]})
    a.check_source(["a", "c", "a"], table)
    with pytest.raises(a.AugmentError, match=r"1 patients .*\(the first is b\)"):
        a.check_source(["a", "b", "b"], table)
    with pytest.raises(AugmentError, match="no counterfactuals of training films"):
        a.check_source([], table)


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(8, 64)


@pytest.fixture(scope="module")
def plan(cohort):
    """Both device edits of each film, as edits.parquet has them; two pass the filter."""
    edits = [parse_edit(f"{verb} Support Devices") for verb in ("add", "remove")]
    edits += [parse_edit("remove Pleural Effusion")]
    plan = plan_edits(cohort.table, edits).assign(model_key="m")
    return plan.assign(kept=[True, True] + [False] * (len(plan) - 2))


@pytest.fixture(scope="module")
def factual(cohort, plan):
    paths = cohort.table.set_index("film_id").loc[plan["film_id"], "path"]
    return load_films([cohort.image_root / path for path in paths], 64)


def gather(arms, cohort, plan, factual, folder):
    labels = np.arange(len(plan), dtype=np.float32)[:, None]
    return a.extra_films(arms, cohort, plan, factual, factual // 2, labels, folder)


def test_each_arm_gets_its_films_or_a_reason(cohort, plan, factual, tmp_path):
    arms = ["plain", "counterfactuals", "counterfactuals_filtered", "true_counterfactuals"]
    extra, skipped = gather(arms, cohort, plan, factual, tmp_path)
    assert list(extra) == arms[1:]
    assert skipped == {}
    assert np.array_equal(extra["counterfactuals"][0], factual // 2)
    assert extra["counterfactuals_filtered"][1].ravel().tolist() == [0, 1]
    row = plan.iloc[0]
    do = {row["finding"]: int(row["present"])}
    true, _ = phantom.true_counterfactual(cohort.image_root, row["film_id"], do, 64)
    assert np.array_equal(extra["true_counterfactuals"][0][0], true)


def test_what_cannot_be_had_is_named_with_its_reason(cohort, plan, factual, tmp_path, monkeypatch):
    monkeypatch.setattr(a, "BUNDLED", tmp_path / "none")
    arms = ["gan_counterfactuals", "counterfactuals_filtered", "true_counterfactuals"]
    unknown = plan.assign(kept=False, finding="Fracture")
    monkeypatch.setattr(a, "truths", lambda *_: (np.full(factual.shape, np.nan), None))
    extra, skipped = gather(arms, cohort, unknown, factual, tmp_path)
    assert extra == {}
    assert [skipped[arm].split(":")[0] for arm in arms] == [
        "no GAN is at hand",
        "no counterfactual passed the S_CLIP filter of 04_edit",
        "the truth of these edits is not known",
    ]
    monkeypatch.setattr(a, "is_phantom", lambda _: False)
    _, skipped = gather(arms[:1], cohort, plan, factual, tmp_path)
    assert skipped == {"gan_counterfactuals": "the bundled GAN knows phantom films alone"}
    monkeypatch.undo()
    monkeypatch.setattr(a, "is_phantom", lambda _: False)
    save_gan(tmp_path / "baseline", *load_gan(BUNDLED))  # as 05_evaluate leaves it
    _, skipped = gather(arms[:1], cohort, plan, factual, tmp_path)
    assert skipped == {"gan_counterfactuals": "the bundled GAN knows phantom films alone"}


def test_the_gan_makes_its_own_edits_alone(cohort, plan, factual, tmp_path):
    save_gan(tmp_path / "baseline", build_gan(64, 8), {"finding": "Support Devices"})
    extra, skipped = gather(["gan_counterfactuals"], cohort, plan, factual, tmp_path)
    films, labels = extra["gan_counterfactuals"]
    known = (plan["finding"] == "Support Devices").to_numpy()
    assert labels.ravel().tolist() == np.flatnonzero(known).tolist()
    assert films.shape == (known.sum(), 64, 64)
    one = np.flatnonzero(known)[0]
    gan, _ = a.load_gan(tmp_path / "baseline")
    alone = a.translate(gan, factual[one : one + 1], bool(plan["present"].iloc[one]))
    assert np.abs(films[0].astype(int) - alone[0]).max() <= 1  # a batch rounds differently
    _, skipped = gather(["gan_counterfactuals"], cohort, plan[~known], factual[~known], tmp_path)
    assert skipped == {
        "gan_counterfactuals": "the GAN edits Support Devices, and these edits do not"
    }


def test_generated_films_follow_their_captions_and_are_made_once(
    cohort, plan, factual, random_base, tmp_path, monkeypatch
):
    (tmp_path / "model").symlink_to(random_base)
    model = load_model(str(random_base), device="cpu")
    encode_cohort(model, cohort.table, cohort.image_root, 64, "pad", tmp_path / "latents")
    few = plan[:3]
    extra, _ = gather(["text_to_image"], cohort, few, factual[:3], tmp_path)
    films, _ = extra["text_to_image"]
    assert films.shape == (3, 64, 64)
    assert films.dtype == np.uint8
    assert len(np.unique(films, axis=0)) == 3
    monkeypatch.setattr(a, "load_model", lambda *_, **__: pytest.fail("made twice"))
    again, _ = gather(["text_to_image"], cohort, few, factual[:3], tmp_path)
    assert np.array_equal(again["text_to_image"][0], films)
    with pytest.raises(pytest.fail.Exception, match="made twice"):
        gather(["text_to_image"], cohort, few.assign(model_key="other"), factual[:3], tmp_path)
