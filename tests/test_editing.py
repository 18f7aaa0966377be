"""Editing: what must not change does not, by any method, control or mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from prism_nb import editors
from prism_nb.attention import Controller, Edit, align, control
from prism_nb.captions import PromptError
from prism_nb.diffusion import (
    SCHEDULER,
    alpha_at,
    ddim_step,
    decode_latents,
    embed_captions,
    encode_films,
    load_model,
    predict_noise,
)
from prism_nb.editing import PRESETS, _job, choose, edit
from prism_nb.inversion import invert, levels, load_inversion
from prism_nb.regeneration import regenerate

CAPTIONS = ["chest x-ray showing edema", "chest x-ray", "chest x-ray showing pleural effusion"]
OTHER = ["chest x-ray", "chest x-ray showing support devices", "normal chest x-ray"]
PEERS = ["sdedit", "diffedit", "ledits++"]
PLAIN = {"mask": "none", "guidance_scale": 2.0}
P2P = PLAIN | {"control": "p2p"}
ATOL = 1e-3  # of a film in [0, 1], for what is equal but for rounding


@pytest.fixture(scope="module")
def calm(random_base):
    """A random model with a weak last layer: noise that changes slowly, as a trained one's."""
    model = load_model(str(random_base), device="cpu")
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(0.1)
    return model


@pytest.fixture(scope="module")
def films():
    """Three smooth films (3, 64, 64) uint8."""
    y, x = np.mgrid[:64, :64] / 64
    waves = [np.sin(5 * x + k) * np.cos(4 * y + 2 * k) for k in range(3)]
    return (127 + 100 * np.stack(waves)).astype(np.uint8)


def inverted(model, films, method="direct", num_steps=4, **dials):
    """The films a, b, c, inverted under CAPTIONS."""
    z0 = encode_films(model, films.astype(np.float32) / 255)
    return invert(model, z0, ["a", "b", "c"], CAPTIONS, method, num_steps, **dials)


@pytest.fixture(scope="module")
def inversion(calm, films):
    """Their direct inversion in 4 steps."""
    return inverted(calm, films)


def decoded(model, inversion):
    """What the VAE makes of the films."""
    return decode_latents(model, inversion.trajectory[0]).numpy()


def close(a, b, atol=ATOL):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# Identities


@pytest.mark.parametrize("control", editors.CONTROLS)
@pytest.mark.parametrize("method", ["direct", "bdia", "ddpm"])
def test_the_same_caption_returns_the_reconstruction(calm, films, method, control):
    inversion = inverted(calm, films, method)
    dials = {"control": control, "guidance_scale": 3.0}
    made = edit(calm, inversion, films, range(3), CAPTIONS, mask="none", **dials)
    close(made.films, decoded(calm, inversion))
    assert made.masks.all()
    assert (made.area == 1).all()
    made = edit(calm, inversion, films, range(3), CAPTIONS, **dials)
    assert not made.masks.any()
    assert np.array_equal((255 * made.films + 0.5).astype(np.uint8), films)


@pytest.mark.parametrize("targets", [[[(x, 0.0)] for x in OTHER], [[], [(OTHER[0], 0)], []]])
def test_weight_zero_equals_no_edit(calm, films, inversion, targets):
    made = edit(calm, inversion, films, range(3), targets, **PLAIN)
    close(made.films, decoded(calm, inversion))
    assert not edit(calm, inversion, films, range(3), targets).masks.any()


@pytest.mark.parametrize("start", ["source", "empty", None])
def test_guidance_one_is_the_conditional_path(calm, films, inversion, start):
    dials = {"guidance_scale": 1.0, "guidance_from": start, "mask": "none"}
    made = edit(calm, inversion, films, range(3), OTHER, **dials)
    z = regenerate(calm, inversion, embed_captions(calm, OTHER))
    close(made.films, decode_latents(calm, z).numpy())
    assert abs(made.films - decoded(calm, inversion)).max() > 10 * ATOL


