"""Train the bundled base model: a small Stable Diffusion whose world is the phantom.

Four stages, each skipped when its folder is there: films, VAE (phantom films, and real ones if a
folder is given), CLIP (contrastive, films against captions), U-Net (noise prediction on cached
latents, EMA). Same classes of diffusers and transformers as Stable Diffusion v1.5, fewer
channels. Killed and started again it continues from its last checkpoint.
    python -m prism_nb.phantom.pretrain OUT [--films FOLDER] [--unet-steps 4500]
Shapes: films (N, H, W) uint8; images (B, 3, H, W) in [-1, 1]; z (B, C, H/8, W/8).
"""

import argparse
import json
import logging
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from prism_nb.captions import caption, edit_labels, vocabulary
from prism_nb.files import atomic_path, read_json, write_json
from prism_nb.images import load_films, uint8_to_unit, unit_to_sd
from prism_nb.phantom import DRAWN, render, sample_patient
from prism_nb.phantom.graph import PREVALENCE

log = logging.getLogger("pretrain")
# P(device | effusion) = P(device): the base itself must not be biased
UNCONFOUNDED = PREVALENCE["Support Devices"]
LATENT_CHANNELS = 8
MAIN = ("Pleural Effusion", "Cardiomegaly", "Support Devices")  # what the notebooks edit
# Findings whose caption is changed against the film; those that notebooks edit come more often.
FLIPPED = (*DRAWN, *MAIN * 5)
PATCHES = 16  # a side of the grid that CLIP's vision half sees a film in
LAYERS = {  # a label's mask, where it has another name
    "Support Devices": "devices",
    "Cardiomegaly": "heart",
    "Enlarged Cardiomediastinum": "mediastinum",
}
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
        block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(1, 3, 5),  # the number of heads, in spite of its name: 32 channels each
        norm_num_groups=16,
    )


