"""Inversion and editing: exact where theory says so, bounded on the bundled base."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import choose_films, load_cohort, split_by_patient
from prism_nb.diffusion import alpha_at, embed_captions, encode_films, load_model
from prism_nb.editing import counterfactuals
from prism_nb.edits import (
    OWN,
    Edit,
    load_edit_films,
    parse_edit,
    plan_edits,
    save_edits,
    truths,
)
from prism_nb.images import load_films, uint8_to_unit
from prism_nb.inversion import Inversion, ddim_invert, ddim_sample, levels, load_inversion
from prism_nb.scoring import load_clip


class FixedNoise(torch.nn.Module):
    """A U-Net whose noise depends on the timestep only: DDIM inversion of it is exact."""

    def forward(self, z, t, encoder_hidden_states):
        generator = torch.Generator().manual_seed(int(t))
        noise = torch.randn(z.shape[1:], generator=generator)
        return SimpleNamespace(sample=noise.expand_as(z))


def test_inversion_is_exact_when_the_noise_does_not_depend_on_the_latent(model):
    model.unet = FixedNoise()
    z0 = torch.randn((3, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    trajectory = ddim_invert(model, z0, None, 12)
    assert trajectory.shape == (13, 3, 8, 8, 8)
    assert torch.equal(trajectory[0], z0)
    torch.testing.assert_close(ddim_sample(model, trajectory[-1], None, 12), z0, rtol=0, atol=1e-4)


def test_no_step_is_skipped(model):
    assert levels(model, 5) == [-1, 1, 201, 401, 601, 801]
    assert alpha_at(model, -1) == model.scheduler.final_alpha_cumprod


def test_guidance_one_is_the_caption_alone(model):
    z = torch.randn((2, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    cond = embed_captions(model, ["chest x-ray showing edema"] * 2)
    alone = ddim_sample(model, z, cond, 3)
    other = ddim_sample(model, z, cond, 3, 1.0, embed_captions(model, [""]))
    assert torch.equal(alone, other)
    with pytest.raises(ValueError, match="needs the embedding of the empty caption"):
        ddim_sample(model, z, cond, 3, 2.0)


def test_a_batch_gives_what_its_films_give_alone(model):
    z = torch.randn((3, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    cond = embed_captions(model, ["chest x-ray", "chest x-ray showing edema", ""])
    together = ddim_sample(model, z, cond, 4)
    alone = torch.cat([ddim_sample(model, z[i : i + 1], cond[i : i + 1], 4) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_an_inversion_comes_back_from_disk(tmp_path):
    trajectory = torch.randn((4, 2, 4, 8, 8))
    Inversion(["a", "b"], ["x", "y"], trajectory).save(tmp_path)
    again = load_inversion(tmp_path)
    assert torch.equal(again.trajectory, trajectory)
    assert (again.film_ids, again.captions, again.num_steps) == (["a", "b"], ["x", "y"], 3)
    (tmp_path / "trajectory.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="run 03_invert again"):
        load_inversion(tmp_path)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    cohort = load_cohort(phantom.write_cohort(tmp_path_factory.mktemp("cohort"), 60, 256, seed=2))
    table = split_by_patient(cohort.table, 0.4, 0.2)
    cohort.table = table.assign(caption=captions(table))
    cohort.settings |= {"image_size": 256, "fit": "squash"}
    return cohort


@pytest.fixture(scope="module")
def bundled():
    return load_model("phantom", device="cpu")


def test_the_bundled_base_inverts_edits_and_scores(bundled, cohort):
    chosen = cohort.table[cohort.table["Cardiomegaly"] == 1].head(6).reset_index(drop=True)
    films = uint8_to_unit(load_films([cohort.image_root / p for p in chosen["path"]], 256))
    z0, cond = encode_films(bundled, films), embed_captions(bundled, list(chosen["caption"]))
    trajectory = ddim_invert(bundled, z0, cond, 10)
    back = ddim_sample(bundled, trajectory[-1], cond, 10)
    assert (back - z0).abs().mean() < 0.35 * z0.abs().mean()
    plan = plan_edits(chosen, [Edit("Cardiomegaly", False)])
    inversion = Inversion(list(chosen["film_id"]), list(chosen["caption"]), trajectory)
    edited = counterfactuals(bundled, inversion, plan["row"], plan["target"], 2.0)
    truth, mask = truths(cohort, plan)
    factual = films[plan["row"]]
    wanted, made = truth - factual, edited - factual
    effectiveness = (wanted * made).sum(axis=(1, 2)) / (wanted**2).sum(axis=(1, 2))
    assert effectiveness.mean() > 0.3, "a third of the true change, at least, must be made"
    own_vae = abs(edited - truth)[~mask].mean()
    assert own_vae < 0.06
    scorer = load_clip("base", "phantom", bundled.device)
    score = scorer.s_clip(factual, edited, list(plan["source"]), list(plan["target"]))
    back = scorer.s_clip(edited, factual, list(plan["target"]), list(plan["source"]))
    np.testing.assert_allclose(score, back, atol=1e-5)
    assert (abs(score) <= 1).all()
    still = scorer.s_clip(factual, factual, list(plan["source"]), list(plan["target"]))
    np.testing.assert_allclose(still, 0, atol=1e-5)


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


def test_written_edits_say_that_they_are_synthetic(cohort, tmp_path):
    from PIL import Image

    chosen = cohort.table.head(6)
    plan = plan_edits(chosen, [Edit("Support Devices", False)]).assign(s_clip=0.5, kept=True)
    edited = np.random.default_rng(0).random((len(plan), 128, 128), np.float32)
    floors = {"vae": np.zeros((6, 128, 128), np.float32)}
    table = save_edits(tmp_path, plan, edited, chosen, floors, {"versions": {"torch": "x"}})
    assert len(table) == len(plan) + 6
    own = table[table["method"] == OWN]
    with Image.open(tmp_path / own["path"].iloc[0]) as image:
        assert "SYNTHETIC" in image.text["Description"]
        assert image.text["T'"] == plan["target"].iloc[0]
    back = load_edit_films(tmp_path, own)
    assert abs(uint8_to_unit(back) - edited).max() <= 0.5 / 255 + 1e-6
    again = pd.read_parquet(tmp_path / "edits.parquet")
    assert again["path"].tolist() == table["path"].tolist()
    assert again["kept"].dropna().tolist() == own["kept"].tolist()


def test_edits_are_read_in_words():
    assert parse_edit("remove support devices") == Edit("Support Devices", False)
    assert parse_edit("add Pleural Effusion").name == "add Pleural Effusion"
    for text in ("Support Devices", "delete Edema", "remove", "add Efusion"):
        with pytest.raises(ValueError, match=text.split()[-1]):
            parse_edit(text)


def test_chosen_films_take_captions_in_turn(cohort):
    chosen = choose_films(cohort.table, {"test": 5, "train": 3}, seed=0)
    assert chosen["split"].tolist() == ["test"] * 5 + ["train"] * 3
    again = choose_films(cohort.table.sample(frac=1, random_state=1), {"test": 5, "train": 3}, 0)
    assert set(chosen["film_id"]) == set(again["film_id"])
    kinds = cohort.table.loc[cohort.table["split"] == "test", "caption"].nunique()
    assert chosen.loc[:4, "caption"].nunique() == min(5, kinds)


def test_mismatched_targets_are_refused(model):
    inversion = Inversion(["a"], ["x"], torch.zeros((3, 1, 8, 8, 8)))
    with pytest.raises(ValueError, match="give one caption a film"):
        counterfactuals(model, inversion, [0], ["x", "y"], 2.0)
