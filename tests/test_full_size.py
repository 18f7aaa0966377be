"""Stable Diffusion v1.5 at its true size: its settings and file layout, with random weights.

What real weights need is proved without them: the folder as published (bf16, the names that its
tensors have there) loads, encodes a film of 512 px, predicts noise, is trained, within memory.
"""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from prism_nb.counting import TEXT, UNET, VAE
from prism_nb.diffusion import (
    ModelError,
    embed_captions,
    encode_films,
    load_model,
    predict_noise,
)

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
START, END = 49406, 49407  # the ids of the special tokens
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def random_state(module, noise):
    """A plausible bf16 state for a module on the meta device, cut from one strip of noise."""
    state = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            fan_in = value[0].numel()
            state[name] = noise[: value.numel()].view(value.shape) / fan_in**0.5
        else:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            state[name] = fill(value.shape, dtype=torch.bfloat16)
    return state


def write_part(folder, settings, state, name):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder):
    """CLIP's four files and special ids; the words are single letters, the rest is filled up."""
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters]
    words += [f"filler{number}</w>" for number in range(START - len(words))]
    vocab = {word: place for place, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base model's folder, 2 GB in bf16, gone when the last test is done."""
    folder = tmp_path_factory.mktemp("full") / "sd15"
    folder.mkdir()
    noise = torch.randn(40_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
    assert sum(value.numel() for value in unet.parameters()) == 859_520_964
    name = "diffusion_pytorch_model"
    write_part(folder / "unet", UNET, random_state(unet, noise), name)
    state = random_state(vae, noise)
    for new, old in OLD_NAMES.items():  # the VAE was published before diffusers renamed these
        state = {
            key.replace(new, old) if ".attentions." in key else key: state[key] for key in state
        }
    write_part(folder / "vae", VAE, state, name)
    state = {f"text_model.{key}": value for key, value in random_state(text, noise).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_part(folder / "text_encoder", TEXT, state, "model")
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def full(folder):
    return load_model(str(folder), device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def z0(full):
    film = np.random.default_rng(0).random((1, 512, 512), np.float32)
    return encode_films(full, film)


def test_the_published_layout_loads_as_float32(full):
    assert len(full.unet.attn_processors) == 32
    for part in (full.unet, full.vae, full.text_encoder):
        assert {value.dtype for value in part.parameters()} == {torch.float32}
    assert full.vae.config.scaling_factor == 0.18215
    assert full.scheduler.config.prediction_type == "epsilon"


def test_captions_have_clips_length_and_special_tokens(full):
    ids = full.tokenizer("ab", padding="max_length").input_ids
    assert (ids[0], ids[3], len(ids)) == (START, END, 77)
    assert embed_captions(full, ["chest x-ray"]).shape == (1, 77, 768)


def test_a_film_of_512_px_has_latents_of_64(z0):
    assert z0.shape == (1, 4, 64, 64)
    assert z0.isfinite().all()


def test_noise_is_predicted_at_full_size(full, z0):
    with torch.no_grad():
        eps = predict_noise(full, z0, 500, embed_captions(full, ["chest x-ray"]))
    assert eps.shape == z0.shape
    assert eps.dtype == torch.float32
    assert eps.isfinite().all()
    assert eps.std() > 0


def test_a_cut_down_unet_takes_a_training_step(full, z0):
    torch.manual_seed(0)
    few = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1}
    few |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [320, 640]}
    whole, full.unet = full.unet, UNet2DConditionModel(**UNET | few)
    try:
        weights = list(full.unet.parameters())
        before = [value.detach().clone() for value in weights]
        noise, cond = torch.randn(1, 4, 32, 32), embed_captions(full, [""])
        noisy = full.scheduler.add_noise(z0[..., :32, :32], noise, torch.tensor([500]))
        F.mse_loss(predict_noise(full, noisy, 500, cond), noise).backward()
        torch.optim.AdamW(weights, lr=1e-5).step()
        assert all(value.grad.isfinite().all() for value in weights)
        moved = [not torch.equal(*pair) for pair in zip(weights, before, strict=True)]
        assert all(moved)
    finally:
        full.unet = whole


def test_another_base_is_refused_before_its_weights_are_read(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    whole = path.read_text()
    try:  # Stable Diffusion 2.1
        path.write_text(json.dumps(SCHEDULER | {"prediction_type": "v_prediction"}))
        with pytest.raises(ModelError, match="prediction_type is v_prediction, epsilon is needed"):
            load_model(str(folder), device="cpu")
    finally:
        path.write_text(whole)


def test_all_of_that_fits_in_memory():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process, ever
    print(f"peak {peak / 2**30:.1f} GiB")
    assert peak < 24 * 2**30
