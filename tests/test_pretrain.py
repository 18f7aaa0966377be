"""What trains the bundled base: its films, and the text encoder's spread."""

import shutil

import numpy as np
import torch

from prism_nb.diffusion import embed_captions, load_model
from prism_nb.images import uint8_to_unit, unit_to_sd
from prism_nb.phantom import DRAWN, pretrain

CAPTIONS = ["chest x-ray showing edema", "chest x-ray showing support devices", "chest x-ray"]


def words(model):
    """What the text encoder gives for the words of CAPTIONS alone, padding left out."""
    embedded = embed_captions(model, CAPTIONS)
    lengths = [len(model.tokenizer(text).input_ids) for text in CAPTIONS]
    return torch.cat([row[:n] for row, n in zip(embedded, lengths, strict=True)])


def test_spread_text_centres_and_scales_and_changes_nothing_else(random_base, tmp_path):
    folder = shutil.copytree(random_base, tmp_path / "base")
    before = words(load_model(str(folder), device="cpu"))
    pretrain.spread_text(folder, CAPTIONS)
    after = words(load_model(str(folder), device="cpu"))
    expected = (before - before.mean(0)) / before.std(0).clamp(min=0.02)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_a_family_is_a_film_and_four_twins_with_one_finding_turned_over():
    for number in range(1, 7):
        films, labels = pretrain._family(number, 64)
        assert films.shape == (pretrain.FAMILY, 64, 64)
        assert len(labels) == pretrain.FAMILY
        turned = [[k for k in DRAWN if row[k] != labels[0][k]] for row in labels[1:]]
        assert turned[:3] == [[finding] for finding in pretrain.MAIN]
        assert len(turned[3]) == 1
        assert turned[3][0] not in pretrain.MAIN
        if number % 3 == 2:
            assert not any(labels[0][name] for name in DRAWN if name not in pretrain.MAIN)


def test_the_same_family_is_drawn_again():
    assert np.array_equal(pretrain._family(4, 64)[0], pretrain._family(4, 64)[0])


def test_twins_come_in_pairs_of_one_family():
    rows = pretrain.twins(np.random.default_rng(0), 50, 6).reshape(-1, 2)
    assert (rows[:, 0] % pretrain.FAMILY == 0).all()
    assert (rows // pretrain.FAMILY == rows[:, :1] // pretrain.FAMILY).all()
    assert (rows[:, 0] != rows[:, 1]).all()
    assert len(set(rows[:, 0])) == 6


def test_a_widened_vae_holds_the_old_one():
    small, wide = pretrain.tiny_vae(4).eval(), pretrain.tiny_vae(6).eval()
    pretrain.widen(wide, small)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        old, new = small.encode(x).latent_dist, wide.encode(x).latent_dist
        torch.testing.assert_close(new.mean[:, :4], old.mean)
        torch.testing.assert_close(new.logvar[:, :4], old.logvar)
        torch.testing.assert_close(wide.decode(new.mean).sample, small.decode(old.mean).sample)


def test_standardised_latents_have_mean_0_and_spread_1_and_decode_as_before():
    torch.manual_seed(0)
    vae = pretrain.tiny_vae(4).eval()
    films = np.random.default_rng(0).integers(0, 256, (20, 64, 64), np.uint8)
    x = unit_to_sd(uint8_to_unit(films))
    with torch.no_grad():
        old = vae.encode(x).latent_dist
        decoded = vae.decode(old.mean).sample
        pretrain.standardise(vae, films)
        new = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(new.mean).sample, decoded, rtol=1e-3, atol=1e-4)
    mean, std = (getattr(old.mean, name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    torch.testing.assert_close(new.mean, (old.mean - mean) / std, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(new.std, old.std / std, rtol=1e-3, atol=1e-3)
    assert vae.config.scaling_factor == 1
