"""Edits: the plan, the filter, what is written, and that a row is enough to make an edit again."""

import json
import typing
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prism_nb import params
from prism_nb.captions import untrained_words, vocabulary
from prism_nb.diffusion import encode_films
from prism_nb.editing import PRESETS, Edited, edit
from prism_nb.editors import Dials
from prism_nb.edits import (
    OWN,
    PAPER_EDITS,
    Edit,
    edit_film,
    filter_edits,
    given_dials,
    load_edit_films,
    parse_edit,
    plan_edits,
    recipe,
    save_edits,
    truths,
)
from prism_nb.images import load_films, load_image, uint8_to_unit
from prism_nb.inversion import METHODS, invert


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(20, 64)


def films_of(cohort, table):
    return uint8_to_unit(load_films([cohort.image_root / path for path in table["path"]], 64))


# The plan


def test_edits_are_read_in_words():
    assert parse_edit("remove support devices") == Edit("Support Devices", False)
    assert parse_edit("add Pleural Effusion").name == "add Pleural Effusion"
    for text in ("Support Devices", "delete Edema", "remove", "add Efusion"):
        with pytest.raises(ValueError, match=text.split()[-1]):
            parse_edit(text)


def test_the_papers_edits_use_words_that_captions_hold():
    assert len(PAPER_EDITS) == 8
    beside = [name for name in PAPER_EDITS if "beside" in name]
    assert len(beside) == 4
    for name, (source, target) in PAPER_EDITS.items():
        assert not untrained_words(f"{source} {target}", vocabulary())
        verb, finding = name.split(" beside ")[0].split(" ", 1)
        shown = [finding.lower() in text for text in (source, target)]
        assert shown == ([False, True] if verb == "add" else [True, False])
    for name in beside:
        other = name.split(" beside ")[1].lower()
        assert all(other in text for text in PAPER_EDITS[name])


def test_a_plan_holds_only_edits_that_change_something(cohort):
    edits = [Edit("Support Devices", False), Edit("Support Devices", True)]
    plan = plan_edits(cohort.table, edits)
    assert len(plan) == len(cohort.table)
    labels = cohort.table.set_index("film_id").loc[plan["film_id"], "Support Devices"]
    assert (labels.to_numpy(bool) != plan["present"].to_numpy(bool)).all()
    assert (plan["source"] != plan["target"]).all()
    unknown = cohort.table.assign(**{"Support Devices": np.nan})
    with pytest.raises(ValueError, match="no inverted film can take any of the edits"):
        plan_edits(unknown, edits)


def test_truths_are_the_phantoms_own_and_nan_elsewhere(cohort, tmp_path):
    plan = plan_edits(cohort.table.head(4), [Edit("Cardiomegaly", True), Edit("Edema", True)])
    films, masks = truths(cohort, plan)
    assert np.isfinite(films).all()
    assert masks.any(axis=(1, 2)).all()
    films, masks = truths(replace(cohort, image_root=tmp_path), plan)
    assert np.isnan(films).all()
    assert not masks.any()


# How an edit is made


def test_peers_stand_beside_our_own_with_their_recipes(cohort, tmp_path):
    chosen = cohort.table.head(4)
    films, plan = films_of(cohort, chosen), plan_edits(chosen, [Edit("Support Devices", False)])
    whole = np.ones((len(plan), 64, 64), bool)
    own, peer = (Edited(films[plan["row"]] * s, whole, whole.mean((1, 2))) for s in (1.0, 0.5))
    rows = filter_edits(plan, np.full(len(plan), 0.5), own.area, 0.1).assign(seed=3)
    other = rows.iloc[:1].assign(seed=4)
    first = Edited(peer.films[:1], peer.masks[:1], peer.area[:1])
    table = save_edits(
        tmp_path, rows, own, chosen, {"vae": films}, {}, {"ledits++": (other, first)}
    )
    mine, theirs = (table[table["method"] == name] for name in (OWN, "ledits++"))
    assert len(mine) == len(plan)
    assert list(theirs["seed"]) == [4]
    assert not set(theirs["path"]) & set(table.drop(theirs.index)["path"])
    loaded = uint8_to_unit(load_edit_films(tmp_path, theirs))
    np.testing.assert_allclose(loaded, first.films, atol=1 / 255)


def test_the_profiles_names_are_those_of_the_package():
    assert set(typing.get_args(params.Inversion)) == set(METHODS)
    assert list(typing.get_args(params.Preset)) == list(PRESETS)


def test_prism_without_null_text_is_refused_before_anything_runs():
    with pytest.raises(params.ProfileError, match="set inversion to null_text"):
        params.check_profile({"preset": "prism"})
    with pytest.raises(params.ProfileError, match="set inversion to null_text"):
        params.check_profile({"preset": "prism", "inversion": "ddim"})
    with pytest.raises(params.ProfileError, match="peers = 'prism' with inversion = 'direct'"):
        params.check_profile({"peers": ["sdedit", "prism"]})
    params.check_profile({"preset": "prism", "inversion": "null_text"})


