"""What trains the bundled base: its films, and the text encoder's spread."""

import shutil

import numpy as np
import torch

from prism_nb.diffusion import embed_captions, load_model
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


def test_films_are_of_three_kinds_and_patches_hold_what_shows():
    for number in range(1, 7):
        film, labels, patches = pretrain._film(number, 64)
        assert film.shape == (64, 64)
        assert patches.shape == (pretrain.PATCHES, pretrain.PATCHES, len(DRAWN))
        assert (patches.any((0, 1)) == [bool(labels[name]) for name in DRAWN]).all()
        if number % 3 == 2:
            assert not any(labels[name] for name in DRAWN if name not in pretrain.MAIN)


def test_the_same_film_is_drawn_again():
    assert np.array_equal(pretrain._film(4, 64)[0], pretrain._film(4, 64)[0])
