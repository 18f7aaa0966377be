"""The latent diffusion model: frozen VAE and text encoder, trainable U-Net (paper 2.2, 3.1).

A base model is a folder in diffusers' layout (vae/ unet/ text_encoder/ tokenizer/ scheduler/, and
clip/ for S_CLIP), local, from the hub, or `phantom`, the small one that comes with the package.
Shapes: film (B, H, W) in [0, 1]; z (B, C, h, w), already times the VAE's scaling factor; cond (B,
L, D). Latents, embeddings and the noise schedule are float32, whatever the weights are held in.
Used by notebooks 02, 03 and 04.
"""

import hashlib
import logging
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import is_offline_mode
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from prism_nb.files import atomic_folder, one_line, read_json, write_json
from prism_nb.images import sd_to_unit, unit_to_sd

log = logging.getLogger(__name__)
PHANTOM_BASE = Path(__file__).parent / "assets" / "phantom-base"
# What a base must have been trained with (section 3.1), here because its weights depend on it.
TRAINED_ON = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 85e-5,
    "beta_end": 12e-3,
    "prediction_type": "epsilon",
}
# The rest as in Stable Diffusion v1.5's own scheduler.
SCHEDULER = TRAINED_ON | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
VAE_BATCH = 4  # films the VAE takes at once: 16 of them outgrow a CPU's cache, half again as slow


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
    dtype: torch.dtype = torch.float32  # what the U-Net computes in; its weights stay float32
    own_text_encoder: bool = False  # trained as well, so it is saved with the U-Net

    @cached_property
    def alphas(self):
        """Cumulative alphas of the noise schedule, float32 (T,), on the model's device."""
        return self.scheduler.alphas_cumprod.to(self.device)

    @cached_property
    def final_alpha(self):
        """The cumulative alpha below the first timestep, on the model's device."""
        return self.scheduler.final_alpha_cumprod.to(self.device)


