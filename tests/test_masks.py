"""Masks: the film outside is the film itself, whatever the edit inside."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from prism_nb import masks as m
from prism_nb.diffusion import embed_captions, predict_noise


def films(num=3, side=64, seed=0):
    """Random films (num, side, side) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (num, side, side), np.uint8)


def disk(side=64, centre=(20, 40), radius=8):
    """A disk, (side, side) bool."""
    y, x = np.mgrid[:side, :side]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


@pytest.mark.parametrize("feather", [0, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_outside_the_mask_every_bit_is_the_films(kind, feather):
    film = films() if kind == np.uint8 else (films() / 255).astype(kind)
    edited = np.random.default_rng(1).random(film.shape, np.float32)
    masks = np.stack([disk(), np.zeros((64, 64), bool), np.ones((64, 64), bool)])
    made = m.composite(film, edited, masks, feather)
    assert made.dtype == film.dtype
    assert made[~masks].tobytes() == film[~masks].tobytes()
    assert made[1].tobytes() == film[1].tobytes()
    whole = m.unit_to_uint8(edited[2]) if kind == np.uint8 else edited[2].astype(kind)
    assert np.array_equal(made[2], whole)
    assert not np.array_equal(made[0], film[0])


def test_feathering_fades_in_from_the_border_and_only_inside():
    film, edited = np.zeros((1, 64, 64), np.float32), np.ones((1, 64, 64), np.float32)
    mask = np.zeros((1, 64, 64), bool)
    mask[0, :, 20:] = True
    row = m.composite(film, edited, mask, feather=3)[0, 5]
    np.testing.assert_allclose(row[18:25], [0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert row[-1] == 1, "the film's own edge is no border"


def test_composite_refuses_what_does_not_fit():
    film, edited, mask = films(1), np.zeros((1, 64, 64), np.float32), disk()[None]
    for args, words in [
        ((film, edited, mask[:, :32]), r"masks \(1, 32, 64\)"),
        ((film[0], edited[0], mask[0]), r"must be \(R, H, W\)"),
        ((film, film, mask), "edits are uint8"),
        ((film, edited, mask.astype(int)), "masks int64"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            m.composite(*args)
        assert "\n" not in str(error.value)


def test_otsu_parts_two_populations_and_gives_up_on_one():
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0.1, 0.02, 900), rng.normal(0.8, 0.02, 100)])
    assert 0.2 < m.otsu(two) < 0.75
    assert m.otsu(two * 50) == pytest.approx(m.otsu(two) * 50)
    assert m.otsu(np.full(10, 0.3)) == np.inf


def test_the_automatic_mask_finds_what_changed():
    true, rng = np.stack([disk(), disk(centre=(45, 15), radius=5)]), np.random.default_rng(0)
    floor = rng.random((2, 64, 64)) * 0.5
    edited = floor + 0.3 * true + rng.normal(0, 0.01, floor.shape)
    noise = torch.nn.functional.avg_pool2d(torch.tensor(true, dtype=torch.float32)[:, None], 8)
    for evidence in ((), (noise[:, 0],), (noise[:, 0], noise[:, 0] * 7)):
        found = m.automatic(edited, floor, evidence)
        assert found.shape == true.shape
        assert found.dtype == bool
        overlap = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
        assert (overlap > 0.55).all(), overlap
        assert found[true].mean() > 0.95


def test_the_dial_makes_masks_larger_or_smaller():
    blob = ndimage.gaussian_filter(disk().astype(float), 6)[None]
    areas = [m.automatic(blob, 0 * blob, threshold=dial).mean() for dial in (0.5, 1.0, 1.5)]
    assert areas[0] > areas[1] > areas[2] > 0


def test_other_evidence_vetoes_pixels_that_moved_elsewhere():
    floor = np.full((1, 64, 64), 0.5)
    there = disk() | disk(centre=(50, 12))
    noise = np.zeros((1, 8, 8))
    noise[0, 1:4, 3:7] = 1
    found = m.automatic(floor + 0.2 * there, floor, [noise])[0]
    assert found[20, 40]
    assert not found[50, 12]
    with pytest.raises(ValueError, match="evidence of 1 edits, pixels of 2"):
        m.automatic(np.zeros((2, 8, 8)), np.zeros((2, 8, 8)), [noise])


def test_no_change_is_an_empty_mask_and_not_a_full_one():
    floor = np.random.default_rng(0).random((1, 64, 64))
    flat = np.ones((1, 8, 8))
    assert not m.automatic(floor, floor).any()
    assert not m.automatic(floor, floor, [flat]).any()
    assert not m.automatic(floor + 1e-3, floor, [flat]).any(), "less than half a grey level"
    assert not m.automatic(floor + 0.2 * disk(), floor, [0 * flat]).any()


def test_specks_are_dropped_and_what_is_left_gets_a_margin():
    floor = np.zeros((1, 256, 256))
    edited = floor.copy()
    edited[0, 100:140, 100:140], edited[0, 10, 10] = 0.5, 0.9
    found = m.automatic(edited, floor)[0]
    assert not found[:30, :30].any()
    rows = np.flatnonzero(found[:, 120])
    assert 92 <= rows[0] <= 98
    assert 141 <= rows[-1] <= 147


def test_what_the_vae_loses_is_no_change_of_the_edit():
    """A letter that comes back blurred, moved by little, stays; a wire that is gone goes."""
    film = np.full((1, 128, 128), 0.3)
    film[0, 20:24, 20:40] = film[0, 90:94, 20:110] = 0.9  # a letter, and a wire
    floor = film.copy()
    floor[0, 20:24, 20:40], floor[0, 90:94, 20:110] = 0.5, 0.7  # the VAE loses some of both
    edited = floor.copy()
    edited[0, 20:24, 20:40], edited[0, 90:94, 20:110] = 0.45, 0.3
    found = [m.automatic(edited, floor, threshold=0.1, films=films)[0] for films in (None, film)]
    assert found[0][21, 30]
    assert not found[1][21, 30]
    assert found[1][91, 60]


def test_keep_wins_over_the_union():
    left, right = np.zeros((2, 2, 4, 4), bool)
    left[:, :, :2], right[:, :, 3:] = True, True
    keep = m.as_mask(np.eye(4), (2, 4, 4), "keep")
    joint = m.union([left, right], keep)
    assert np.array_equal(joint, (left | right) & ~np.eye(4, dtype=bool))
    assert np.array_equal(m.union([left]), left)


@pytest.mark.parametrize("mask", [np.ones((4, 5)), np.full((4, 4), 0.5), np.ones((3, 4, 4), bool)])
def test_a_given_mask_of_another_shape_or_kind_is_refused(mask):
    with pytest.raises(ValueError, match=r"give True and False .* as \(4, 4\) or \(2, 4, 4\)"):
        m.as_mask(mask, (2, 4, 4))


def test_detail_returns_grain_but_not_what_was_removed():
    rng = np.random.default_rng(0)
    floor = np.full((1, 64, 64), 0.5, np.float32)
    film = floor + rng.normal(0, 0.01, floor.shape).astype(np.float32)
    film[0, 30:32] += 0.4  # a wire that the VAE did not code
    edited = floor.copy()
    edited[0, :, 50:] = 0.8  # and what the edit has changed: its grain is the film's as well
    assert m.restore_detail(film, None, edited, 0) is edited
    made = m.restore_detail(film, floor, edited, 1.0)
    assert made.dtype == np.float32
    assert abs(made - film)[0, :20, :40].mean() < 0.35 * abs(edited - film)[0, :20, :40].mean()
    np.testing.assert_allclose(made[0, 30:32, :40], 0.5, atol=0.02)
    lost = (film - floor)[0, :20, 54:]
    assert np.corrcoef((made - 0.8)[0, :20, 54:].ravel(), lost.ravel())[0, 1] > 0.95


def test_diffedits_mask_is_where_the_clipped_difference_passes_a_half():
    difference = torch.full((1, 8, 8), 0.1)
    difference[0, 2, 3], difference[0, 5, 5] = 9.0, 0.7
    mask = m.diffedit_mask(difference)
    top = 3 * difference.mean()
    assert torch.equal(mask, difference > 0.5 * top)
    assert not m.diffedit_mask(torch.zeros(1, 8, 8)).any()


def test_noise_difference_is_that_of_the_two_captions(model):
    z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    source, target, other = (
        embed_captions(model, [text] * 2)
        for text in ("chest x-ray", "chest x-ray showing edema", "normal chest x-ray")
    )
    weights = torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        eps = [predict_noise(model, z, 401, cond) for cond in (source, target, other)]
        wanted = (eps[1] - eps[0]).abs().mean(1) * weights[0, :, None, None]
        for base, has_source in ((source, True), (other, False)):
            watch = m.NoiseDifference(source, weights, has_source=has_source)
            made = watch(model, torch.cat([z, z]), 401, torch.cat([base, target]))
            torch.testing.assert_close(made[2:], eps[1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(watch.map, wanted, rtol=1e-4, atol=1e-4)
        watch = m.NoiseDifference(source, weights, [target], has_source=True)
        made = watch(model, torch.cat([z, z]), 401, torch.cat([source, target]))
        torch.testing.assert_close(made[2:], eps[0], rtol=1e-4, atol=1e-4)


def test_held_directions_are_taken_out_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    steps, held = (torch.randn(n, 3, 4, 8, 8, generator=rng) for n in (2, 2))
    left = m.without(steps, held)
    dots = torch.einsum("jrchw,krchw->jkr", left, held)
    torch.testing.assert_close(dots, torch.zeros_like(dots), rtol=0, atol=1e-3)
    torch.testing.assert_close(m.without(left, held), left, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(m.without(steps, 0 * held), steps)


def test_a_mask_shrinks_to_where_the_film_would_visibly_change():
    films = np.full((2, 64, 64), 0.5)
    edited, floor = films.copy(), films.copy()
    edited[0, 20:40, 20:40] += 0.2
    wide = m.automatic(edited, floor)
    films[0, 20:40, 30:40] = edited[0, 20:40, 30:40]  # here the film was as the edit has it
    masks = m.automatic(edited, floor, films=films)
    assert masks[0, 30, 25]
    assert not masks[0, 30, 36]
    assert not (masks & ~wide).any()
    assert not masks[1].any()
