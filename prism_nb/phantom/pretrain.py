"""Train the bundled base model: a small Stable Diffusion whose world is the phantom.

Four stages, each skipped when its folder is there, which comes last and whole: films, VAE (phantom
films, and real ones if some are given), CLIP (contrastive, films against captions), U-Net (noise
prediction on cached latents, EMA; real films as well). Same classes of diffusers and transformers
as Stable Diffusion v1.5, fewer channels. Killed and started again it continues from its last
checkpoint.
    python -m prism_nb.phantom.pretrain OUT [--films CSV] [--unet-steps 4500]
Shapes: films (N, H, W) uint8; images (B, 3, H, W) in [-1, 1]; z (B, C, H/8, W/8).
"""

import argparse
import json
import logging
import re
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from prism_nb.captions import caption, captions, vocabulary
from prism_nb.cohort import load_cohort
from prism_nb.diffusion import pick_device
from prism_nb.files import atomic_folder, atomic_path, read_json, write_json
from prism_nb.findings import FINDINGS
from prism_nb.images import load_films, uint8_to_unit, unit_to_sd
from prism_nb.phantom import DRAWN, render, sample_patient
from prism_nb.phantom.cohort import num_processors
from prism_nb.phantom.graph import PREVALENCE

log = logging.getLogger("pretrain")
# P(device | effusion) = P(device): the base itself must not be biased
UNCONFOUNDED = PREVALENCE["Support Devices"]
LATENT_CHANNELS = 16
CLIP_SIZE = 128  # pixels a side that CLIP sees of a film: its devices still show
FAMILY = 5  # films of a patient: as it is, and with one finding turned over
SHOWS = 4  # of 255: what a device changes a pixel by where it can be seen
MIXED = 0.1  # of all films that the U-Net sees, where real ones are given
TOLD = 0.3  # latents of twins differ by more only where their captions tell them apart
STYLES = (  # ways in which a cohort may be captioned, and how often the base sees them
    ({"template": "listing1"}, 0.15),
    ({"negatives": False}, 0.72),
    ({"negatives": True}, 0.13),
)
CPU = torch.device("cpu")
EVERY = {"cpu": 100, "cuda": 1000}  # steps from one checkpoint to the next
MAIN = ("Pleural Effusion", "Cardiomegaly", "Support Devices")  # what the notebooks edit
PRETRAIN_SEED = 1_000_003  # no cohort's population: its patients are never seen in a notebook


def tokenizer_folder(folder, words):
    """Write a CLIP tokenizer that keeps every one of `words` whole and spells all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pieces = sorted(
        {p for word in words for p in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", word.lower())}
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False)
    )
    learned = json.loads(model.to_str())["model"]
    vocab = dict.fromkeys(letters + [c + "</w>" for c in letters] + sorted(learned["vocab"]))
    vocab = [*vocab, "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(vocab)}, merges=merges, model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tiny_vae(latent_channels=LATENT_CHANNELS):
    """A KL-VAE that maps 8 x 8 pixels to one latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=256,
        force_upcast=False,
    )


