"""The latent diffusion model: frozen VAE and text encoder, trainable U-Net (paper 2.2, 3.1).

A base model is a folder in diffusers' layout (vae/ unet/ text_encoder/ tokenizer/ scheduler/, and
clip/ for S_CLIP), local, from the hub, or `phantom`, the small one that comes with the package.
Shapes: film (B, H, W) in [0, 1]; z (B, C, h, w), already times the VAE's scaling factor; cond (B,
L, D). Used by notebooks 02, 03 and 04.
"""

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from prism_nb.files import read_json, write_json
from prism_nb.images import sd_to_unit, unit_to_sd

PHANTOM_BASE = Path(__file__).parent / "assets" / "phantom-base"
# Section 3.1: scaled_linear, 85e-5 to 12e-3; the rest as in Stable Diffusion v1.5's own scheduler.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 85e-5,
    "beta_end": 12e-3,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class ModelError(ValueError):
    """A base model or its weights cannot be used; the message says which and what to do."""


@dataclass
class Model:
    """The parts of Stable Diffusion that the notebooks use, on one device."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    base_model: str
    revision: str
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def alphas(self):
        """Cumulative alphas of the noise schedule, float32 (T,)."""
        return self.scheduler.alphas_cumprod.to(self.device)


def pick_device(device="auto"):
    """The torch device for auto, cpu or cuda; raises ModelError where cuda is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            "device is cuda but torch sees no GPU: use device: cpu, or check `prism-nb doctor`"
        )
    return torch.device(device)


def load_model(base_model="phantom", revision="", unet_weights="", device="auto", precision="fp32"):
    """Load a base model, or a fine-tuned one written by save_unet, for inference.

    `unet_weights` replaces the U-Net alone: a diffusers folder, or the bare `model.safetensors`
    of an accelerate state. Raises ModelError on a missing, partial, corrupt or mismatched folder.
    """
    device, folder = pick_device(device), locate(base_model)
    pointer = Path(folder) / "base.json"
    if pointer.is_file():  # a fine-tuned U-Net beside a pointer to everything that stayed frozen
        origin = read_json(pointer)
        unet_weights = unet_weights or str(Path(folder) / "unet")
        base_model, revision = origin["base_model"], origin["revision"]
        folder = locate(base_model)

    def part(cls, name):
        return _load_part(cls, folder, name, revision)

    unet = part(UNet2DConditionModel, "unet")
    if unet_weights:
        replace_unet(unet, unet_weights)
    model = Model(
        vae=part(AutoencoderKL, "vae").to(device).eval().requires_grad_(False),
        text_encoder=part(CLIPTextModel, "text_encoder").to(device).eval().requires_grad_(False),
        tokenizer=part(CLIPTokenizer, "tokenizer"),
        unet=unet.to(device).eval().requires_grad_(False),
        scheduler=DDIMScheduler(**SCHEDULER),
        base_model=base_model,
        revision=revision,
        device=device,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    if model.text_encoder.config.hidden_size != model.unet.config.cross_attention_dim:
        raise ModelError(
            f"{base_model}: the text encoder gives {model.text_encoder.config.hidden_size} numbers "
            f"a token, the U-Net takes {model.unet.config.cross_attention_dim}: not one model"
        )
    return model


def locate(base_model):
    """The folder of a base model, or its hub name where no such folder exists."""
    if base_model == "phantom":
        return str(PHANTOM_BASE)
    if Path(base_model).is_dir():
        return str(Path(base_model))
    if base_model.count("/") != 1 or base_model.startswith((".", "/", "~")):
        raise ModelError(
            f"base_model {base_model!r}: no such folder; give phantom, a folder, or owner/model"
        )
    return base_model


def _load_part(cls, folder, name, revision):
    local = Path(folder).is_dir()
    if local and not (Path(folder) / name).is_dir():
        raise ModelError(
            f"base model {folder} has no {name}/: it needs vae, unet, text_encoder and tokenizer"
        )
    options = {
        "subfolder": name,
        "local_files_only": local or os.environ.get("HF_HUB_OFFLINE") == "1",
    }
    if revision:
        options["revision"] = revision
    if cls is not CLIPTokenizer:
        options["use_safetensors"] = True
    try:
        return cls.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        where = (
            "is the folder whole?"
            if local
            else "no such model, or no network and not in the local cache"
        )
        raise ModelError(
            f"cannot load {name} of base model {folder}: {where} ({reason})"
        ) from error


def replace_unet(unet, weights):
    """Load other U-Net weights in place: a diffusers folder or one safetensors file."""
    path = Path(weights)
    if path.is_dir():
        path = next(
            (
                path / n
                for n in ("diffusion_pytorch_model.safetensors", "model.safetensors")
                if (path / n).is_file()
            ),
            path,
        )
    if not path.is_file():
        raise ModelError(
            f"unet_weights {weights}: need a diffusers folder or a .safetensors file there"
        )
    try:
        state = load_file(path)
    except (
        Exception
    ) as error:  # safetensors raises its own error class for every kind of corruption
        raise ModelError(
            f"unet_weights {path} is not a whole safetensors file ({error})"
        ) from error
    state = {key.removeprefix("module."): value for key, value in state.items()}
    missing, unexpected = set(unet.state_dict()) - set(state), set(state) - set(unet.state_dict())
    wrong = [k for k, v in unet.state_dict().items() if k in state and state[k].shape != v.shape]
    if missing or unexpected or wrong:
        odd = sorted(wrong or missing or unexpected)[0]
        raise ModelError(
            f"unet_weights {path} is of another architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unknown, {len(wrong)} of another shape (first: {odd})"
        )
    unet.load_state_dict(state)


def save_unet(model, folder):
    """Write the U-Net in diffusers' layout, with base.json pointing to the frozen rest."""
    folder = Path(folder)
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    write_json(folder / "base.json", {"base_model": model.base_model, "revision": model.revision})


def autocast(model):
    """Mixed precision for the U-Net's forward pass when the model's dtype asks for it."""
    if model.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=model.dtype)