def test_only_what_a_profile_sets_itself_overrides_the_preset():
    unset = SimpleNamespace(seed=3, guidance_scale=0.0, mask="preset", detail=-1.0)
    assert given_dials(unset) == {"seed": 3}
    own = SimpleNamespace(seed=3, guidance_scale=5.0, mask="none", detail=0.0)
    own = given_dials(own)
    assert own == {"seed": 3, "guidance_scale": 5.0, "mask": "none", "detail": 0.0}


def test_a_row_is_enough_to_make_its_edit_again(model, cohort, tmp_path):
    chosen = cohort.table.head(4)
    films, ids, texts = films_of(cohort, chosen), list(chosen["film_id"]), list(chosen["caption"])
    inversion = invert(model, encode_films(model, films), ids, texts, "direct", 2)
    plan = plan_edits(chosen, [Edit("Support Devices", False), Edit("Edema", True)])
    dials = {"guidance_scale": 3.0, "seed": 5, "mask": "none"}
    edited = edit(model, inversion, films, plan["row"], plan["target"], preset="default", **dials)
    rows = filter_edits(plan, np.full(len(plan), 0.5), edited.area, 0.1)
    rows = rows.assign(**recipe(inversion, "default", **dials))
    save_edits(tmp_path, rows, edited, chosen, {"vae": films}, {})
    table = pd.read_parquet(tmp_path / "edits.parquet")
    row = table[table["method"] == OWN].iloc[-1]
    assert str(row["seed"]) == "5", "noise is drawn from it as text"
    film = films[[ids.index(row["film_id"])]]
    z0 = encode_films(model, film)
    method, num_steps = row["inversion"], row["num_steps"]
    again = invert(model, z0, [row["film_id"]], [row["source"]], method, num_steps)
    assert again.model_key == inversion.model_key == row["model_key"]
    values = {f.name: row["editor" if f.name == "method" else f.name] for f in fields(Dials)}
    values |= {name: json.loads(values[name]) for name in ("weights", "hold")} | {"keep": None}
    again = edit(model, again, film, [0], [row["target"]], preset=row["preset"], **values)
    np.testing.assert_allclose(again.films[0], edited.films[-1], rtol=0, atol=1e-3)


def test_one_film_is_edited_alone(model, cohort):
    film = films_of(cohort, cohort.table.head(1))[0]
    source, target = PAPER_EDITS["remove Support Devices"]
    edited, how = edit_film(model, film, source, target, num_steps=2, preset="prism")
    assert edited.films.shape == (1, 64, 64)
    assert (how["inversion"], how["num_steps"], how["control"]) == ("null_text", 2, "p2p")
    _, how = edit_film(model, film, source, target, method="ddpm", num_steps=2)
    assert how["inversion"] == "ddpm"
    with pytest.raises(ValueError, match="the nearest is 'default'"):
        edit_film(model, film, source, target, preset="defualt")


# The filter, and what is written


def test_the_filter_rejects_with_a_reason_and_keeps_every_row():
    plan = pd.DataFrame({"film_id": ["a", "b", "c", "d"]})
    scores, area = np.array([0.5, 0.05, 0.0, np.nan]), np.array([0.1, 0.1, 0.0, 0.2])
    judged = filter_edits(plan, scores, area, 0.1)
    assert judged["kept"].tolist() == [True, False, False, False]
    reasons = ["", "S_CLIP 0.050 is below 0.1", "the mask is empty: nothing was changed"]
    assert judged["reason"].tolist() == [*reasons, "S_CLIP nan is below 0.1"]
    assert "kept" not in plan


def test_written_edits_say_that_they_are_synthetic(cohort, tmp_path):
    chosen = cohort.table.head(6)
    plan = plan_edits(chosen, [Edit("Support Devices", False)])
    rng = np.random.default_rng(0)
    films = rng.random((len(plan), 64, 64), np.float32)
    masks = rng.random(films.shape) < 0.3
    edited = Edited(films, masks, masks.mean((1, 2)))
    plan = filter_edits(plan, np.full(len(plan), 0.05), edited.area, 0.1)
    floors = {"vae": np.zeros((6, 64, 64), np.float32)}
    table = save_edits(tmp_path, plan, edited, chosen, floors, {"versions": {"torch": "x"}})
    assert len(table) == len(plan) + 6
    own = table[table["method"] == OWN]
    with Image.open(tmp_path / own["path"].iloc[0]) as image:
        assert "SYNTHETIC" in image.text["Description"]
        assert image.text["T'"] == plan["target"].iloc[0]
        assert json.loads(image.text["Recipe"])["reason"] == "S_CLIP 0.050 is below 0.1"
        assert plan["patient_id"].iloc[0] not in str(image.text), "whose film it is"
    for path, mask in zip(own["mask_path"], masks, strict=True):
        with Image.open(tmp_path / path) as image:
            assert image.mode == "1"
        assert np.array_equal(load_image(tmp_path / path) == 1, mask)
    back = load_edit_films(tmp_path, own)
    assert abs(uint8_to_unit(back) - films).max() <= 0.5 / 255 + 1e-6
    again = pd.read_parquet(tmp_path / "edits.parquet")
    assert again["path"].tolist() == table["path"].tolist()
    assert again["kept"].dropna().tolist() == [False] * len(plan), "rejected edits are kept"