def tiny_unet(sample_size, latent_channels=LATENT_CHANNELS):
    """A text-conditioned U-Net of three levels, cross-attention in the lower two."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4),  # the number of heads, in spite of its name
        norm_num_groups=16,
    )


def tiny_clip(size, vocab_size):
    """A CLIP whose image half is a small ResNet, and whose text half conditions the U-Net.

    CLIP has ResNets of its own. Networks that see patches, or convolve depth by depth, found
    hearts and fluid, and after 1,200 steps no wire; this one finds them in 200.
    """
    from transformers import (
        CLIPTextConfig,
        TimmWrapperConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    text = CLIPTextConfig(
        vocab_size=vocab_size,
        max_position_embeddings=77,
        projection_dim=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    vision = TimmWrapperConfig(
        architecture="test_resnet",  # timm's smallest: .4 M parameters
        num_labels=0,
        image_size=min(size, CLIP_SIZE),
        hidden_size=96,  # where the projection looks for it
    )
    both = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=64
    )
    return VisionTextDualEncoderModel(both)


def random_base(folder, size=64, seed=0):
    """A complete base model with random weights: for tests and for timing, not for use."""
    torch.manual_seed(seed)
    folder = Path(folder)
    tokenizer = tokenizer_folder(folder / "tokenizer", vocabulary())
    clip = tiny_clip(size, len(tokenizer))
    save_clip(clip, folder, size)
    tiny_vae().save_pretrained(folder / "vae")
    tiny_unet(size // 8).save_pretrained(folder / "unet")
    finish_folder(folder)
    return folder


def save_clip(clip, folder, size, encoder=None):
    """Write the model's text encoder (None: CLIP's text half), then CLIP and its image processor.

    A text encoder that is there already stays: a U-Net may have been trained on it.
    """
    from transformers import CLIPImageProcessor

    if not (folder / "text_encoder").is_dir():
        with atomic_folder(folder / "text_encoder") as partial:
            (encoder or clip.text_model).save_pretrained(partial)
    side = min(size, CLIP_SIZE)
    processor = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with atomic_folder(folder / "clip") as partial:
        clip.save_pretrained(partial)
        processor.save_pretrained(partial)


def finish_folder(folder):
    """Scheduler and model index: StableDiffusionPipeline.from_pretrained loads the folder."""
    from diffusers import DDIMScheduler

    from prism_nb.diffusion import SCHEDULER

    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index | parts)


def _family(number, size):
    """A patient's film and four twins, each with one finding turned over: films and their labels.

    A third of the patients are as the population has them; in a third every finding is decided by
    a coin, in a third the three of MAIN alone are and no other is there. Twins turn over each of
    MAIN and one other finding. Only so can the model tell what comes of one finding from what
    comes of those it goes with.
    """
    patient, do = sample_patient(PRETRAIN_SEED, number, confounding=UNCONFOUNDED), {}
    rng = patient.draw("pretrain")
    coins = dict(zip(DRAWN, rng.random(len(DRAWN)), strict=True))
    if number % 3 == 1:
        do = {label: int(coin < 0.3) for label, coin in coins.items()}
    elif number % 3 == 2:
        do = {label: int(label in MAIN and coin < 0.5) for label, coin in coins.items()}
    first = render(patient, size, do)
    others = [label for label in DRAWN if label not in MAIN]
    turned = [*MAIN, others[int(rng.integers(len(others)))]]
    twins = [render(patient, size, do | {label: 1 - first.labels[label]}) for label in turned]
    family = [first, *twins]
    return np.stack([film.image for film in family]), [film.labels for film in family]


def phantom_films(work, num_patients, size):
    """Render the training films once: uint8 (N * FAMILY, H, W), memory-mapped, and their labels."""
    path = work / f"films-{size}.npy"
    if not path.is_file():
        with ProcessPoolExecutor(num_processors()) as pool:
            numbers = range(1, num_patients + 1)
            made = list(pool.map(partial(_family, size=size), numbers, chunksize=25))
        films, labels = zip(*made, strict=True)
        write_json(path.with_suffix(".json"), [row for rows in labels for row in rows])
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(films))
    return np.load(path, mmap_mode="r"), read_json(path.with_suffix(".json"))


def real_films(csv, size, measured=False):
    """Films (N, size, size) uint8 of a CSV, and their labels, without every fifth; or those."""
    cohort = load_cohort(csv)
    table = cohort.table[(np.arange(len(cohort.table)) % 5 == 0) == measured]
    films = load_films([cohort.image_root / path for path in table["path"]], size)
    return films, table[list(FINDINGS)].to_dict("records")


def train(model, parameters, loss_of, steps, rate, work, name, ema=None):
    """AdamW, one-cycle rate, clipped gradients; resumes from the checkpoint it last wrote."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps + 1, pct_start=0.1
    )
    checkpoint, first, began = work / f"{name}.pt", 0, time.time()
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        if ema:
            ema.load_state_dict(state["ema"])
    every, running = EVERY[parameters[0].device.type], []
    for step in range(first, steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if ema:
            ema.step(parameters)
        running.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            mean, running = torch.stack(running).mean().item(), []
            log.info("%s step %d loss %.4f %.0f s", name, step + 1, mean, time.time() - began)
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
            }
            state |= {"schedule": schedule.state_dict()} | (
                {"ema": ema.state_dict()} if ema else {}
            )
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)