def pick_device(device="auto"):
    """The torch device for auto, cpu or cuda; raises ModelError where cuda is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            "device is cuda but torch sees no GPU: use device: cpu, or check `prism-nb doctor`"
        )
    return torch.device(device)


def pick_dtype(precision, device):
    """The torch dtype for fp32, bf16, or auto: bf16 on a GPU that has it, fp32 elsewhere."""
    if precision == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if able else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise ModelError(f"precision is {precision!r}; it must be fp32, bf16 or auto")
    return dtypes[precision]


def load_model(base_model="phantom", revision="", unet_weights="", device="auto", precision="auto"):
    """Load a base model, or a fine-tuned one written by save_unet, for inference.

    `unet_weights` replaces the U-Net alone: a diffusers folder, or the bare `model.safetensors`
    of an accelerate state. With bf16 on a GPU the frozen parts are held in bf16; the U-Net keeps
    float32 weights and computes under autocast. Raises ModelError, in one line, on a missing,
    partial, corrupt or mismatched folder.
    """
    device = pick_device(device)
    dtype = pick_dtype(precision, device)
    frozen = dtype if device.type == "cuda" else torch.float32
    given = folder = texts = locate(base_model)
    if (Path(given) / "base.json").is_file():  # a tuned U-Net beside a pointer to the frozen rest
        base_model, revision = _pointer(Path(given) / "base.json")
        unet_weights = unet_weights or str(Path(given) / "unet")
        folder = locate(base_model)
        texts = given if (Path(given) / "text_encoder").is_dir() else folder
    _check_scheduler(folder, revision)
    unet = _load_part(UNet2DConditionModel, folder, "unet", revision)
    if unet_weights:
        replace_unet(unet, unet_weights)
    vae = _load_part(AutoencoderKL, folder, "vae", revision, frozen)
    text_encoder = _load_part(CLIPTextModel, texts, "text_encoder", revision, frozen)
    model = Model(
        vae=vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        tokenizer=_load_part(CLIPTokenizer, folder, "tokenizer", revision),
        unet=unet.to(device).eval().requires_grad_(False),
        scheduler=DDIMScheduler(**SCHEDULER),
        base_model="phantom" if Path(folder).resolve() == PHANTOM_BASE.resolve() else base_model,
        revision=revision,
        device=device,
        dtype=dtype,
        own_text_encoder=texts != folder,
    )
    _check_fit(model)
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


def _pointer(path):
    origin = _read_config(path)
    if not {"base_model", "revision"} <= set(origin):
        raise ModelError(f"{path} names no base_model and revision: run 02_finetune again")
    return origin["base_model"], origin["revision"]


def _read_config(path):
    try:
        config = read_json(path)
    except ValueError as error:
        raise ModelError(f"{path} is no readable JSON: copy the whole folder again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no settings: copy the whole folder again")
    return config


def _load_part(cls, folder, name, revision, dtype=torch.float32):
    local = Path(folder).is_dir()
    options = {"subfolder": name, "local_files_only": local or is_offline_mode()}
    if local:
        _check_part(Path(folder), name)
    elif revision:
        options["revision"] = revision
    if cls is not CLIPTokenizer:
        options |= {"use_safetensors": True, "output_loading_info": True}
        options["dtype" if cls is CLIPTextModel else "torch_dtype"] = dtype
    try:
        part = cls.from_pretrained(folder, **options)
    except Exception as error:  # each library has errors of its own for what can be wrong here
        reason = one_line(error)
        hint = "download it once, or give a folder" if is_offline_mode() else "check name, network"
        why = "config and weights must be whole and of one model"
        if not local:
            why = f"it is not in the local cache and cannot be fetched: {hint}"
        raise ModelError(f"cannot load {name} of base model {folder}: {why} ({reason})") from error
    return part if cls is CLIPTokenizer else _whole(*part, folder, name)


def _whole(part, info, folder, name):
    # Both libraries fill what is missing with random numbers and merely log it. A text encoder
    # may come with more than is asked for: CLIP's vision half.
    unknown = [] if name == "text_encoder" else sorted(info["unexpected_keys"])
    odd = sorted(info["missing_keys"]) + unknown
    if odd:
        raise ModelError(
            f"cannot load {name} of base model {folder}: its weights do not fit its config.json, "
            f"{len(info['missing_keys'])} missing, {len(unknown)} unknown (first: {odd[0]})"
        )
    return part


def _check_part(folder, name):
    """Refuse a part that is missing, or not whole, before a library sees it."""
    part, again = folder / name, "copy the whole folder again"
    if not part.is_dir():
        raise ModelError(
            f"base model {folder} has no {name}/: it needs vae, unet, text_encoder and tokenizer, "
            "or base.json beside a fine-tuned unet"
        )
    if name == "tokenizer":
        names = {path.name for path in part.iterdir()}
        if not ({"tokenizer.json"} <= names or {"vocab.json", "merges.txt"} <= names):
            raise ModelError(f"{part} has no tokenizer.json, nor vocab.json, merges.txt: {again}")
        return
    if not (part / "config.json").is_file():
        raise ModelError(f"{part} has no config.json: {again}")
    _read_config(part / "config.json")
    if not any(part.glob("*.safetensors")):
        pickled = [path.name for path in part.iterdir() if path.suffix in (".bin", ".pt", ".ckpt")]
        if pickled:
            raise ModelError(
                f"{part} has {pickled[0]}, a pickle, which can run code; only .safetensors are "
                "read: take the model's safetensors"
            )
        raise ModelError(f"{part} has a config.json but no .safetensors: {again}")


def _check_scheduler(folder, revision):
    """Refuse a base trained on another noise schedule, or to predict something else than noise."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    config = {}  # a base without one is taken at its word
    if path.is_file():
        config = _read_config(path)
    elif not Path(folder).is_dir():
        options = {"revision": revision} if revision else {}
        try:
            config = DDIMScheduler.load_config(
                folder, subfolder="scheduler", local_files_only=is_offline_mode(), **options
            )
        except OSError:
            log.debug("%s has no scheduler, or cannot be reached", folder)
    needed = TRAINED_ON | {"rescale_betas_zero_snr": False, "trained_betas": None}
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise ModelError(
                f"base model {folder}: its scheduler's {key} is {config[key]}, {value} is needed: "
                "take a base trained as Stable Diffusion v1 was"
            )


