"""Inversion and editing: exact where theory says so, bounded on the bundled base."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from safetensors.torch import save_file

from prism_nb.cohort import choose_films
from prism_nb.diffusion import (
    SCHEDULER,
    alpha_at,
    embed_captions,
    encode_films,
    load_model,
    predict_noise,
)
from prism_nb.editing import edit
from prism_nb.edits import (
    Edit,
    plan_edits,
    truths,
)
from prism_nb.images import load_films, uint8_to_unit
from prism_nb.inversion import (
    METHODS,
    _tune,
    concat,
    ddim_invert,
    invert,
    levels,
    load_inversion,
)
from prism_nb.regeneration import ddim_sample, generate_films, regenerate, walk_down
from prism_nb.scoring import load_clip

CAPTIONS = ["chest x-ray", "chest x-ray showing edema", "chest x-ray showing pleural effusion"]
EXACT = ["direct", "ddpm", "bdia"]
QUICK = {"null_text": {"num_inner": 2}}  # dials where the default takes long


class FixedNoise(torch.nn.Module):
    """A U-Net whose noise depends on the timestep only: DDIM inversion of it is exact."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, z, t, encoder_hidden_states):
        generator = torch.Generator().manual_seed(int(t))
        noise = torch.randn(z.shape[1:], generator=generator)
        return SimpleNamespace(sample=noise.expand_as(z))


class CaptionNoise(FixedNoise):
    """A U-Net whose noise depends on timestep and caption: only guidance leads astray."""

    def forward(self, z, t, encoder_hidden_states):
        size = encoder_hidden_states.shape[-1]
        direction = torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5
        caption = (encoder_hidden_states @ direction).mean(1) + self.weight  # (B,)
        noise = super().forward(z, t, None).sample
        return SimpleNamespace(sample=noise + caption[:, None, None, None])