@pytest.mark.parametrize(
    "dials", [PLAIN, P2P | {"reweight": 2.0}, PLAIN | {"control": "p2p+blend"}]
)
def test_a_batch_equals_singles_in_any_order(calm, films, inversion, dials):
    rows = [2, 0, 1, 0, 2, 1, 0, 2]
    targets = ["chest x-ray showing edema, pneumonia", *OTHER, *CAPTIONS, OTHER[1]]
    seen = []
    batch = edit(calm, inversion, films, rows, targets, **dials, progress=lambda *n: seen.append(n))
    assert seen == [(8, 8)]
    single = edit(calm, inversion, films, rows, targets, batch_size=1, **dials)
    close(batch.films, single.films)
    back = edit(calm, inversion, films, rows[::-1], targets[::-1], batch_size=3, **dials)
    close(batch.films, back.films[::-1])


def test_an_inversion_from_disk_gives_the_same_edit(calm, films, inversion, tmp_path):
    inversion.save(tmp_path)
    made, again = (
        edit(calm, one, films, range(3), OTHER, control="p2p", keep_raw=True)
        for one in (inversion, load_inversion(tmp_path))
    )
    close(made.films, again.films, 1e-4)
    close(made.raw, again.raw, 1e-4)
    assert np.array_equal(made.masks, again.masks)


# Masks


def test_outside_the_mask_films_are_as_given_and_a_full_one_changes_nothing(calm, films, inversion):
    half = np.zeros((64, 64), bool)
    half[:, :30] = True
    unit = films.astype(np.float32) / 255
    free = edit(calm, inversion, films, range(3), OTHER, mask="none", keep_raw=True)
    assert np.array_equal(free.films, free.raw)
    for given in (films, unit, unit.astype(np.float64)):
        made = edit(calm, inversion, given, range(3), OTHER, mask=half, detail=0.0)
        assert made.films.dtype == np.float32
        assert made.films[:, :, 30:].tobytes() == unit[:, :, 30:].tobytes()
        assert np.array_equal(made.films[:, :, :30], free.films[:, :, :30])
    full = edit(calm, inversion, films, range(3), OTHER, mask=np.ones((3, 64, 64)), detail=0.0)
    assert np.array_equal(full.films, free.films)
    none = edit(calm, inversion, films, range(3), OTHER, mask=~np.ones((64, 64), bool))
    assert none.films.tobytes() == unit.tobytes()
    assert none.area.tolist() == [0, 0, 0]


def test_the_automatic_mask_joins_given_ones_and_keep_wins(calm, films, inversion):
    given = np.zeros((3, 64, 64), bool)
    given[1, :9, :9] = True
    automatic = edit(calm, inversion, films, range(3), OTHER, threshold=0.5)
    assert automatic.masks.any()
    assert not automatic.masks.all()
    joint = edit(calm, inversion, films, range(3), OTHER, mask=["auto", given], threshold=0.5)
    assert np.array_equal(joint.masks, automatic.masks | given)
    keep = np.eye(64, dtype=bool)
    kept = edit(calm, inversion, films, range(3), OTHER, mask=given, keep=keep)
    assert np.array_equal(kept.masks, given & ~keep)
    assert np.array_equal(kept.area, kept.masks.mean((1, 2)))


def test_masks_follow_their_edits_whatever_the_batch(calm, films, inversion):
    given = np.zeros((4, 64, 64), bool)
    for row in range(4):
        given[row, row] = True
    made = edit(calm, inversion, films, [2, 0, 1, 0], [*OTHER, "x"], mask=given, batch_size=3)
    assert np.array_equal(made.masks, given)
    unit = films[[2, 0, 1, 0]].astype(np.float32) / 255
    assert np.array_equal(made.films[~given], unit[~given])


def test_detail_gives_grain_back_inside_a_mask_and_only_there(calm, films, inversion):
    unit, floor = films.astype(np.float32) / 255, decoded(calm, inversion)
    given = {"none": "none", "full": np.ones((64, 64), bool)}
    made = {
        (name, dial): edit(calm, inversion, films, range(3), CAPTIONS, mask=mask, detail=dial).films
        for name, mask in given.items()
        for dial in (0.0, 1.0)
    }
    for unmasked in (("none", 0.0), ("none", 1.0), ("full", 0.0)):
        close(made[unmasked], floor)
    assert abs(made["full", 1.0] - unit).mean() < abs(floor - unit).mean()


# Prompt-to-prompt