def _check_fit(model):
    """Refuse parts that are not of one model."""
    unet, vae, text = model.unet.config, model.vae.config, model.text_encoder.config
    pairs = [
        ("cross_attention_dim of unet", unet.cross_attention_dim, "hidden_size", text.hidden_size),
        ("in_channels of unet", unet.in_channels, "latent_channels of vae", vae.latent_channels),
        ("out_channels of unet", unet.out_channels, "latent_channels of vae", vae.latent_channels),
        (
            "model_max_length of tokenizer",
            model.tokenizer.model_max_length,
            "max_position_embeddings of text_encoder",
            text.max_position_embeddings,
        ),
    ]
    for ours, a, theirs, b in pairs:
        if a != b:
            raise ModelError(f"{model.base_model}: {ours} is {a}, {theirs} is {b}: not one model")
    if len(model.tokenizer) > text.vocab_size:
        raise ModelError(
            f"{model.base_model}: the tokenizer has {len(model.tokenizer)} words, the text encoder "
            f"{text.vocab_size}: not one model"
        )


def replace_unet(unet, weights):
    """Load other U-Net weights in place: a diffusers folder or one safetensors file."""
    path = Path(weights)
    if path.is_dir():
        _check_config(unet, path)
        names = ("diffusion_pytorch_model.safetensors", "model.safetensors")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if not path.is_file() or path.suffix != ".safetensors":
        raise ModelError(
            f"unet_weights {weights}: need a diffusers folder or a .safetensors file there "
            "(pickles are not read)"
        )
    try:
        state = load_file(path)
    except Exception as error:  # safetensors has one error class for every kind of corruption
        raise ModelError(
            f"unet_weights {path} is not a whole safetensors file ({error})"
        ) from error
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = unet.state_dict()
    missing, unexpected = set(own) - set(state), set(state) - set(own)
    wrong = [key for key, value in own.items() if key in state and state[key].shape != value.shape]
    if missing or unexpected or wrong:
        odd = sorted(wrong or missing or unexpected)[0]
        raise ModelError(
            f"unet_weights {path} is of another architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unknown, {len(wrong)} of another shape (first: {odd})"
        )
    unet.load_state_dict(state)


def _check_config(unet, folder):
    # The number of heads, for one, changes what a U-Net computes but no shape of its weights.
    path = folder / "config.json"
    theirs = _read_config(path) if path.is_file() else {}
    for key, value in unet.config.items():
        given = theirs.get(key, value)
        if isinstance(given, list) and isinstance(value, tuple):
            given = tuple(given)
        if not key.startswith("_") and key != "sample_size" and given != value:
            raise ModelError(
                f"unet_weights {folder} is of another architecture: {key} is {given}, the base "
                f"model's is {value}"
            )