def latents(model, num_films=3, seed=0):
    """Random latents of the model's own shape."""
    shape = (num_films, model.unet.config.in_channels, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inverted(model, method="direct", num_steps=6, z0=None, **dials):
    """Three films a, b, c under CAPTIONS."""
    z0 = latents(model) if z0 is None else z0
    ids, dials = ["a", "b", "c"][: len(z0)], QUICK.get(method, {}) | dials
    return invert(model, z0, ids, CAPTIONS[: len(z0)], method, num_steps, **dials)


def error(model, inversion, **dials):
    """Largest difference between the films and what T' = T re-generates."""
    again = regenerate(model, inversion, embed_captions(model, inversion.captions), **dials)
    return float((again - inversion.trajectory[0]).abs().max())


@pytest.fixture
def calm(model):
    """The random model with a weaker last layer: noise that changes slowly, as a trained one's."""
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(0.1)
    return model


def test_inversion_is_exact_when_the_noise_does_not_depend_on_the_latent(model):
    z0 = latents(model)
    model.unet = FixedNoise()
    cond = embed_captions(model, CAPTIONS)
    trajectory = ddim_invert(model, z0, cond, 12)
    assert trajectory.shape == (13, *z0.shape)
    assert torch.equal(trajectory[0], z0)
    back = ddim_sample(model, trajectory[-1], cond, 12)
    torch.testing.assert_close(back, z0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [4, 10])
def test_both_ways_equal_diffusers_at_every_step(model, num_steps):
    z0, cond = latents(model), embed_captions(model, CAPTIONS)
    trajectory = ddim_invert(model, z0, cond, num_steps)
    down = DDIMScheduler(**SCHEDULER)
    up = DDIMInverseScheduler.from_config(down.config)
    up.set_timesteps(num_steps)
    down.set_timesteps(num_steps)
    with torch.no_grad():
        z = z0
        for level, t in enumerate(up.timesteps):
            z = up.step(model.unet(z, t, cond).sample, t, z).prev_sample
            torch.testing.assert_close(trajectory[level + 1], z, rtol=1e-4, atol=1e-4)
        for t in down.timesteps:
            z = down.step(model.unet(z, t, cond).sample, t, z).prev_sample
    plain = regenerate(model, inverted(model, "ddim", num_steps), cond)
    torch.testing.assert_close(plain, z, rtol=1e-3, atol=1e-3)
    back = ddim_sample(model, trajectory[-1], cond, num_steps)
    torch.testing.assert_close(back, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddpm_steps_are_diffusers_with_the_extracted_noise(model, eta):
    inversion, cond = inverted(model, "ddpm", 4, eta=eta), embed_captions(model, CAPTIONS)
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(4)
    for k, t in zip((3, 2, 1, 0), scheduler.timesteps, strict=True):
        z = inversion.trajectory[k + 1]
        with torch.no_grad():
            eps = model.unet(z, t, cond).sample
        sigma = eta * scheduler._get_variance(t, t - 250) ** 0.5
        step = scheduler.step(eps, t, z, eta, variance_noise=inversion.offsets[k] / sigma)
        torch.testing.assert_close(step.prev_sample, inversion.trajectory[k], rtol=0, atol=1e-4)


def test_no_step_is_skipped(model):
    assert levels(model, 5) == [-1, 1, 201, 401, 601, 801]
    assert alpha_at(model, -1) == model.scheduler.final_alpha_cumprod


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("method", EXACT)
def test_the_same_caption_returns_the_film(calm, method, guidance_scale):
    inversion = inverted(calm, method, 10, guidance_scale=guidance_scale)
    assert inversion.guidance_from == ("source" if guidance_scale == 1 else "empty")
    assert error(calm, inversion, guidance_scale=guidance_scale) < 1e-4
    if guidance_scale == 1:  # from the film's own caption any weight returns it
        assert error(calm, inversion, guidance_scale=7.5) < 1e-3


@pytest.mark.parametrize("method", EXACT)
def test_weight_zero_is_no_edit(calm, method):
    inversion, cond = inverted(calm, method), embed_captions(calm, CAPTIONS[::-1])
    still = regenerate(calm, inversion, cond, guidance_scale=0.0)
    torch.testing.assert_close(still, inversion.trajectory[0], rtol=0, atol=1e-4)


def test_ddim_alone_does_not_return_the_film(model):
    assert error(model, inverted(model, "ddim", 10)) > 0.1


def test_more_inner_iterations_bring_the_film_closer(model):
    errors = [
        error(model, inverted(model, "fixed_point", 10, num_inner=num_inner))
        for num_inner in (0, 1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
    plain = inverted(model, "ddim", 10)
    assert torch.equal(inverted(model, "fixed_point", 10, num_inner=0).noise, plain.noise)


def test_negative_prompt_starts_guidance_from_the_films_caption(calm):
    plain, other = inverted(calm, "ddim"), inverted(calm, "negative_prompt")
    cond, own = embed_captions(calm, CAPTIONS[::-1]), embed_captions(calm, CAPTIONS)
    expected = ddim_sample(calm, plain.noise, cond, 6, 3.0, own)
    torch.testing.assert_close(regenerate(calm, other, cond, guidance_scale=3.0), expected)


def test_published_direct_leaves_the_edits_without_offsets(calm):
    cond = embed_captions(calm, CAPTIONS[::-1])
    published = regenerate(calm, inverted(calm), cond, offsets="source")
    torch.testing.assert_close(published, regenerate(calm, inverted(calm, "ddim"), cond))
    with pytest.raises(ValueError, match="where eta is 0"):
        regenerate(calm, inverted(calm, "ddpm"), cond, offsets="source")


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_bdia_solves_each_step_for_either_end(model, gamma):
    assert error(model, inverted(model, "bdia", 12, gamma=gamma)) < 1e-4


def test_bdia_that_diverges_is_refused(model):
    with pytest.raises(ValueError, match="bdia diverged on film a"):
        inverted(model, "bdia", 60, gamma=0.5)


def test_null_text_returns_the_film_under_guidance(model):
    z0 = latents(model)
    model.unet = CaptionNoise()
    tuned = inverted(model, "null_text", 10, z0, guidance_scale=3.0, num_inner=10)
    plain = error(model, inverted(model, "ddim", 10, z0), guidance_scale=3.0)
    assert error(model, tuned, guidance_scale=3.0) < 0.05 * plain
    assert tuned.inner_steps.shape == (10, 3)
    assert 1 <= tuned.inner_steps.min() < tuned.inner_steps.max() <= 10
    assert model.unet.weight.grad is None


def test_a_film_that_has_stopped_changes_no_more():
    aim = torch.tensor([0.001, 1.0, 0.05])[:, None, None]  # how far each film is from its target

    def tune(rows):
        def step(active, uncond):
            return uncond

        target = aim[rows].expand(-1, 2, 2)
        return _tune(step, torch.zeros((len(rows), 2, 2)), target, 1e-2, 10, 1e-4)

    together, ran = tune([0, 1, 2])
    assert ran[0] == 1
    assert 1 < ran[2] < ran[1] == 10
    for row in range(3):
        alone, steps = tune([row])
        assert steps[0] == ran[row]
        torch.testing.assert_close(together[row], alone[0])


def test_guidance_one_is_the_caption_alone(model):
    z, cond = latents(model), embed_captions(model, CAPTIONS)
    alone = ddim_sample(model, z, cond, 3)
    other = ddim_sample(model, z, cond, 3, 1.0, embed_captions(model, [""]))
    assert torch.equal(alone, other)
    with pytest.raises(ValueError, match="needs the embedding of the empty caption"):
        ddim_sample(model, z, cond, 3, 2.0)
    inversion = inverted(model, "ddim")
    edits = [regenerate(model, inversion, cond, guidance_from=w) for w in ("empty", "source")]
    assert torch.equal(*edits)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_batch_and_order_do_not_matter(calm, method):
    rows, weights = [2, 0, 2, 1], torch.tensor([1.0, 2.0, 3.0, 0.5])
    whole, cond = inverted(calm, method, 3), embed_captions(calm, [*CAPTIONS, ""])
    edits = regenerate(calm, whole, cond, rows, guidance_scale=weights)
    for i, row in enumerate(rows):
        z0 = latents(calm)[row : row + 1]
        film, dials = whole.film_ids[row], QUICK.get(method, {})
        alone = invert(calm, z0, [film], [CAPTIONS[row]], method, 3, **dials)
        torch.testing.assert_close(
            alone.trajectory[:, 0], whole.trajectory[:, row], rtol=1e-4, atol=1e-4
        )
        edit = regenerate(calm, alone, cond[i : i + 1], guidance_scale=float(weights[i]))
        torch.testing.assert_close(edit[0], edits[i], rtol=1e-3, atol=1e-3)


def test_the_noise_of_ddpm_belongs_to_film_and_seed(model):
    one, other = inverted(model, "ddpm", seed=1), inverted(model, "ddpm", seed=2)
    still = [inverted(model, "direct", seed=seed).trajectory for seed in (1, 2)]
    assert torch.equal(*still), "no noise, so no seed"
    assert not torch.equal(one.noise, other.noise)
    alphas = model.alphas[levels(model, 6)[1:]][:, None, None, None, None]
    noise = (one.trajectory[1:] - alphas.sqrt() * one.trajectory[0]) / (1 - alphas).sqrt()
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert abs(torch.corrcoef(noise.flatten(1)).triu(1)).max() < 0.1  # a level knows no other


@pytest.mark.parametrize("method", [*EXACT, "null_text"])
def test_latents_stay_float32_where_the_unet_is_bf16(calm, method):
    calm.dtype = torch.bfloat16
    inversion = inverted(calm, method, 3)
    assert {x.dtype for x in (inversion.trajectory, inversion.noise)} == {torch.float32}
    again = regenerate(calm, inversion, embed_captions(calm, CAPTIONS))
    assert again.dtype == torch.float32
    if method in EXACT:
        assert (again - inversion.trajectory[0]).abs().max() < 0.1


def test_several_targets_push_at_once(calm):
    inversion, cond = inverted(calm), embed_captions(calm, CAPTIONS)
    both = torch.stack([cond.flip(0), cond.roll(1, 0)])  # (J, R, L, D)
    only = regenerate(calm, inversion, both[0], guidance_scale=2.0)
    silent = regenerate(calm, inversion, both, guidance_scale=torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(silent, only, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(regenerate(calm, inversion, both, guidance_scale=2.0), only)


def test_strength_walks_a_share_of_the_steps(model):
    inversion, cond = inverted(model, "ddpm", 10), embed_captions(model, CAPTIONS[::-1])
    assert torch.equal(regenerate(model, inversion, cond, strength=0), inversion.trajectory[0])
    steps = list(walk_down(model, inversion, cond, strength=0.4))
    assert [step.level for step in steps] == [4, 3, 2, 1, 0]
    assert torch.equal(steps[0].z, inversion.trajectory[4])


def test_a_walk_can_be_steered_and_shows_its_source(calm):
    inversion, rows, calls = inverted(calm), [1, 1, 0, 1], []
    cond = embed_captions(calm, [*CAPTIONS, ""])

    def predict(model, z, t, cond):
        calls.append((z, cond))
        return predict_noise(model, z, t, cond)

    dials = {"guidance_scale": 2.0, "with_source": True, "predict": predict}
    for step in walk_down(calm, inversion, cond, rows, **dials):
        assert torch.equal(step.source, inversion.trajectory[step.level][rows])
        step.z = step.source  # a mask that holds everything
    assert torch.equal(step.z, inversion.trajectory[0][rows])
    assert len(calls) == 6
    z, texts = calls[2]  # the base of 4 edits, their 2 films in order, the 4 targets
    assert len(z) == len(texts) == 10
    assert torch.equal(z[4:6], inversion.trajectory[4][:2])
    assert torch.equal(texts[4:6], embed_captions(calm, CAPTIONS[:2]))
    assert torch.equal(texts[6:], cond)
    plain = regenerate(calm, inversion, cond, rows, guidance_scale=2.0)
    seen = regenerate(calm, inversion, cond, rows, **dials)
    torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_inversion_from_disk_gives_the_same_edit_bit_for_bit(model, method, tmp_path):
    inversion, cond = inverted(model, method, 3), embed_captions(model, CAPTIONS[::-1])
    inversion.save(tmp_path)
    again = load_inversion(tmp_path)
    assert again.film_ids == ["a", "b", "c"]
    assert (again.captions, again.num_steps, again.method) == (CAPTIONS, 3, method)
    edits = [regenerate(model, i, cond, guidance_scale=2.0) for i in (inversion, again)]
    assert torch.equal(*edits)


def test_a_damaged_inversion_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="run 03_invert again"):
        load_inversion(tmp_path)
    (tmp_path / "inversion.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="run 03_invert again"):
        load_inversion(tmp_path)
    save_file({"trajectory": torch.zeros(1)}, tmp_path / "inversion.safetensors")
    with pytest.raises(ValueError, match="run 03_invert again"):
        load_inversion(tmp_path)


@pytest.mark.parametrize("method", ["null_text", "ddpm"])
def test_parts_and_selections_fit_together(model, method):
    whole = inverted(model, method, 3)
    parts = concat([whole.select([0]), whole.select([1, 2])])
    again = parts.select([2, 0, 1]).select([1, 2, 0])
    assert (again.film_ids, again.captions) == (whole.film_ids, whole.captions)
    for name in ("trajectory", "offsets", "uncond", "inner_steps"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(again, name), getattr(whole, name))
    for other in (inverted(model, "ddim", 3), inverted(model, method, 4)):
        with pytest.raises(ValueError, match="of one method"):
            concat([whole, other])
    with pytest.raises(ValueError, match="0 inversions"):
        concat([])


def test_an_inversion_of_another_model_or_caption_is_refused(model, random_base):
    inversion, cond = inverted(model), embed_captions(model, CAPTIONS)
    inversion.check(load_model(str(random_base), device="cpu"), CAPTIONS)
    with pytest.raises(ValueError, match="inverted as 'chest x-ray'"):
        inversion.check(model, CAPTIONS[::-1])
    with torch.no_grad():
        next(model.unet.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="of another model") as refused:
        regenerate(model, inversion, cond)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ddmp"}, "nearest is 'ddpm'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 1000}, "from 1 to 999"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"method": "ddim", "guidance_scale": 2.0}, "ddim has no dial 'guidance_scale'"),
        ({"method": "bdia", "gamma": 0.1}, "gamma is 0.1"),
        ({"z0": torch.zeros((0, 8, 8, 8))}, "0 latents"),
    ],
)
def test_impossible_inversions_are_one_line(model, given, message):
    with pytest.raises(ValueError, match=message) as refused:
        inverted(model, **given)
    assert "\n" not in str(refused.value)


def test_latents_that_are_not_finite_name_their_film(model):
    z0 = latents(model)
    z0[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="film b is not finite"):
        inverted(model, z0=z0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": [0, 1, 3]}, "rows hold 3"),
        ({"rows": [-1, 0, 1]}, "rows hold -1"),
        ({"rows": []}, "rows hold none"),
        ({"rows": [0]}, "for each of 1 rows"),
        ({"guidance_scale": 99}, "from -50 to 50"),
        ({"guidance_scale": float("nan")}, "from -50 to 50"),
        ({"guidance_from": "tuned"}, "not inverted by null_text"),
        ({"guidance_from": "target"}, "must be one of empty"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"offsets": "none"}, "take 'both'"),
    ],
)
def test_impossible_edits_are_one_line(model, given, message):
    with pytest.raises(ValueError, match=message) as refused:
        regenerate(model, inverted(model, num_steps=2), embed_captions(model, CAPTIONS), **given)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(60, 256)