def test_a_blend_everywhere_is_none(calm, films, inversion):
    off = edit(calm, inversion, films, range(3), OTHER, **P2P).films
    dials = PLAIN | {"control": "p2p+blend"}
    on = edit(calm, inversion, films, range(3), OTHER, blend_threshold=0, **dials).films
    close(on, off)
    near = edit(calm, inversion, films, range(3), OTHER, blend_threshold=0.9, **dials).films
    assert abs(near - off).max() > ATOL


def test_prompt_to_prompt_without_any_step_is_plain(calm, films, inversion):
    plain = edit(calm, inversion, films, range(3), OTHER, **PLAIN).films
    idle = edit(calm, inversion, films, range(3), OTHER, cross_replace=0, self_replace=0, **P2P)
    close(idle.films, plain)
    led = edit(calm, inversion, films, range(3), OTHER, **P2P).films
    assert abs(led - plain).max() > ATOL


def test_words_are_reweighted_by_name_or_because_they_are_new(calm, films, inversion):
    row, text = [1], ["chest x-ray showing support devices"]
    one, new, named = (
        edit(calm, inversion, films, row, text, **P2P, **dials).films
        for dials in ({}, {"reweight": 2.0}, {"weights": {"showing support devices": 2.0}})
    )
    close(new, named, 1e-6)
    assert abs(new - one).max() > 1e-4
    with pytest.raises(PromptError, match="'edema' is not in"):
        edit(calm, inversion, films, row, text, weights={"edema": 2.0}, **P2P)


def test_prompt_to_prompt_follows_the_films_own_attention(calm, films):
    inversion, rows = inverted(calm, films, num_steps=2), [2, 0]
    z, alphas = inversion.trajectory[2][rows], [alpha_at(calm, t) for t in levels(calm, 2)]
    texts = [[CAPTIONS[r] for r in rows], [CAPTIONS[r] for r in (0, 2)], OTHER[:2]]
    cond = torch.cat([embed_captions(calm, part) for part in texts])  # base, sources, targets
    plans = [align(calm.tokenizer, CAPTIONS[r], t) for r, t in zip(rows, OTHER[:2], strict=True)]
    plan = Controller([Edit(4, 3, plans[0]), Edit(5, 2, plans[1])], 2, 1.0, 1.0)
    with torch.no_grad(), control(calm.unet, plan):
        for plan.step, k in enumerate((1, 0)):
            batch = torch.cat([z, inversion.trajectory[k + 1][[0, 2]], z])
            eps = predict_noise(calm, batch, levels(calm, 2)[k + 1], cond)
            eps = eps[:2] + 20 * (eps[4:] - eps[:2])
            z = ddim_step(z, eps, alphas[k + 1], alphas[k]) + inversion.offsets[k][rows]
    dials = {"cross_replace": 1.0, "self_replace": 1.0, "guidance_scale": 20.0}
    made = edit(calm, inversion, films, rows, OTHER[:2], **P2P | dials).films
    close(made, decode_latents(calm, z).numpy(), 2e-4)


def test_changed_words_are_those_on_either_side(model):
    gone, new = editors.changed_words(
        model.tokenizer,
        "chest x-ray showing edema, support devices",
        "normal chest x-ray showing edema",
    )
    assert [word.text for word in gone] == ["support", "devices"]
    assert [word.text for word in new] == ["normal"]


