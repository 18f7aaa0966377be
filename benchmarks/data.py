"""W1 to W3: from files to latents (paper 2.2), against the released code's way."""

import shutil

import numpy as np
import torch
from PIL import Image

from benchmarks.paired import check, off
from benchmarks.peers.prism import Loop, look, read_files
from prism_nb.images import load_film
from prism_nb.metrics import psnr
from prism_nb.phantom import render, sample_patient

SIDE, READ = 512, 32
SOURCES = (  # as CheXpert comes: pixels and target
    ("CheXpert-small", (320, 390), 10),
    ("512 px", (512, 512), 4),
    ("full size", (2320, 2828), 3),
)


def decode(case):
    """W1: a JPEG from disk to a grey film of 512 px in memory."""
    film, rng = Image.fromarray(render(sample_patient(5, 1), SIDE).image), np.random.default_rng(0)
    read = look(SIDE)
    for name, shape, target in SOURCES:
        path, repeats = case.folder / f"{name}.jpg", case.scale.repeats if shape[0] < 1000 else 1
        pixels = np.asarray(film.resize(shape, Image.Resampling.BICUBIC), float)
        pixels = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255)  # a detector's grain
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)

        def ours(path=path, repeats=repeats):
            return [load_film(path, SIDE) for _ in range(repeats)][-1]

        def peer(path=path, repeats=repeats):
            return [read(path) for _ in range(repeats)][-1]

        error = float(psnr(ours()[None] / 255, peer()[:1].numpy() / 2 + 0.5)[0])
        gate = [check("PSNR, dB", error, 35, least=True)]
        about = gate, (target, target), "a film", (repeats, repeats)
        yield case.time("W1", f"decode a JPEG, {name}", ours, "PRISM's transforms", peer, *about)


def feed(case):
    """W2: a batch of 32 films for a training step, from the cache."""
    repeats, files, device = case.scale.repeats, case.folder / "files", case.device
    model = case.load()
    latents, loop = case.latents(model), Loop(model, case.table, case.scale.size, READ)
    loop.cache(files)
    orders = [np.random.default_rng(n).permutation(len(latents))[:READ] for n in range(repeats)]
    error = max(map(off, latents.gather(orders[0]), read_files(files, orders[0])))
    gate = [*same_latents(case, loop, latents), check("against files, relative", error, 0.01)]

    def ours():
        for rows in orders:
            [x.to(device) for x in latents.gather(rows)]

    def from_files():
        for rows in orders:
            [x.to(device) for x in read_files(files, rows)]

    def from_images():
        return loop.read(orders[0])

    about, name = ("W2", f"a batch of {READ} latents", ours), "one file of latents a film"
    yield case.time(*about, name, from_files, gate, (50, 50), "a batch", (repeats, repeats))
    name = "PRISM's loader, which leaves encoding to come"
    yield case.time(*about, name, from_images, gate, (None, None), "a batch", (repeats, 1))


def same_latents(case, loop, latents, num_films=8):
    """The gate of W2 and W4: the cached latents and captions are those that the loop computes."""
    rows = np.arange(min(num_films, len(latents)))
    torch.manual_seed(0)
    z0, text = (x.cpu() for x in loop.encode(rows))
    mean, std = (x.float() for x in latents.gather(rows))
    beyond = ((z0 - mean).abs() > 6 * std + 0.02).float().mean().item()
    gate = [check("latents beyond their posterior, share", beyond, 0.001)]
    slack = 0.02 if case.gpu else 1e-3  # VAE and CLIP in bf16
    return [*gate, check("captions, relative", off(latents.cond(rows), text), slack)]


def cache(case):
    """W3: films and captions encoded once."""
    count, files, folder = 2 * case.scale.batch, case.folder / "alone", case.folder / "built"
    loop, mine = Loop(case.load(), case.table[:count], case.scale.size, 1), case.half

    def ours():
        shutil.rmtree(folder, ignore_errors=True)
        return case.latents(mine, folder.name, count)

    def peer():
        loop.cache(files)

    peer()
    made, rows = ours(), np.arange(min(8, len(loop.paths)))
    error = max(map(off, made.gather(rows), read_files(files, rows)))
    gate = [check("means and spreads, relative", error, 0.05)]
    about = "VAE and CLIP, fp32, a film at a time", peer, gate, (1.5, 4), "a film"
    per, bf16 = (len(made), len(made)), mine.vae.dtype == torch.bfloat16
    yield case.time("W3", f"a cache of {len(made)} films", ours, *about, per, bf16=bf16)