@pytest.fixture(scope="module")
def bundled():
    return load_model("phantom", device="cpu")


def test_generation_begins_with_the_mean_film_noised_as_diffusers_noises(model, monkeypatch):
    begun, mean = [], torch.randn(16, 8, 8)

    def begin(model, z, *_):
        begun.append(z)
        return z

    monkeypatch.setattr("prism_nb.regeneration.ddim_sample", begin)
    films = generate_films(model, ["a", "b", "c"], mean, num_steps=4, seed=3, batch_size=2)
    assert films.shape[0] == 3
    noise = torch.randn((3, *mean.shape), generator=torch.Generator().manual_seed(3))
    top = torch.tensor([levels(model, 4)[-1]])
    expected = DDIMScheduler.from_config(model.scheduler.config).add_noise(mean, noise, top)
    torch.testing.assert_close(torch.cat(begun), expected)


def test_films_generated_by_the_bundled_base_have_the_black_corners_of_films(bundled, cohort):
    paths = [cohort.image_root / path for path in cohort.table["path"][:24]]
    mean = encode_films(bundled, uint8_to_unit(load_films(paths, 256))).mean(0)
    captions = list(cohort.table["caption"][:4])
    for start, black in ((mean, True), (torch.zeros_like(mean), False)):
        films = generate_films(bundled, captions, start, num_steps=6)
        assert (films[:, :24, :24].mean() < 0.06) == black