def fit_vae(work, films, lines, steps, start=None, batch_size=12, device=CPU):
    """L1 on pixels and on their differences, more where there is detail, and a light KL.

    Wires and leads cover so few pixels that an unweighted loss gives them up; lines (N, H, W) says
    where they are. Crops first, because they are four times cheaper; the last steps see whole
    films. Then the latents' scale is set. It stays in `work` until its decoder is refined.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae, whole = tiny_vae(), int(0.9 * steps)
    if start:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae").state_dict())
        with torch.no_grad():  # `settle` made its posterior a point: a little noise, to begin with
            vae.quant_conv.bias[vae.config.latent_channels :] = -6
    vae.to(device)

    def loss_of(step):
        rng = np.random.default_rng((11, step))
        size = films.shape[1]
        number, crop = (batch_size, size // 2) if step < whole else (batch_size // 3, size)
        rows = np.sort(rng.integers(len(films), size=number))
        x, line = _crops(films, lines, rows, crop, rng, device)
        generator = torch.Generator(device).manual_seed(step)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        return _off(x, y, line) + 1e-6 * posterior.kl().float().mean() / len(x)

    train(vae, list(vae.parameters()), loss_of, steps, 1e-3 if start else 1.5e-3, work, "vae")
    standardise(vae.cpu().eval(), films)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def standardise(vae, films, num_films=256):
    """Give every latent channel mean 0 and spread 1 over `films`; what is decoded stays the same.

    One noise schedule serves all channels. Where some spread twenty times as far as others, large
    shapes show through the noise of nearly every timestep, so that a caption says little new, and
    fine channels are drowned in all but the last. Both 1 x 1 convolutions absorb the change.
    """
    sample = np.random.default_rng(5).choice(len(films), min(num_films, len(films)), replace=False)
    parts = [films[np.sort(rows)] for rows in np.array_split(sample, max(1, len(sample) // 16))]
    z = torch.cat([vae.encode(unit_to_sd(uint8_to_unit(part))).latent_dist.mean for part in parts])
    mean, std, channels = z.mean((0, 2, 3)), z.std((0, 2, 3)), z.shape[1]
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # of the variances
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0)


def _off(x, y, line):
    """How far decoded films y (B, 3, H, W) are from x: more where x has detail, most on lines."""
    x, y = x[:, :1], y.float()
    detail = (x - F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)).abs()
    off = (1 + 8 * (detail / 0.2).clamp(max=1) + 8 * line) * (y - x)
    edges = sum((y - x).diff(dim=d).abs().mean() for d in (-1, -2))
    return off.abs().mean() + 2 * (off * (y - x)).mean() + 0.5 * edges


def refine_decoder(folder, work, films, lines, steps, batch_size=12, device=CPU):
    """Train the decoder alone for longer: the latents, and a U-Net trained on them, stay valid."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(step):
        rng = np.random.default_rng((14, step))
        rows = np.sort(rng.integers(len(films), size=batch_size))
        x, line = _crops(films, lines, rows, films.shape[1] // 2, rng, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            return _off(x, vae.decode(z).sample, line)

    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    train(vae, trained, loss_of, steps, 1e-3, work, "decoder")
    with atomic_folder(folder / "vae") as partial:
        vae.save_pretrained(partial)


def _crops(films, lines, rows, crop, rng, device):
    """One random window of films (B, 3, h, w) in [-1, 1], half of the time mirrored, and its lines.

    The VAE codes local detail: a window tells it as much as a film.
    """
    top, left = rng.integers(films.shape[1] - crop + 1, size=2)
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
    window = (rows, slice(top, top + crop), slice(left, left + crop))
    seen = [np.ascontiguousarray(part[window][:, :, flip]) for part in (films, lines)]
    x, line = (torch.from_numpy(part).to(device) for part in seen)
    return (x.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1), line[:, None].float()


def device_lines(films):
    """Where devices are on families' first films and their twins: both, and for each (N, H, W)."""
    first, turned = films[::FAMILY], films[1 + MAIN.index("Support Devices") :: FAMILY]
    lines = abs(first.astype(np.int16) - turned) > SHOWS
    return np.concatenate([first, turned]), np.concatenate([lines, lines])


def _style(rng):
    """One of the ways in which a cohort may be captioned, drawn at random."""
    return STYLES[rng.choice(len(STYLES), p=[share for _, share in STYLES])][0]


def fit_clip(folder, work, films, labels, size, steps, families=16, device=CPU):
    """Contrastive training on films and their twins, which differ in one finding alone.

    In a batch of unlike patients the rest of a caption tells films apart well enough; a twin makes
    the model notice the finding. Equal label sets are all positives of one another. Linear
    readings of the labels, from film and from caption, are thrown away afterwards. What the U-Net
    is told with is a copy of the text half, spread over captions of these films.
    """
    torch.manual_seed(2)
    tokenizer = tokenizer_folder(folder / "tokenizer", vocabulary())
    clip, side = tiny_clip(size, len(tokenizer)), min(size, CLIP_SIZE)
    seen = torch.nn.Linear(clip.config.vision_config.hidden_size, len(DRAWN))
    told = torch.nn.Linear(clip.config.text_config.hidden_size, len(DRAWN))
    parts = torch.nn.ModuleDict({"clip": clip, "seen": seen, "told": told}).train().to(device)
    truth = torch.tensor([[row[name] for name in DRAWN] for row in labels], dtype=torch.float32)
    truth = truth.to(device)
    main = [DRAWN.index(label) for label in MAIN]
    codes = (truth @ (2.0 ** torch.arange(len(DRAWN), device=device))).long()

    def loss_of(step):
        rng = np.random.default_rng((12, step))
        rows = twins(rng, len(films), families)
        words = [caption(labels[row], **_style(rng)) for row in rows]
        text = tokenizer(words, padding="max_length", max_length=77, return_tensors="pt")
        order = np.argsort(rows)  # reading in the order of the file is quicker
        shown = torch.from_numpy(uint8_to_unit(films[rows[order]][np.argsort(order)]))[:, None]
        shown = F.interpolate(shown, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            image = clip.vision_model(unit_to_sd(shown[:, 0]).to(device)).pooler_output
            word = clip.text_model(**text.to(device)).pooler_output
        image, word = image.float(), word.float()
        image_embeds = F.normalize(clip.visual_projection(image), dim=-1)
        text_embeds = F.normalize(clip.text_projection(word), dim=-1)
        logits = clip.logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
        same = (codes[rows][:, None] == codes[rows][None]).float()
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        labelled, found = truth[rows], seen(image)
        read = F.binary_cross_entropy_with_logits(found, labelled)
        read += F.binary_cross_entropy_with_logits(found[:, main], labelled[:, main])
        name = F.binary_cross_entropy_with_logits(told(word), labelled)
        return contrast + 4 * read + 2 * name

    train(parts, list(parts.parameters()), loss_of, steps, 4e-3, work, "clip")
    clip, rng = clip.cpu().eval(), np.random.default_rng(17)
    words = sorted({caption(row, **_style(rng)) for row in labels[:600]})
    save_clip(clip, folder, size, spread_text(deepcopy(clip.text_model), tokenizer, words))


def twins(rng, num_films, families):
    """Rows of some patients' films, each followed by that of one of its twins."""
    first = FAMILY * rng.choice(num_films // FAMILY, families, replace=False)
    return np.stack([first, first + rng.integers(1, FAMILY, families)], axis=1).ravel()


@torch.no_grad()
def spread_text(encoder, tokenizer, captions):
    """Centre and scale a text encoder's output over `captions`; its last layer norm absorbs it.

    Contrastive training leaves most of the output common to all words, and a U-Net then learns for
    long before it can tell "pleural effusion" from nothing. Returns the encoder.
    """
    text = tokenizer(captions, padding=True, return_tensors="pt")
    words = encoder(**text)[0][text.attention_mask.bool()]  # (tokens, D)
    mean, scale = words.mean(0), 1 / words.std(0).clamp(min=0.02)
    norm = next(part for name, part in encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.weight.mul_(scale)
    norm.bias.sub_(mean).mul_(scale)
    return encoder


def cached_latents(folder, path, films, device=CPU):
    """The posterior means of all films, scaled, encoded once: half precision (N, C, h, w)."""
    from diffusers import AutoencoderKL

    if not path.is_file():
        vae, parts = AutoencoderKL.from_pretrained(folder / "vae").eval().to(device), []
        for start in range(0, len(films), 32):
            x = unit_to_sd(uint8_to_unit(films[start : start + 32])).to(device)
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
                mean = vae.encode(x).latent_dist.mean.float()
            parts.append((mean * vae.config.scaling_factor).half().cpu().numpy())
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(parts))
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def mixed(latents, labels, real, real_labels):
    """Add real films to families' latents, each as families of equals, so that MIXED are real."""
    times = max(1, round(MIXED / (1 - MIXED) * len(latents) / (len(real) * FAMILY)))
    rows = np.tile(np.repeat(np.arange(len(real)), FAMILY), times)
    return torch.cat([latents, real[rows]]), [*labels, *(real_labels[row] for row in rows)]


@torch.no_grad()
def said(folder, labels, device):
    """Embeddings (U, L, D) of all captions; of each film in each of STYLES, which one (N, 3).

    The last embedding is that of the empty caption.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    table = pd.DataFrame(labels)
    texts, which = np.unique([captions(table, **style) for style, _ in STYLES], return_inverse=True)
    tokens = tokenizer([*texts, ""], padding="max_length", max_length=77, return_tensors="pt")
    parts = [encoder(part.to(device))[0].half() for part in tokens.input_ids.split(256)]
    return torch.cat(parts), which.reshape(len(STYLES), -1).T


def fit_unet(
    folder, work, latents, labels, steps, start=None, batch_size=16, rate=8e-4, device=CPU
):
    """Noise prediction (Algorithm 1) on cached latents, 10 % empty captions, EMA kept.

    A film and its twin share noise, timestep and way of captioning, so that what differs between
    them is what the caption says; where that is, a tenth of a film, the loss counts three times.
    Losses are weighted by min-SNR (Hang et al. 2023, gamma 5).
    start: a base whose U-Net to go on from; it must have been trained on the same VAE and text
    encoder, or nearly so.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    from prism_nb.finetune import NUM_TIMESTEPS, snr_weights

    torch.manual_seed(3)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    latents = latents.to(device)
    embedded, which = said(folder, labels, device)
    unet, shares = tiny_unet(latents.shape[-1]), [share for _, share in STYLES]
    if start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(start / "unet").state_dict())
    unet.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        unet.compile()
    ema = EMAModel(
        unet.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
    )
    weight = snr_weights(scheduler, torch.arange(NUM_TIMESTEPS), gamma=5).to(device)

    def loss_of(step):
        step += 1_000_000 * bool(start)  # other draws than those that `start` was trained on
        rng = np.random.default_rng((13, step))
        generator = torch.Generator(device).manual_seed(step)
        pairs = batch_size // 2
        rows = twins(rng, len(latents), pairs)
        words = which[rows, rng.choice(len(STYLES), pairs, p=shares).repeat(2)]
        words[(rng.random(pairs) < 0.1).repeat(2)] = len(embedded) - 1  # the empty caption
        z0 = latents[torch.from_numpy(rows).to(device)].float()
        noise = torch.randn(z0[::2].shape, generator=generator, device=device)
        t = torch.randint(0, NUM_TIMESTEPS, (pairs,), generator=generator, device=device)
        noise, t = noise.repeat_interleave(2, 0), t.repeat_interleave(2)
        told = 1 + 2 * ((z0[::2] - z0[1::2]).abs().amax(1, keepdim=True) > TOLD).float()
        told = told.repeat_interleave(2, 0)
        noisy = scheduler.add_noise(z0, noise, t)
        cond = embedded[torch.from_numpy(words).to(device)].float()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            eps = unet(noisy, t, encoder_hidden_states=cond).sample
        return (weight[t] * (told * (eps.float() - noise).square()).mean((1, 2, 3))).mean()

    train(unet, list(unet.parameters()), loss_of, steps, rate, work, "unet", ema=ema)
    ema.copy_to(unet.parameters())
    with atomic_folder(folder / "unet") as partial:
        unet.save_pretrained(partial)


@torch.no_grad()
def settle(folder):
    """Make the VAE's posterior a point: its mean is what the U-Net is trained on.

    Channels that the VAE hardly uses are as uncertain as they are wide; samples of them would be
    noise that the U-Net has never seen. Means, and what is decoded from them, stay as they are.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -14.0  # log of the variance
    with atomic_folder(folder / "vae") as partial:
        vae.save_pretrained(partial)


def halve(folder):
    """Store every weight in half precision, and no path of this machine."""
    from safetensors.torch import load_file, save_file

    from prism_nb.diffusion import strip_paths

    for path in folder.glob("*/*.safetensors"):
        weights = load_file(path)
        half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        with atomic_path(path) as temporary:
            save_file(half, temporary, metadata={"format": "pt"})
    strip_paths(folder)


def main(argv=None):
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--num-patients", type=int, default=3600)
    parser.add_argument("--films", type=Path, help="CSV of real films and their findings")
    parser.add_argument("--start", type=Path, help="base whose VAE and U-Net to go on from")
    parser.add_argument("--vae-steps", type=int, default=1900)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--clip-steps", type=int, default=1600)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--unet-batch", type=int, default=16)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder, work = args.out, args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    films, labels = phantom_films(work, args.num_patients, args.size)
    log.info("%d films of %d px", len(films), args.size)
    real, real_labels = real_films(args.films, args.size) if args.films else (films[:0], [])
    if not (folder / "vae").is_dir():
        mix, lines = device_lines(films)
        # About a quarter of what the VAE sees is real
        more = np.repeat(real, round(len(mix) / 3 / len(real)) if len(real) else 1, axis=0)
        mix, lines = np.concatenate([mix, more]), np.concatenate([lines, more < 0])
        fit_vae(work, mix, lines, args.vae_steps, args.start, device=device)
        refine_decoder(folder, work, mix, lines, args.decoder_steps, device=device)
    if not (folder / "clip").is_dir():
        fit_clip(folder, work, films, labels, args.size, args.clip_steps, device=device)
    finish_folder(folder)
    settle(folder)
    if not (folder / "unet").is_dir():
        how = {"batch_size": args.unet_batch, "device": device}
        latents = cached_latents(folder, work / "latents.npy", films, device)
        if len(real):
            more = cached_latents(folder, work / "latents-real.npy", real, device)
            latents, labels = mixed(latents, labels, more, real_labels)
        fit_unet(folder, work, latents, labels, args.unet_steps, args.start, **how)
    halve(folder)
    log.info("done: %s", folder)


if __name__ == "__main__":
    main()