@torch.no_grad()
def encode_films(model, films, batch_size=16):
    """Films (B, H, W) in [0, 1] to latents z0 (B, C, h, w): the posterior's mean, scaled."""
    scale = model.vae.config.scaling_factor
    parts = []
    for start in range(0, len(films), batch_size):
        images = unit_to_sd(films[start : start + batch_size]).to(model.device)
        parts.append(model.vae.encode(images).latent_dist.mean * scale)
    return torch.cat(parts)


@torch.no_grad()
def decode_latents(model, z, batch_size=16):
    """Latents (B, C, h, w) to films (B, H, W) in [0, 1], float32 on the CPU."""
    scale = model.vae.config.scaling_factor
    return torch.cat(
        [
            sd_to_unit(model.vae.decode(part / scale).sample).float().cpu()
            for part in z.split(batch_size)
        ]
    )


@torch.no_grad()
def embed_captions(model, captions):
    """Captions to CLIP token embeddings (B, L, D), L the tokenizer's own length."""
    if not captions:
        raise ValueError("embed_captions was given no caption; give at least one")
    tokens = model.tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=model.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return model.text_encoder(tokens.input_ids.to(model.device))[0]


def predict_noise(model, z, t, cond):
    """The U-Net's noise prediction eps (B, C, h, w), float32 whatever the model's dtype."""
    with autocast(model):
        return model.unet(z, t, encoder_hidden_states=cond).sample.float()


def ddim_step(z, eps, alpha_from, alpha_to):
    """Move z between two noise levels along DDIM's path, either way (Song 2020, eq. 12)."""
    z0 = (
        z - (1 - alpha_from).sqrt() * eps
    ) / alpha_from.sqrt()  # (B, C, h, w), the predicted clean latent
    return alpha_to.sqrt() * z0 + (1 - alpha_to).sqrt() * eps


def timesteps(model, num_steps):
    """DDIM's timesteps for num_steps, rising: the ones diffusers' scheduler walks down."""
    if not 1 <= num_steps <= 1000:
        raise ValueError(f"num_ddim_steps is {num_steps}; it must lie between 1 and 1000")
    model.scheduler.set_timesteps(num_steps)
    return model.scheduler.timesteps.flip(0).to(model.device)


def alpha_at(model, t):
    """Cumulative alpha at timestep t; below the first timestep, the scheduler's final alpha."""
    return model.alphas[t] if t >= 0 else model.scheduler.final_alpha_cumprod.to(model.device)