def test_null_text_comes_nearer_with_each_inner_step_and_direct_is_there(bundled, cohort):
    row = cohort.table.iloc[0]
    film = uint8_to_unit(load_films([cohort.image_root / row["path"]], 256))
    z0, cond = encode_films(bundled, film), embed_captions(bundled, [row["caption"]])

    def rms(method, **dials):
        how = {"num_steps": 5} | dials
        found = invert(bundled, z0, ["a"], [row["caption"]], method, **how)
        again = regenerate(bundled, found, cond, guidance_scale=7.5, guidance_from=start[method])
        return float((again - z0).square().mean().sqrt())

    start = {"ddim": "empty", "direct": "empty", "null_text": "tuned"}
    errors = [rms("null_text", num_inner=count) for count in (0, 2, 10)]
    assert errors[0] == pytest.approx(rms("ddim"), rel=1e-4)  # not tuned, it is DDIM
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.8 * errors[0]  # measured: .33, .30, .22
    assert rms("direct", guidance_scale=7.5) < 1e-4  # 2e-5


def test_the_bundled_base_inverts_edits_and_scores(bundled, cohort):
    chosen = cohort.table[cohort.table["Cardiomegaly"] == 1].head(6).reset_index(drop=True)
    films = uint8_to_unit(load_films([cohort.image_root / p for p in chosen["path"]], 256))
    z0, cond = encode_films(bundled, films), embed_captions(bundled, list(chosen["caption"]))
    trajectory = ddim_invert(bundled, z0, cond, 10)
    back = ddim_sample(bundled, trajectory[-1], cond, 10)
    assert (back - z0).abs().mean() < 0.35 * z0.abs().mean()
    plan = plan_edits(chosen, [Edit("Cardiomegaly", False)])
    inversion = invert(bundled, z0, chosen["film_id"], list(chosen["caption"]), num_steps=10)
    edited = edit(bundled, inversion, films, plan["row"], plan["target"]).films
    truth, mask = truths(cohort, plan)
    factual = films[plan["row"]]
    wanted, made = truth - factual, edited - factual
    effectiveness = (wanted * made).sum(axis=(1, 2)) / (wanted**2).sum(axis=(1, 2))
    assert effectiveness.mean() > 0.3, "a third of the true change, at least, must be made"
    own_vae = abs(edited - truth)[~mask].mean()
    assert own_vae < 0.02
    scorer = load_clip("base", "phantom", bundled.device)
    score = scorer.s_clip(factual, edited, list(plan["source"]), list(plan["target"]))
    back = scorer.s_clip(edited, factual, list(plan["target"]), list(plan["source"]))
    np.testing.assert_allclose(score, back, atol=1e-5)
    assert (abs(score) <= 1).all()
    still = scorer.s_clip(factual, factual, list(plan["source"]), list(plan["target"]))
    np.testing.assert_allclose(still, 0, atol=1e-5)


def test_chosen_films_take_captions_in_turn(cohort):
    chosen = choose_films(cohort.table, {"test": 5, "train": 3}, seed=0)
    assert chosen["split"].tolist() == ["test"] * 5 + ["train"] * 3
    again = choose_films(cohort.table.sample(frac=1, random_state=1), {"test": 5, "train": 3}, 0)
    assert set(chosen["film_id"]) == set(again["film_id"])
    kinds = cohort.table.loc[cohort.table["split"] == "test", "caption"].nunique()
    assert chosen.loc[:4, "caption"].nunique() == min(5, kinds)