def save_unet(model, folder, text_encoder=False):
    """Write the U-Net in diffusers' layout, with base.json pointing to the frozen rest.

    With text_encoder=True, or where the model was loaded with one of its own, that is written too.
    The pointer is removed first and written last: without it a folder was left half written.
    """
    folder = Path(folder)
    if (folder / "vae").exists():
        raise ModelError(f"{folder} is a base model: save the fine-tuned U-Net in another folder")
    parts = {"unet": model.unet}
    if text_encoder or model.own_text_encoder:
        parts["text_encoder"] = model.text_encoder
    (folder / "base.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "text_encoder", ignore_errors=True)
    for name, part in parts.items():
        with atomic_folder(folder / name) as partial:
            part.save_pretrained(partial)
            strip_paths(partial)
    write_json(folder / "base.json", {"base_model": model.base_model, "revision": model.revision})


def strip_paths(folder):
    """Take this machine's paths out of the settings that diffusers and transformers wrote."""
    for path in [*Path(folder).rglob("*config.json"), *Path(folder).rglob("model_index.json")]:
        config = read_json(path)
        if not {"_name_or_path", "name_or_path"}.isdisjoint(config):
            write_json(path, {k: v for k, v in config.items() if k.lstrip("_") != "name_or_path"})


def weights_hash(module):
    """SHA-256 over the names, shapes and values of a module's weights, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def autocast(model):
    """Mixed precision for the U-Net's forward pass when the model's dtype asks for it."""
    if model.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=model.dtype)


@torch.no_grad()
def posterior(model, films):
    """Mean and standard deviation, each float32 (B, C, h, w) and scaled, of what the VAE codes.

    films: (B, H, W) in [0, 1].
    """
    images, scale = unit_to_sd(films), model.vae.config.scaling_factor
    coded = model.vae.encode(images.to(model.device, model.vae.dtype)).latent_dist
    return coded.mean.float() * scale, coded.std.float() * scale


def encode_films(model, films, batch_size=VAE_BATCH):
    """Films (B, H, W) in [0, 1] to latents z0 (B, C, h, w): the posterior's mean, scaled."""
    starts = range(0, len(films), batch_size)
    return torch.cat([posterior(model, films[k : k + batch_size])[0] for k in starts])


@torch.no_grad()
def decode_latents(model, z, batch_size=VAE_BATCH):
    """Latents (B, C, h, w) to films (B, H, W) in [0, 1], float32 on the CPU."""
    scale, dtype = model.vae.config.scaling_factor, model.vae.dtype
    return torch.cat(
        [
            sd_to_unit(model.vae.decode((part.float() / scale).to(dtype)).sample.float()).cpu()
            for part in z.split(batch_size)
        ]
    )


def token_ids(model, captions):
    """Token ids (B, L) of captions on the model's device, cut or padded to the tokenizer's L."""
    tokens = model.tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=model.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids.to(model.device)


def cut_words(model, caption):
    """The words of a caption that the text encoder never sees: those beyond its last token."""
    places = model.tokenizer(caption, return_offsets_mapping=True, verbose=False).offset_mapping
    limit = model.tokenizer.model_max_length
    if len(places) <= limit:
        return []
    first = places[limit - 1][0]  # the end token takes the place of this one
    return [word.group() for word in re.finditer(r"\S+", caption) if word.end() > first]


@torch.no_grad()
def embed_captions(model, captions, batch_size=64, warn=True):
    """Captions to CLIP token embeddings, float32 (B, L, D), L the tokenizer's own length.

    A warning names what is cut from captions that are too long; cut_words says it of each.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions:
        raise ValueError("embed_captions was given no caption; give at least one")
    if warn:
        _warn_of_cuts(model, captions)
    starts = range(0, len(captions), batch_size)
    ids = [token_ids(model, captions[k : k + batch_size]) for k in starts]
    return torch.cat([model.text_encoder(part)[0].float() for part in ids])


def _warn_of_cuts(model, captions):
    limit = model.tokenizer.model_max_length
    lengths = [len(ids) for ids in model.tokenizer(captions, verbose=False).input_ids]
    long = [text for text, length in zip(captions, lengths, strict=True) if length > limit]
    if long:
        cut = " ".join(cut_words(model, long[0]))
        log.warning(
            "%d of %d captions have more than %d tokens; from the first is cut: %s",
            *(len(long), len(captions), limit, cut),
        )


def predict_noise(model, z, t, cond):
    """The U-Net's noise prediction eps (B, C, h, w), float32 whatever the model's dtype."""
    dtype = next(model.unet.parameters()).dtype  # float32, unless a caller halved the weights
    with autocast(model):
        return model.unet(z.to(dtype), t, encoder_hidden_states=cond.to(dtype)).sample.float()


def ddim_step(z, eps, alpha_from, alpha_to):
    """Move z between two noise levels along DDIM's path, either way (Song 2020, eq. 12)."""
    z0 = (z - (1 - alpha_from).sqrt() * eps) / alpha_from.sqrt()  # the predicted clean latent
    return alpha_to.sqrt() * z0 + (1 - alpha_to).sqrt() * eps


def film_side(model, side):
    """The side in pixels of films whose latents have this side."""
    return side * 2 ** (len(model.vae.config.block_out_channels) - 1)


def timesteps(model, num_steps):
    """DDIM's timesteps for num_steps, rising: the ones diffusers' scheduler walks down."""
    if not 1 <= num_steps <= 999:
        raise ValueError(f"num_ddim_steps is {num_steps}; it must lie between 1 and 999")
    model.scheduler.set_timesteps(num_steps)
    return model.scheduler.timesteps.flip(0).to(model.device)


def alpha_at(model, t):
    """Cumulative alpha at timestep t; below the first timestep, the scheduler's final alpha."""
    return model.alphas[t] if t >= 0 else model.final_alpha