def test_hooks_are_removed_when_a_walk_fails(calm, films, inversion, monkeypatch):
    unet = calm.unet
    forward, calls = unet.conv_out.forward, []

    def fails(z):
        calls.append(z)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(z)

    for dials in (P2P, {"method": "ledits++"}):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(unet.conv_out, "forward", fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                edit(calm, inversion, films, range(3), OTHER, **dials)
        assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
        assert not unet._forward_hooks
        assert not unet._forward_pre_hooks


# Several captions at once


def test_several_signed_captions_add_up(calm, films, inversion):
    (a, b) = OTHER[1:]
    both = edit(calm, inversion, films, [0], [[(a, 1.5), (b, -0.5)]], **PLAIN)
    cond = embed_captions(calm, [a, b])[:, None]
    scale = torch.tensor([[3.0], [-1.0]])
    z = regenerate(calm, inversion, cond, [0], guidance_scale=scale, guidance_from="source")
    close(both.films, decode_latents(calm, z).numpy())
    ragged = edit(calm, inversion, films, [0, 1], [[(a, 1.5), (b, -0.5)], a], **PLAIN).films
    close(ragged[:1], both.films)
    close(ragged[1:], edit(calm, inversion, films, [1], [a], **PLAIN).films)
    for name in editors.CONTROLS[1:]:
        dials = PLAIN | {"control": name}
        twice = edit(calm, inversion, films, [0], [[(a, 0.5), (a, 0.5)]], **dials).films
        close(twice, edit(calm, inversion, films, [0], [a], **dials).films)


def test_what_is_held_stays(calm, films, inversion):
    for dials in (PLAIN, PLAIN | {"guidance_scale": 1.0}):
        made = edit(calm, inversion, films, range(3), [OTHER[1]] * 3, hold=[OTHER[1]], **dials)
        close(made.films, decoded(calm, inversion))
    free = edit(calm, inversion, films, [0], [OTHER[1]], **PLAIN).films
    own = edit(calm, inversion, films, [0], [OTHER[1]], hold=[CAPTIONS[0]], **PLAIN).films
    close(own, free)  # T itself is no direction


# Peers


def by_hand(model, z, cond, first):
    """DDIM steps of diffusers from its timestep number `first` on."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[first:]:
        with torch.no_grad():
            z = scheduler.step(model.unet(z, t, cond).sample, t, z).prev_sample
    return z


def test_sdedit_noises_and_denoises_as_diffusers_does(calm, films, inversion):
    dials = {"method": "sdedit", "guidance_scale": 1.0, "strength": 0.5, "seed": 3}
    made = edit(calm, inversion, films, [1], [OTHER[1]], **dials).films
    noise = torch.randn(1, 16, 8, 8, generator=editors.generator(3, "b"))
    alpha = alpha_at(calm, levels(calm, 4)[2])
    z = alpha.sqrt() * inversion.trajectory[0, 1:2] + (1 - alpha).sqrt() * noise
    z = by_hand(calm, z, embed_captions(calm, [OTHER[1]]), 2)
    close(made, decode_latents(calm, z).numpy())


def test_diffedit_walks_inside_its_mask_only(calm, films, inversion, monkeypatch):
    monkeypatch.setattr(editors, "diffedit_mask", lambda x: torch.zeros(x.shape, dtype=bool))
    made = edit(calm, inversion, films, range(3), OTHER, method="diffedit").films
    assert np.array_equal(made, decoded(calm, inversion))
    monkeypatch.setattr(editors, "diffedit_mask", lambda x: torch.ones(x.shape, dtype=bool))
    made = edit(calm, inversion, films, range(3), OTHER, method="diffedit", strength=1.0).films
    z = regenerate(
        calm,
        replace(inversion, offsets=None),
        embed_captions(calm, OTHER),
        guidance_scale=7.5,
        guidance_from="empty",
    )
    close(made, decode_latents(calm, z).numpy())


def test_leditspp_edits_where_words_changed_and_returns_the_film_but_for_its_last_step(calm, films):
    inversion, unit = inverted(calm, films, num_steps=6), films.astype(np.float32) / 255
    own, other = (
        editors.by_leditspp(
            _job(calm, inversion, unit, [*enumerate(texts)], choose("ledits++", {}))
        )
        for texts in (CAPTIONS, OTHER)
    )
    # diffusers' last step adds no noise, so nothing mends its guess from the lowest timestep
    sigma = (1 / alpha_at(calm, 1000 // 7 + 1) - 1) ** 0.5
    assert (own[0] - inversion.trajectory[0]).square().mean() < (1.2 * sigma) ** 2
    assert (abs(other[0] - own[0]).amax((1, 2, 3)) > 1e-3).all()
    assert own[1] == other[1] == []


@pytest.mark.parametrize("method", PEERS)
def test_peers_draw_from_seed_and_film_whatever_the_batch(calm, films, inversion, method):
    first, again, other = (
        edit(
            calm, inversion, films, rows, [OTHER[row] for row in rows], method=method, **dials
        ).films
        for rows, dials in [([0, 1], {}), ([1, 0], {"batch_size": 1}), ([0, 1], {"seed": 1})]
    )
    close(first, again[::-1])
    if method != "diffedit":  # its noise only makes the mask
        assert abs(first - other).max() > ATOL
    made = edit(calm, inversion, films, [0, 1], OTHER[:2], method=method, mask="auto")
    unit = films[:2].astype(np.float32) / 255
    assert np.array_equal(made.films[~made.masks], unit[~made.masks])


# Presets and errors


def test_presets_run_as_published(calm, films):
    prism = PRESETS["prism"]
    assert prism.inversion == {"method": "null_text", "guidance_scale": 7.5, "num_inner": 10}
    dials = prism.dials
    assert (dials.control, dials.reweight, dials.guidance_from) == ("p2p", 2.0, "tuned")
    assert (dials.cross_replace, dials.self_replace, dials.guidance_scale) == (0.8, 0.5, 7.5)
    inversion = inverted(calm, films, num_steps=2, **prism.inversion | {"num_inner": 1})
    made = edit(calm, inversion, films, range(3), OTHER, preset="prism")
    assert made.masks.all()
    assert choose("prism", {"reweight": 1.0}).control == "p2p"
    assert choose(None, {}).mask == "auto"
    assert choose(None, {"method": "sdedit"}).strength == 0.5
    with pytest.raises(ValueError, match="guidance_from is 'tuned'"):
        edit(calm, inverted(calm, films, num_steps=1), films, [0], OTHER[:1], preset="prism")


LONG = "chest x-ray showing " + ", ".join(["pleural effusion"] * 40)
BAD = [
    ({"targets": OTHER[:1]}, "3 films and 1 targets: give one caption a film"),
    ({"rows": [], "targets": []}, "give one caption a film"),
    ({"rows": [0, 1, 3]}, "rows hold 3; give some from 0 to 2"),
    ({"targets": ["", *OTHER[1:]]}, "caption is empty"),
    ({"targets": [LONG, *OTHER[1:]]}, "shorten it, 'effusion .* is cut"),
    ({"hold": [LONG]}, "is cut"),
    ({"hold": "chest x-ray"}, "give a list of captions"),
    ({"hold": ["chest x-ray"], "preset": "diffedit"}, "diffedit cannot hold captions"),
    ({"hold": ["chest x-ray"], "preset": "ledits++"}, r"ledits\+\+ cannot hold captions"),
    ({"guidance_scale": 51}, "guidance_scale is 51; it must be a number from 0 to 50"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"targets": [[(x, 30.0)] for x in OTHER]}, "it must lie from -50 to 50"),
    ({"strength": -0.1}, "strength is -0.1"),
    ({"cross_replace": 2}, "cross_replace is 2"),
    ({"control": "ptp"}, "control is 'ptp'; it must be one of plain, p2p"),
    ({"method": "imagic"}, "method is 'imagic'; it must be one of inversion, sdedit"),
    ({"preset": "prsm"}, "no preset 'prsm'; the nearest is 'prism'"),
    ({"guidance": 2.0}, "no dial 'guidance'; the nearest is 'guidance_"),
    ({"guidance_from": "tuned"}, "not inverted by null_text"),
    ({"mask": np.ones((32, 32))}, r"mask is float64 \(32, 32\): give True and False"),
    ({"mask": "automatic"}, "mask is 'automatic'; it must be 'none', 'auto', or an array"),
    ({"keep": np.ones((2, 64, 64))}, r"keep is float64 \(2, 64, 64\)"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_what_is_wrong_is_said_in_one_line(calm, films, inversion, change, words):
    given = {"rows": range(3), "targets": OTHER} | change
    with pytest.raises(ValueError, match=words) as error:
        edit(calm, inversion, films, **given)
    assert "\n" not in str(error.value)


def test_films_and_inversions_that_do_not_fit_are_refused(model, films):
    inversion, unit = inverted(model, films, num_steps=2), films.astype(np.float32) / 255
    spoilt = unit.copy()
    spoilt[1, 3, 3] = np.nan
    for given, words in [
        (films[:, :32, :32], "films are .*3, 32, 32.* 3 grey films of 64 x 64"),
        (np.repeat(films[..., None], 3, -1), "3 grey films of 64 x 64"),
        (films[:2], "3 grey films of 64 x 64"),
        (unit * 255, r"film . is not in \[0, 1\]"),
        (spoilt, r"film b is not in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            edit(model, inversion, given, range(3), OTHER)
    inversion.trajectory[-1, 2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="an edit of film c is not finite"):
        edit(model, inversion, films, range(3), OTHER)
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match="is of another model"):
        edit(model, inversion, films, range(3), OTHER)
