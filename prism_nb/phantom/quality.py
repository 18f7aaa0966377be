"""Measure a base model on phantom films that it has never seen: the numbers of its model card.

What the VAE keeps of a film and of each kind of device, whether CLIP finds what a film shows, and
whether films generated from captions show what the captions say, as judged by a classifier
trained on other films.
    python -m prism_nb.phantom.quality [BASE] [--num-films 500] [--films CSV] [--sheet PNG]
Shapes: films (N, H, W) uint8; labels: one dict a film. Intervals are 95 %, by patient.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prism_nb.captions import PLAIN_FILM, caption
from prism_nb.classifiers import build_classifier, fit, predict, score_heads
from prism_nb.diffusion import decode_latents, encode_films, load_model
from prism_nb.files import write_json
from prism_nb.images import uint8_to_unit, unit_to_uint8
from prism_nb.metrics import bootstrap_interval, psnr
from prism_nb.phantom import DEVICE_KINDS, render, sample_patient
from prism_nb.phantom.cohort import num_processors
from prism_nb.phantom.pretrain import MAIN, UNCONFOUNDED, real_films
from prism_nb.regeneration import generate_films
from prism_nb.scoring import load_clip

UNSEEN, JUDGE = 2_000_003, 3_000_017  # populations: of the films measured on, of the judge's
VISIBLE = 0.02  # a device pixel counts where it changes the film by at least this, of [0, 1]


def unseen(number, size, seed=UNSEEN, more=True):
    """A patient's film with each finding of MAIN decided by a coin, and its labels.

    With `more` also the film without noise, the film without devices, and each device's mask.
    """
    patient = sample_patient(seed, number, confounding=UNCONFOUNDED)
    coins = patient.draw("quality").random(len(MAIN))
    do = {label: int(coin < 0.5) for label, coin in zip(MAIN, coins, strict=True)}
    film = render(patient, size, do)
    if not more:
        return film.image, film.labels
    clean = render(patient, size, do, noise=False)
    bare = render(patient, size, do | {"Support Devices": 0})
    kinds = {kind: film.masks[kind] for kind in DEVICE_KINDS if kind in film.masks}
    return film.image, film.labels, clean.image, bare.image, kinds


def population(count, size, **options):
    """What `unseen` gives of `count` patients, each part as one list; all processors render."""
    with ProcessPoolExecutor(num_processors()) as pool:
        make = partial(unseen, size=size, **options)
        return list(zip(*pool.map(make, range(1, count + 1), chunksize=20), strict=True))


def through_vae(model, films):
    """Films uint8 (N, H, W), encoded and decoded: (N, H, W) in [0, 1]."""
    parts = []
    for start in range(0, len(films), 16):
        z0 = encode_films(model, uint8_to_unit(films[start : start + 16]))
        parts.append(decode_latents(model, z0).numpy())
    return np.concatenate(parts)


def device_recall(films, bare, kinds, decoded, decoded_bare):
    """By kind of device, the share of its visible pixels that keep half of their contrast.

    Contrast is the film less the same film without devices, before and after the VAE.
    """
    kept = {kind: [] for kind in DEVICE_KINDS}
    for row, masks in enumerate(kinds):
        true = uint8_to_unit(films[row]) - uint8_to_unit(bare[row])
        found = (decoded[row] - decoded_bare[row]) * np.sign(true)
        for kind, mask in masks.items():
            shown = mask & (abs(true) >= VISIBLE)
            if shown.any():
                kept[kind].append((found[shown] >= 0.5 * abs(true[shown])).mean())
    return {kind: (float(np.mean(v)), len(v)) for kind, v in kept.items() if v}


def zero_shot(model, films):
    """CLIP's score of each finding of MAIN, (N, len(MAIN)): nearer to it than to no word of it."""
    scorer = load_clip("base", model.base_model, model.device)
    none, *each = scorer.embed_texts([PLAIN_FILM, *(caption({label: 1.0}) for label in MAIN)])
    shown = scorer.embed_films(uint8_to_unit(films))
    return (shown @ (torch.stack(each) - none).T).cpu().numpy()


def _aurocs(truth, scores):
    """AUROC with its interval, by head, from labels and scores (N, len(MAIN)): one row each."""
    rising = (scores.argsort(0).argsort(0) / len(scores)).astype(np.float32)  # as probabilities
    table = score_heads(truth, rising, np.arange(len(truth)), MAIN)
    return table[["head", "n", "auroc", "auroc_low", "auroc_high"]].to_dict("records")


def train_judge(size, count, sees=128):
    """A classifier of MAIN on films of a third population."""
    films, labels = population(count, size, seed=JUDGE, more=False)
    films = np.stack(films)
    truth = np.array([[row[name] for name in MAIN] for row in labels], float)
    judge = build_classifier("test_resnet", len(MAIN), seed=5, sees=sees)
    cut = count - count // 8
    sets = (films[:cut], truth[:cut], films[cut:], truth[cut:])
    list(fit(judge, *sets, epochs=10, batch_size=32, learning_rate=4e-3, seed=5))
    return judge


def main(argv=None):
    """Measure, print a table, write quality.json if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="phantom")
    parser.add_argument("--num-films", type=int, default=500)
    parser.add_argument("--films", type=Path, help="CSV of real films; every fifth is measured")
    parser.add_argument("--judge-films", type=int, default=2000, help="that the judge learns from")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--sheet", type=Path, help="PNG of generated films beside rendered ones")
    args = parser.parse_args(argv)
    model = load_model(args.base)
    size = model.vae.config.sample_size
    films, labels, clean, bare, kinds = population(args.num_films, size)
    films, clean, bare = np.stack(films), np.stack(clean), np.stack(bare)
    decoded, decoded_bare = through_vae(model, films), through_vae(model, bare)
    patients, unit = np.arange(len(films)), uint8_to_unit(films)
    found = {
        "vae_psnr": bootstrap_interval(psnr(unit, decoded), patients),
        "noise_psnr": bootstrap_interval(psnr(unit, uint8_to_unit(clean)), patients),
        "device_recall": device_recall(films, bare, kinds, decoded, decoded_bare),
    }
    if args.films:
        real, _ = real_films(args.films, size, measured=True)
        there = psnr(uint8_to_unit(real), through_vae(model, real))
        found["real_psnr"] = (*bootstrap_interval(there, np.arange(len(real))), len(real))
    truth = np.array([[row[name] for name in MAIN] for row in labels], float)
    found["clip"] = _aurocs(truth, zero_shot(model, films))
    judge = train_judge(size, args.judge_films)
    found["judge"] = _aurocs(truth, predict(judge, films))
    mean = encode_films(model, unit).mean(0).cpu()
    made = unit_to_uint8(generate_films(model, [caption(row) for row in labels], mean))
    found["text_to_image"] = _aurocs(truth, predict(judge, made))
    print(json.dumps(found, indent=1, default=float))
    if args.json:
        write_json(args.json, found)
    if args.sheet:
        save_sheet(args.sheet, made, films)


def save_sheet(path, made, films, rows=8, columns=8):
    """One picture: generated films in the left half of its columns, rendered ones in the right."""
    half = rows * columns // 2
    both = [part[:half].reshape(rows, columns // 2, *part.shape[1:]) for part in (made, films)]
    tiles = np.concatenate(both, axis=1)  # (rows, columns, H, W)
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in tiles])).save(path)


if __name__ == "__main__":
    main()
