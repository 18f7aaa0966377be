"""Base models: loading, ranges, the DDIM step against diffusers' own schedulers."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from prism_nb.diffusion import (
    PHANTOM_BASE,
    SCHEDULER,
    ModelError,
    alpha_at,
    cut_words,
    ddim_step,
    decode_latents,
    embed_captions,
    encode_films,
    load_model,
    pick_dtype,
    posterior,
    predict_noise,
    save_unet,
    strip_paths,
    timesteps,
    weights_hash,
)
from prism_nb.files import read_json, write_json
from prism_nb.regeneration import ddim_sample


def noise(seed, shape=(2, 8, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_shape(model):
    return model.vae.config.latent_channels, 8, 8


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
    z, caption = noise(0, (1, *latent_shape(model))), "chest x-ray showing edema"
    theirs = pipe(
        caption, num_inference_steps=5, guidance_scale=3.0, latents=z, output_type="latent"
    ).images
    cond, empty = embed_captions(model, [caption]), embed_captions(model, [""])
    ours = ddim_sample(model, z, cond, 5, 3.0, empty)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_films_and_latents_keep_their_ranges(model):
    films = np.random.default_rng(0).random((3, 64, 64), np.float32)
    z0 = encode_films(model, films)
    assert z0.shape == (3, *latent_shape(model))
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


def refused(copy, **options):
    """The one line with which a folder is refused."""
    with pytest.raises(ModelError) as error:
        load_model(str(copy), device="cpu", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    assert f"has no {part}/: it needs vae, unet" in refused(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_that_is_not_whole_is_named(copy, part):
    weights = next((copy / part).glob("*.safetensors"))
    whole, config = weights.read_bytes(), (copy / part / "config.json").read_text()
    for bad in (b"", b"nothing", whole[:-100], whole[: len(whole) // 2]):
        weights.write_bytes(bad)
        assert f"cannot load {part} of base model" in refused(copy)
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin, a pickle, which can run code; only .safetensors" in refused(copy)
    (copy / part / "pytorch_model.bin").unlink()
    assert f"{part} has a config.json but no .safetensors: copy" in refused(copy)
    weights.write_bytes(whole)
    for bad in (config[:40], "[1]"):
        (copy / part / "config.json").write_text(bad)
        assert f"{part}/config.json" in refused(copy)
    (copy / part / "config.json").unlink()
    assert f"{part} has no config.json" in refused(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(copy, part):
    weights = next((copy / part).glob("*.safetensors"))
    state = load_file(weights)
    name = sorted(state)[0]
    short = {key: value.clone() for key, value in state.items() if key != name}
    save_file(short, weights, metadata={"format": "pt"})
    assert f"do not fit its config.json, 1 missing, 0 unknown (first: {name})" in refused(copy)
    save_file(short | {name: torch.zeros(2)}, weights, metadata={"format": "pt"})
    assert f"cannot load {part} of base model" in refused(copy)


def test_a_tokenizer_without_its_words_is_named(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "has no tokenizer.json, nor vocab.json" in refused(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 500),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_a_base_of_another_noise_schedule_is_refused(copy, key, value):
    path = copy / "scheduler" / "scheduler_config.json"
    write_json(path, read_json(path) | {key: value})
    assert f"its scheduler's {key} is {value}" in refused(copy)
    shutil.rmtree(copy / "scheduler")
    load_model(str(copy), device="cpu")


def test_parts_of_different_models_are_refused(copy):
    small = {"block_out_channels": (8, 16), "norm_num_groups": 8, "layers_per_block": 1}
    AutoencoderKL(
        **small,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(copy / "vae")
    assert "in_channels of unet is" in refused(copy)
    UNet2DConditionModel(
        **small,
        in_channels=3,
        out_channels=3,
        cross_attention_dim=24,
        attention_head_dim=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(copy / "unet")
    line = refused(copy)
    assert "cross_attention_dim of unet is 24, hidden_size is 128: not one model" in line


def test_a_tokenizer_of_another_text_encoder_is_refused(copy):
    path = copy / "tokenizer" / "tokenizer_config.json"
    write_json(path, read_json(path) | {"model_max_length": 300})
    assert "model_max_length of tokenizer is 300, max_position_embeddings" in refused(copy)


def test_unet_weights_of_another_architecture_are_refused(random_base, tmp_path):
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    given = {"unet_weights": str(tmp_path / "other.safetensors")}
    assert "another architecture" in refused(random_base, **given)
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    given = {"unet_weights": str(tmp_path / "half.safetensors")}
    assert "not a whole safetensors file" in refused(random_base, **given)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x10")
    for name in ("absent", "pytorch_model.bin", "."):
        given = {"unet_weights": str(tmp_path / name)}
        assert "need a diffusers folder or" in refused(random_base, **given)


def test_unet_weights_with_other_heads_are_refused(random_base, copy):
    path = copy / "unet" / "config.json"
    load_model(str(random_base), unet_weights=str(copy / "unet"), device="cpu")
    write_json(path, read_json(path) | {"attention_head_dim": [1, 1, 1]})
    line = refused(random_base, unet_weights=str(copy / "unet"))
    assert "attention_head_dim is [1, 1, 1], the base model's is [" in line


def test_a_broken_pointer_is_one_line(model, tmp_path):
    save_unet(model, tmp_path)
    for text in ('{"base_model": ', "{}", "[]"):
        (tmp_path / "base.json").write_text(text)
        assert "base.json" in refused(tmp_path)
    (tmp_path / "base.json").unlink()  # as a killed save_unet leaves it
    assert "has no unet/" not in refused(tmp_path)
    assert "base.json beside a fine-tuned unet" in refused(tmp_path)


def test_no_path_of_this_machine_is_saved(tmp_path):
    again = load_model(str(PHANTOM_BASE), device="cpu")
    save_unet(again, tmp_path, text_encoder=True)
    assert read_json(tmp_path / "base.json") == {"base_model": "phantom", "revision": ""}
    for path in tmp_path.rglob("*.json"):
        assert "name_or_path" not in path.read_text()
        assert str(PHANTOM_BASE.parent) not in path.read_text()


def test_paths_are_stripped_and_all_else_stays(copy):
    path = copy / "vae" / "config.json"
    before, tokens = read_json(path), (copy / "tokenizer" / "tokenizer.json").read_bytes()
    path.write_text(json.dumps(before | {"_name_or_path": "/some/folder/vae"}))
    strip_paths(copy)
    assert read_json(path) == before
    assert (copy / "tokenizer" / "tokenizer.json").read_bytes() == tokens


def test_a_trained_text_encoder_is_kept_and_handed_on(random_base, model, tmp_path):
    save_unet(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "text_encoder").exists()
    with torch.no_grad():
        next(model.text_encoder.parameters()).add_(1.0)
    save_unet(model, tmp_path / "both", text_encoder=True)
    both = load_model(str(tmp_path / "both"), device="cpu")
    assert weights_hash(both.text_encoder) == weights_hash(model.text_encoder)
    save_unet(both, tmp_path / "next")
    after = load_model(str(tmp_path / "next"), device="cpu")
    assert weights_hash(after.text_encoder) == weights_hash(model.text_encoder)
    assert after.base_model == str(random_base)
    save_unet(load_model(str(random_base), device="cpu"), tmp_path / "both")
    assert not (tmp_path / "both" / "text_encoder").exists()


def test_a_base_model_is_not_saved_over(model, copy):
    with pytest.raises(ModelError, match="save the fine-tuned U-Net in another folder"):
        save_unet(model, copy)


def test_half_weights_are_loaded_as_float32(copy, model):
    for part in ("unet", "vae", "text_encoder"):
        weights = next((copy / part).glob("*.safetensors"))
        half = {key: value.half() for key, value in load_file(weights).items()}
        save_file(half, weights, metadata={"format": "pt"})
    again = load_model(str(copy), device="cpu")
    for part in (again.unet, again.vae, again.text_encoder):
        assert {value.dtype for value in part.parameters()} == {torch.float32}
    assert again.dtype == torch.float32


def test_results_are_float32_whatever_the_weights_are_held_in(model):
    films, z = np.full((2, 64, 64), 0.25, np.float32), noise(0, (2, *latent_shape(model)))
    whole = encode_films(model, films), embed_captions(model, ["chest x-ray", "edema"])
    eps, film = predict_noise(model, z, 500, whole[1]), decode_latents(model, whole[0])
    for part in (model.vae, model.text_encoder, model.unet):
        part.to(torch.bfloat16)
    half = encode_films(model, films), embed_captions(model, ["chest x-ray", "edema"])
    half_eps, half_film = predict_noise(model, z, 500, whole[1]), decode_latents(model, whole[0])
    pairs = [(whole[0], half[0]), (whole[1], half[1]), (eps, half_eps), (film, half_film)]
    for one, other in pairs:
        assert other.dtype == torch.float32
        assert 0 < (one - other).norm() / one.norm() < 0.05
    assert {part.dtype for part in posterior(model, films)} == {torch.float32}
    assert model.alphas.dtype == torch.float32
    assert model.alphas is model.alphas


def test_precision_follows_the_device():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ModelError, match="must be fp32, bf16 or auto"):
        pick_dtype("fp16", torch.device("cpu"))


def test_words_beyond_the_last_token_are_named(model, caplog):
    limit = model.tokenizer.model_max_length
    fits = "edema " * (limit - 2)
    assert cut_words(model, fits) == []
    assert cut_words(model, "") == []
    assert cut_words(model, fits + "Pleural effusion") == ["Pleural", "effusion"]
    split = fits.removesuffix("edema ") + "zygomatically seen"  # one word of several tokens
    assert cut_words(model, split) == ["zygomatically", "seen"]
    with caplog.at_level(logging.WARNING, "prism_nb.diffusion"):
        embed_captions(model, ["edema", fits])
        assert not caplog.records
        embed_captions(model, ["edema", fits + "Pleural effusion", fits + "fracture"])
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 captions have more than {limit} tokens; from the first is cut: Pleural effusion"
    ]


def test_captions_are_embedded_alike_alone_and_in_batches(model):
    captions = ["chest x-ray showing edema", "", "no finding"]
    together = embed_captions(model, captions, batch_size=2)
    for row, text in enumerate(captions):
        torch.testing.assert_close(together[row : row + 1], embed_captions(model, text))
    with pytest.raises(ValueError, match="at least one"):
        embed_captions(model, [])


def test_the_hash_of_weights_sees_every_value(model):
    before = weights_hash(model.vae)
    assert before == weights_hash(model.vae)
    with torch.no_grad():
        next(model.vae.parameters())[0, 0, 0, 0] += 1e-3
    assert weights_hash(model.vae) != before


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "nobody/no-such-model"])
def test_an_unknown_base_model_is_one_line(name):
    with pytest.raises(ModelError) as error:
        load_model(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert ("not in the local cache" in str(error.value)) == (name == "nobody/no-such-model")


def test_the_bundled_base_is_a_stable_diffusion_pipeline():
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
