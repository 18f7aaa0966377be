"""Base models: loading, ranges, the DDIM step against diffusers' own schedulers."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from prism_nb.diffusion import (
    SCHEDULER,
    ModelError,
    alpha_at,
    ddim_step,
    decode_latents,
    embed_captions,
    encode_films,
    load_model,
    save_unet,
    timesteps,
)
from prism_nb.inversion import ddim_sample


def noise(seed, shape=(2, 8, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_steps", [4, 10, 50])
def test_ddim_step_down_equals_diffusers(model, num_steps):
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(num_steps)
    rising = timesteps(model, num_steps).tolist()
    assert scheduler.timesteps.tolist() == rising[::-1]
    for t, below in zip(rising, [-1, *rising[:-1]], strict=True):
        z, eps = noise(t), noise(t + 1)
        ours = ddim_step(z, eps, alpha_at(model, t), alpha_at(model, below))
        torch.testing.assert_close(ours, scheduler.step(eps, t, z).prev_sample)


@pytest.mark.parametrize("num_steps", [4, 10, 50])
def test_ddim_step_up_equals_diffusers(model, num_steps):
    inverse = DDIMInverseScheduler.from_config(DDIMScheduler(**SCHEDULER).config)
    inverse.set_timesteps(num_steps)
    rising = timesteps(model, num_steps).tolist()
    for t, below in list(zip(rising, [-1, *rising[:-1]], strict=True))[1:]:
        z, eps = noise(t), noise(t + 1)
        ours = ddim_step(z, eps, alpha_at(model, below), alpha_at(model, t))
        torch.testing.assert_close(ours, inverse.step(eps, t, z).prev_sample)


def test_guided_sampling_equals_the_pipelines(random_base, model):
    pipe = StableDiffusionPipeline.from_pretrained(random_base, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    z, caption = noise(0, (1, 8, 8, 8)), "chest x-ray showing edema"
    theirs = pipe(
        caption, num_inference_steps=5, guidance_scale=3.0, latents=z, output_type="latent"
    ).images
    cond, empty = embed_captions(model, [caption]), embed_captions(model, [""])
    ours = ddim_sample(model, z, cond, 5, 3.0, empty)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_films_and_latents_keep_their_ranges(model):
    films = np.random.default_rng(0).random((3, 64, 64), np.float32)
    z0 = encode_films(model, films)
    assert z0.shape == (3, 8, 8, 8)
    back = decode_latents(model, z0)
    assert back.shape == (3, 64, 64)
    assert back.min() >= 0
    assert back.max() <= 1
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        encode_films(model, films * 255)


def test_the_vaes_own_scale_is_used(model):
    films = np.full((1, 64, 64), 0.5, np.float32)
    plain = encode_films(model, films)
    model.vae.register_to_config(scaling_factor=2 * model.vae.config.scaling_factor)
    torch.testing.assert_close(encode_films(model, films), 2 * plain)


def test_a_fine_tuned_unet_is_found_through_its_pointer(random_base, model, tmp_path):
    with torch.no_grad():
        next(model.unet.parameters()).add_(1.0)
    save_unet(model, tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    assert again.base_model == str(random_base)
    for a, b in zip(model.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_accelerate_state_loads_as_unet_weights(random_base, model, tmp_path):
    state = {f"module.{k}": v + 1 for k, v in model.unet.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = load_model(str(random_base), unet_weights=str(tmp_path / "model.safetensors"))
    key = next(iter(model.unet.state_dict()))
    assert torch.equal(again.unet.state_dict()[key], state[f"module.{key}"])


@pytest.fixture
def copy(random_base, tmp_path):
    return shutil.copytree(random_base, tmp_path / "copy")


def test_a_missing_part_is_named(copy):
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="has no text_encoder/"):
        load_model(str(copy))


def test_a_corrupt_part_is_named(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot load vae"):
        load_model(str(copy))


def test_unet_weights_of_another_architecture_are_refused(random_base, tmp_path):
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="another architecture"):
        load_model(str(random_base), unet_weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(str(random_base), unet_weights=str(tmp_path / "half.safetensors"))
    with pytest.raises(ModelError, match="need a diffusers folder or"):
        load_model(str(random_base), unet_weights=str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "nobody/no-such-model"])
def test_an_unknown_base_model_is_one_line(name):
    with pytest.raises(ModelError) as error:
        load_model(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_the_bundled_base_is_a_stable_diffusion_pipeline():
    from prism_nb.diffusion import PHANTOM_BASE

    pipe = StableDiffusionPipeline.from_pretrained(PHANTOM_BASE, use_safetensors=True)
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    sizes = [path.stat().st_size for path in PHANTOM_BASE.rglob("*") if path.is_file()]
    assert max(sizes) < 16 * 2**20
    assert not [p for p in PHANTOM_BASE.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_text_encoder_is_clips_text_half(random_base):
    encoder = load_file(random_base / "text_encoder" / "model.safetensors")
    clip = load_file(random_base / "clip" / "model.safetensors")
    name = "text_model.final_layer_norm.weight"
    own = next(v for k, v in encoder.items() if k.endswith("final_layer_norm.weight"))
    assert torch.equal(own, clip[name])