def tiny_clip(size, vocab_size):
    """A CLIP of three layers a side; its text half conditions the U-Net."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    shared = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    ends = {
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    text = CLIPTextConfig(
        vocab_size=vocab_size, max_position_embeddings=77, projection_dim=64, **shared, **ends
    )
    vision = CLIPVisionConfig(
        image_size=size, patch_size=size // PATCHES, projection_dim=64, **shared
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


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


def save_clip(clip, folder, size):
    """Write the whole CLIP, its image processor, and its text half as the model's text encoder."""
    from transformers import CLIPImageProcessor, CLIPTextModel

    clip.save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder / "clip")
    encoder = CLIPTextModel(clip.config.text_config)
    own = encoder.state_dict()
    source = {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    encoder.load_state_dict({k: source[k.removeprefix("text_model.")] for k in own})
    encoder.save_pretrained(folder / "text_encoder")


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


def _film(number, size):
    """A film of the population, its labels, and which of them show in each of 16 x 16 patches.

    A third of the films are as the population has them; in a third every finding is decided by a
    coin, in a third the three of MAIN alone are and no other is there. Only so can the model tell
    what comes of one finding from what comes of those it goes with.
    """
    patient, do = sample_patient(PRETRAIN_SEED, number, confounding=UNCONFOUNDED), {}
    coins = dict(zip(DRAWN, patient.draw("pretrain").random(len(DRAWN)), strict=True))
    if number % 3 == 1:
        do = {label: int(coin < 0.3) for label, coin in coins.items()}
    elif number % 3 == 2:
        do = {label: int(label in MAIN and coin < 0.5) for label, coin in coins.items()}
    film, patches = render(patient, size, do), np.zeros((PATCHES, PATCHES, len(DRAWN)), bool)
    for place, label in enumerate(DRAWN):
        if film.labels[label]:
            mask = film.masks[LAYERS.get(label, label)]
            side = size // PATCHES
            patches[..., place] = mask.reshape(PATCHES, side, PATCHES, side).any((1, 3))
    return film.image, film.labels, patches


def phantom_films(work, num_films, size):
    """Render the training films once: uint8 (N, H, W), memory-mapped, their labels and patches."""
    path = work / f"films-{size}.npy"
    if not path.is_file():
        with ProcessPoolExecutor(2) as pool:
            made = list(pool.map(partial(_film, size=size), range(1, num_films + 1), chunksize=50))
        films, labels, patches = zip(*made, strict=True)
        write_json(path.with_suffix(".json"), labels)
        for name, array in ((f"patches-{size}.npy", patches), (path.name, films)):
            with atomic_path(work / name) as temporary, open(temporary, "wb") as file:
                np.save(file, np.stack(array))
    patches = np.load(work / f"patches-{size}.npy", mmap_mode="r")
    return np.load(path, mmap_mode="r"), read_json(path.with_suffix(".json")), patches


def train(model, parameters, loss_of, steps, rate, work, name, ema=None):
    """AdamW, one-cycle rate, clipped gradients; resumes from its checkpoint every 100 steps."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
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
    running = []
    for step in range(first, steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if ema:
            ema.step(parameters)
        running.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log.info(
                "%s step %d loss %.4f %.0f s", name, step + 1, np.mean(running), time.time() - began
            )
            running = []
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


def fit_vae(folder, work, films, steps, start=None, batch_size=12):
    """L1 on pixels and on their differences, more where there is detail, and a light KL.

    Wires and leads cover so few pixels that an unweighted loss gives them up. Crops first, because
    they are four times cheaper; the last steps see whole films. Then the latents' scale is set.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae, whole = tiny_vae(), int(0.9 * steps)
    if start:
        vae = AutoencoderKL.from_pretrained(start / "vae").train()

    def loss_of(step):
        rng = np.random.default_rng((11, step))
        size = films.shape[1]
        number, crop = (batch_size, size // 2) if step < whole else (batch_size // 3, size)
        rows = np.sort(rng.integers(len(films), size=number))
        x = unit_to_sd(uint8_to_unit(_crop(films[rows], crop, rng)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        return _off(x, y) + 1e-6 * posterior.kl().float().mean() / len(x)

    train(vae, list(vae.parameters()), loss_of, steps, 1e-3 if start else 1.5e-3, work, "vae")
    with torch.no_grad():
        sample = np.random.default_rng(5).choice(len(films), 64, replace=False)
        z = vae.eval().encode(unit_to_sd(uint8_to_unit(films[sample]))).latent_dist.mean
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 5))
    vae.save_pretrained(folder / "vae")


def _off(x, y):
    """How far decoded films y (B, 3, H, W) are from x, up to nine times more where x has detail."""
    x, y = x[:, :1], y.float()
    detail = (x - F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)).abs()
    off = (1 + 8 * (detail / 0.2).clamp(max=1)) * (y - x)
    edges = sum((y - x).diff(dim=d).abs().mean() for d in (-1, -2))
    return off.abs().mean() + 2 * (off * (y - x)).mean() + 0.5 * edges


def refine_decoder(folder, work, films, steps, batch_size=12):
    """Train the decoder alone for longer: the latents, and a U-Net trained on them, stay valid."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae").train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(step):
        rng = np.random.default_rng((14, step))
        rows = np.sort(rng.integers(len(films), size=batch_size))
        x = unit_to_sd(uint8_to_unit(_crop(films[rows], films.shape[1] // 2, rng)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            return _off(x, vae.decode(z).sample)

    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    train(vae, trained, loss_of, steps, 1e-3, work, "decoder")
    vae.save_pretrained(folder / "vae")


def _crop(films, crop, rng):
    """One random window, half of the time mirrored: the VAE codes local detail."""
    films = films[:, :, ::-1] if rng.random() < 0.5 else films
    top, left = rng.integers(films.shape[1] - crop + 1, size=2)
    return np.ascontiguousarray(films[:, top : top + crop, left : left + crop])


def _style(rng):
    """One of the ways in which a cohort may be captioned, drawn at random."""
    template = "listing1" if rng.random() < 0.25 else "plain"
    return {"template": template, "negatives": bool(rng.random() < 0.15)}


def fit_clip(folder, work, films, labels, patches, size, steps, batch_size=32):
    """Contrastive training: each film against all captions, and against its own with one changed.

    The second makes the model notice every finding: in a batch, the rest of a caption tells films
    apart well enough. Equal label sets are all positives of one another. Linear readings of the
    labels, from the film and from each of its patches, are thrown away afterwards: without them a
    transformer needs far more films to notice a wire. Where a text encoder is there
    already it is kept as it is, because a U-Net may have been trained on it.
    """
    from transformers import CLIPTextModel

    torch.manual_seed(2)
    tokenizer = tokenizer_folder(folder / "tokenizer", vocabulary())
    clip = tiny_clip(size, len(tokenizer))
    if (folder / "text_encoder").is_dir():
        kept = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
        kept = {k.removeprefix("text_model."): v for k, v in kept.items()}
        own = clip.text_model.state_dict()
        clip.text_model.load_state_dict({k: kept[k.removeprefix("text_model.")] for k in own})
        clip.text_model.requires_grad_(False)
    reader = torch.nn.Linear(clip.config.projection_dim, len(DRAWN))
    finder = torch.nn.Linear(clip.config.vision_config.hidden_size, len(DRAWN))
    both = torch.nn.ModuleDict({"clip": clip, "reader": reader, "finder": finder})
    truth = torch.tensor([[row[name] for name in DRAWN] for row in labels], dtype=torch.float32)
    codes = (truth @ (2.0 ** torch.arange(len(DRAWN)))).long()

    def loss_of(step):
        rng = np.random.default_rng((12, step))
        rows = np.sort(rng.integers(len(films), size=batch_size))
        words, other = [], []
        for row in rows:
            style, finding = _style(rng), FLIPPED[rng.integers(len(FLIPPED))]
            changed = edit_labels(labels[row], finding, not labels[row][finding])
            words.append(caption(labels[row], **style))
            other.append(caption(changed, **style))
        text = tokenizer(words + other, padding="max_length", max_length=77, return_tensors="pt")
        shown = films[rows]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = clip(**text, pixel_values=unit_to_sd(uint8_to_unit(shown)))
        logits = out.logits_per_image.float()  # (B, 2B): true captions, then changed ones
        right = logits[:, :batch_size]
        same = (codes[rows][:, None] == codes[rows][None]).float()
        target = same / same.sum(1, keepdim=True)
        pair = torch.stack([right.diagonal(), logits[:, batch_size:].diagonal()], dim=1)
        own = F.cross_entropy(pair, torch.zeros(batch_size, dtype=torch.long))
        read = F.binary_cross_entropy_with_logits(reader(8 * out.image_embeds.float()), truth[rows])
        tokens = out.vision_model_output.last_hidden_state[:, 1:].float()  # (B, patches, D)
        there = torch.from_numpy(patches[rows].reshape(batch_size, -1, len(DRAWN))).float()
        find = F.binary_cross_entropy_with_logits(finder(tokens), there)
        contrast = (F.cross_entropy(right, target) + F.cross_entropy(right.T, target)) / 2
        return 0.5 * contrast + 2 * own + 4 * read + 8 * find

    trained = [parameter for parameter in both.parameters() if parameter.requires_grad]
    train(both, trained, loss_of, steps, 1e-3, work, "clip")
    save_clip(clip, folder, size)


@torch.no_grad()
def spread_text(folder, captions):
    """Centre and scale the text encoder's output over `captions`; its last layer norm absorbs it.

    Contrastive training leaves most of the output common to all words, and a U-Net then learns for
    long before it can tell "pleural effusion" from nothing. CLIP's own text half is left as it was.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = tokenizer(captions, padding=True, return_tensors="pt")
    words = encoder(**text)[0][text.attention_mask.bool()]  # (tokens, D)
    mean, scale = words.mean(0), 1 / words.std(0).clamp(min=0.02)
    norm = next(part for name, part in encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.weight.mul_(scale)
    norm.bias.sub_(mean).mul_(scale)
    encoder.save_pretrained(folder / "text_encoder")


def fit_unet(folder, work, films, labels, steps, batch_size=16):
    """Noise prediction (Algorithm 1) on cached latents, 10 % empty captions, EMA kept."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from prism_nb.diffusion import Model, embed_captions, encode_films

    torch.manual_seed(3)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    frozen = Model(
        vae,
        CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        None,
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        "",
        "",
        torch.device("cpu"),
    )
    cached = work / "latents.npy"
    if not cached.is_file():
        parts = [
            encode_films(frozen, uint8_to_unit(films[k : k + 64]), 32)
            for k in range(0, len(films), 64)
        ]
        with atomic_path(cached) as temporary, open(temporary, "wb") as file:
            np.save(file, torch.cat(parts).half().numpy())
    latents = torch.from_numpy(np.load(cached)).float()
    unet, texts = tiny_unet(latents.shape[-1]), {}
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def loss_of(step):
        rng = np.random.default_rng((13, step))
        rows = rng.integers(len(latents), size=batch_size)
        words = ["" if rng.random() < 0.1 else caption(labels[r], **_style(rng)) for r in rows]
        new = sorted(set(words) - set(texts))
        if new:
            texts.update(zip(new, embed_captions(frozen, new).half(), strict=True))
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(0, 1000, (batch_size,), generator=generator)
        noisy = frozen.scheduler.add_noise(latents[rows], noise, t)
        cond = torch.stack([texts[w] for w in words]).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eps = unet(noisy, t, encoder_hidden_states=cond).sample
        return F.mse_loss(eps.float(), noise)

    train(unet, list(unet.parameters()), loss_of, steps, 7e-4, work, "unet", ema=ema)
    ema.copy_to(unet.parameters())
    unet.half().save_pretrained(folder / "unet")  # half the size; loaded back as float32


def main(argv=None):
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--num-films", type=int, default=12000)
    parser.add_argument("--films", type=Path, help="folder of real films for the VAE")
    parser.add_argument("--start", type=Path, help="base whose VAE to go on from")
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--clip-steps", type=int, default=2500)
    parser.add_argument("--unet-steps", type=int, default=5000)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder, work = args.out, args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    films, labels, patches = phantom_films(work, args.num_films, args.size)
    log.info("%d films of %d px", len(films), args.size)
    if not (folder / "vae").is_dir():
        mix = np.array(films[:3000])
        if args.films:
            paths = sorted(p for p in args.films.iterdir() if p.is_file())
            real = load_films(
                [p for i, p in enumerate(paths) if i % 5], args.size
            )  # every fifth is kept for measuring
            mix = np.concatenate([mix, np.repeat(real, max(1, len(mix) // len(real)), axis=0)])
        fit_vae(folder, work, mix, args.vae_steps, args.start)
        refine_decoder(folder, work, mix, args.decoder_steps)
    if not (folder / "clip").is_dir():
        fit_clip(folder, work, films, labels, patches, args.size, args.clip_steps)
        rng = np.random.default_rng(17)
        spread_text(folder, sorted({caption(row, **_style(rng)) for row in labels[:600]}))
    finish_folder(folder)
    if not (folder / "unet").is_dir():
        fit_unet(folder, work, films, labels, args.unet_steps)
    log.info("done: %s", folder)


if __name__ == "__main__":
    main()
