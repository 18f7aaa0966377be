"""Fine-tuning and the latent cache: what is trained, from which draws, and when it stops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort, split_by_patient
from prism_nb.diffusion import embed_captions, encode_films
from prism_nb.finetune import TrainingError, batch, epoch_rows, finetune, validation_loss
from prism_nb.images import load_films, uint8_to_unit
from prism_nb.latents import encode_cohort

SETTINGS = {
    "seed": 3,
    "num_train_steps": 4,
    "train_batch_size": 4,
    "accumulation": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "caption_dropout": 0.1,
    "ema_decay": 0.0,
}


def settings(**other):
    return SimpleNamespace(**{**SETTINGS, **other})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    cohort = load_cohort(phantom.write_cohort(folder, 14, 64, seed=1))
    table = split_by_patient(cohort.table)
    cohort.table = table.assign(caption=captions(table))
    return cohort


@pytest.fixture
def latents(model, cohort, tmp_path):
    return encode_cohort(model, cohort.table, cohort.image_root, 64, "squash", tmp_path, 5)


def test_cached_latents_equal_a_fresh_encode(model, cohort, latents):
    paths = [cohort.image_root / path for path in cohort.table["path"]]
    fresh = encode_films(model, uint8_to_unit(load_films(paths, 64)))
    torch.testing.assert_close(latents.mean, fresh, rtol=1e-4, atol=1e-5)
    assert latents.film_ids == list(cohort.table["film_id"])
    assert (latents.std > 0).all()


def test_each_film_keeps_its_own_caption(model, cohort, latents):
    for row, caption in enumerate(cohort.table["caption"]):
        assert latents.captions[latents.caption_index[row]] == caption
    row = np.array([5])
    fresh = embed_captions(model, [cohort.table["caption"].iloc[5]])
    torch.testing.assert_close(latents.cond(row), fresh)
    assert latents.captions[-1] == ""
    torch.testing.assert_close(latents.text[-1:], embed_captions(model, [""]))


def test_only_the_unet_is_trained(model, latents):
    before = {k: v.clone() for k, v in model.vae.state_dict().items()}
    text = {k: v.clone() for k, v in model.text_encoder.state_dict().items()}
    unet = {k: v.clone() for k, v in model.unet.state_dict().items()}
    steps = list(finetune(model, latents, np.arange(10), settings()))
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert all(torch.equal(v, before[k]) for k, v in model.vae.state_dict().items())
    assert all(torch.equal(v, text[k]) for k, v in model.text_encoder.state_dict().items())
    assert any(not torch.equal(v, unet[k]) for k, v in model.unet.state_dict().items())


def test_training_lowers_the_validation_loss(model, latents):
    rows = np.arange(10)
    before = validation_loss(model, latents, rows).mean()
    list(finetune(model, latents, rows, settings(num_train_steps=25)))
    assert validation_loss(model, latents, rows).mean() < 0.9 * before


def test_the_same_seed_gives_the_same_weights(random_base, latents):
    from prism_nb.diffusion import load_model

    weights = []
    for seed in (3, 3, 4):
        model = load_model(str(random_base), device="cpu")
        list(finetune(model, latents, np.arange(10), settings(seed=seed, num_train_steps=2)))
        weights.append(torch.cat([w.flatten() for w in model.unet.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_accumulation_sees_the_films_of_one_large_batch(model, latents):
    whole = epoch_rows(np.arange(10), 0, 8, seed=1)
    halves = [epoch_rows(np.arange(10), part, 4, seed=1) for part in (0, 1)]
    assert (whole == np.concatenate(halves)).all()


@pytest.mark.parametrize("batch_size", [3, 4, 16])
def test_every_film_is_seen_once_an_epoch(batch_size):
    rows = np.array([2, 3, 5, 7, 11, 13, 17])
    seen = np.concatenate([epoch_rows(rows, micro, batch_size, seed=9) for micro in range(21)])
    for epoch in range(len(seen) // len(rows)):
        part = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert sorted(part) == sorted(rows)


def test_dropped_captions_are_the_empty_one(model, latents):
    rows = np.arange(10)
    *_, cond, _ = batch(model, latents, rows, 0, settings(caption_dropout=1.0))
    assert all(torch.equal(part, latents.text[-1]) for part in cond)
    *_, kept, _ = batch(model, latents, rows, 0, settings(caption_dropout=0.0))
    assert not any(torch.equal(part, latents.text[-1]) for part in kept)


def test_noisy_latents_follow_algorithm_1(model, latents):
    noisy, t, _, noise = batch(model, latents, np.arange(10), 5, settings())
    z0 = (noisy - (1 - model.alphas[t]).sqrt().view(-1, 1, 1, 1) * noise) / (
        model.alphas[t].sqrt().view(-1, 1, 1, 1)
    )
    chosen = epoch_rows(np.arange(10), 5, 4, seed=3)
    spread = (z0 - latents.mean[chosen]) / latents.std[chosen]
    assert abs(spread.mean()) < 0.1
    assert spread.std() == pytest.approx(1, abs=0.1)


def test_a_loss_that_is_no_number_stops_in_one_line(model, latents):
    with torch.no_grad():
        next(model.unet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="at step 0: lower learning_rate"):
        next(finetune(model, latents, np.arange(10), settings()))


def test_validation_loss_is_the_same_twice(model, latents):
    first = validation_loss(model, latents, np.arange(6), seed=2)
    assert (first == validation_loss(model, latents, np.arange(6), seed=2)).all()
    assert first.shape == (6,)
