"""A training step and the reading of a batch against the released code's way.

    python -m benchmarks.training [--pairs 7]

Peer (a): a step of PRISM's finetune_chexpert.py, written from what it does: one image file a
sample through PIL and torchvision, VAE and CLIP in the loop, float32, AdamW as it comes. Peer (b):
latents in one torch.save'd file a sample. Both have our weights, films, batch size and schedule.
Ours is what 02_finetune runs: latents and captions from the cache, bfloat16 in the forward pass.
A float32 row says how much of it is the number format.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from benchmarks.paired import ceilings, machine, paired, peak_memory, spread
from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort
from prism_nb.diffusion import load_model
from prism_nb.finetune import finetune
from prism_nb.latents import encode_cohort
from prism_nb.params import validate

SIZE, NUM_FILMS, BATCH, READ = 256, 48, 16, 32


class Peer:
    """The released loop: every step reads, encodes and embeds anew."""

    def __init__(self, model, paths, texts):
        """Unfreeze the U-Net of a model of its own."""
        self.model, self.paths, self.texts = model, paths, texts
        model.unet.requires_grad_(True).train()
        self.optimiser = torch.optim.AdamW(model.unet.parameters(), lr=1e-5, weight_decay=1e-2)
        self.look = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE)),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def encode(self, rows):
        """Latents (B, C, h, w) and embeddings (B, L, D) of some films."""
        model = self.model
        x = torch.stack([self.look(Image.open(self.paths[row]).convert("RGB")) for row in rows])
        tokens = model.tokenizer(
            [self.texts[row] for row in rows],
            padding="max_length",
            truncation=True,
            max_length=model.tokenizer.model_max_length,
            return_tensors="pt",
        )
        with torch.no_grad():
            z0 = model.vae.encode(x).latent_dist.sample() * model.vae.config.scaling_factor
            return z0, model.text_encoder(tokens.input_ids)[0]

    def step(self):
        """One update of the weights."""
        rows = np.random.default_rng(0).permutation(NUM_FILMS)[:BATCH]
        z0, text = self.encode(rows)
        noise, t = torch.randn_like(z0), torch.randint(0, 1000, (len(rows),))
        noisy = self.model.scheduler.add_noise(z0, noise, t)
        loss = F.mse_loss(self.model.unet(noisy, t, encoder_hidden_states=text).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.unet.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def ours(model, latents, precision):
    """A call that makes one update, and the generator behind it."""
    wanted = {"num_train_steps": 10_000, "train_batch_size": BATCH, "precision": precision}
    settings = validate("02_finetune", wanted)
    model.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    steps = finetune(model, latents, np.arange(NUM_FILMS), settings)
    return lambda: next(steps)


def gate(model, peer, latents):
    """Refuse to time paths that do not compute the same: relative errors, latents and loss."""
    rows = np.arange(8)
    torch.manual_seed(0)
    z0, text = peer.encode(rows)
    mean, std = latents.gather(rows)
    beyond = ((z0 - mean).abs() > 6 * std + 0.02).float().mean().item()
    words = ((latents.cond(rows) - text).norm() / text.norm()).item()
    noise, t = torch.randn_like(z0), torch.full((len(rows),), 400)
    noisy = model.scheduler.add_noise(z0, noise, t)
    with torch.no_grad():
        exact = F.mse_loss(model.unet(noisy, t, encoder_hidden_states=text).sample, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.unet(noisy, t, encoder_hidden_states=text).sample.float()
    loss = abs(F.mse_loss(half, noise) / exact - 1).item()
    print(
        f"gate: latents beyond their posterior {beyond:.4f}, captions {words:.1e}, loss {loss:.1e}"
    )
    assert beyond < 0.001, "the cached latents are not those of the films"
    assert words < 1e-4, "the cached captions are not those of the films"
    assert loss < 0.03, "bfloat16 changes the loss by more than 3 %"


def prepare(folder):
    """Films on disk, a model for each path, and our cache of latents."""
    cohort = load_cohort(phantom.write_cohort(folder / "films", NUM_FILMS, SIZE, seed=5))
    table = cohort.table.assign(caption=captions(cohort.table))
    paths = [cohort.image_root / path for path in table["path"]]
    mine, theirs = load_model("phantom", device="cpu"), load_model("phantom", device="cpu")
    latents = encode_cohort(mine, table, cohort.image_root, SIZE, "squash", folder / "latents")
    return mine, Peer(theirs, paths, list(table["caption"])), latents


def reading(folder, latents):
    """A batch of 32 from our cache against one file a sample: the pairs' timings."""
    for row in range(NUM_FILMS):
        mean, std = latents.gather([row])
        torch.save({"mean": mean[0], "std": std[0]}, folder / f"{row}.pt")
    orders = np.random.default_rng(1)
    draw = lambda: orders.permutation(NUM_FILMS)[:READ]  # noqa: E731

    def peer():
        parts = [torch.load(folder / f"{row}.pt", weights_only=True) for row in draw()]
        return [torch.stack([part[name] for part in parts]) for name in ("mean", "std")]

    return paired(lambda: latents.gather(draw()), peer, pairs=101, warmup=5)


def memory(folder, path):
    """Three steps of one path alone: print the process's peak memory, in GiB."""
    mine, peer, latents = prepare(folder)
    step = peer.step if path == "peer" else ours(mine, latents, "bf16")
    for _ in range(3):
        step()
    print(f"{peak_memory():.2f}")


def main(argv=None):
    """Measure and print the table; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--memory", choices=["ours", "peer"], help="of one path alone")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory:
            return memory(folder, args.memory)
        print(machine(torch), f"{torch.get_num_threads()} threads", ceilings(), sep="; ")
        mine, peer, latents = prepare(folder)
        gate(mine, peer, latents)
        rows = [("a batch of 32 read, ms", reading(folder, latents), 50, 1000)]
        for precision, target in (("bf16", 2.0), ("fp32", None)):
            step = ours(mine, latents, precision)
            timed = paired(step, peer.step, args.pairs)
            rows.append((f"a training step of {BATCH}, {precision}, s", timed, target, 1))
    peaks = {path: _peak(path) for path in ("ours", "peer")}
    print(f"{'':<36}{'ours, median (range)':<36}{'peer':<36}{'peer / ours':<30}target")
    for label, timed, target, unit in rows:
        parts = [spread(timed[who], unit, 2) for who in ("ours", "peer")]
        goal = f">= {target}" if target else ""
        print(f"{label:<36}{parts[0]:<36}{parts[1]:<36}{spread(timed['ratio'], 1, 2):<30}{goal}")
    print(f"peak memory of training, GiB: ours {peaks['ours']}, peer {peaks['peer']}")
    if args.json:
        plain = [(n, {k: v.tolist() for k, v in r.items()}, t) for n, r, t, _ in rows]
        args.json.write_text(json.dumps({"rows": plain, "peaks": peaks}, indent=1))
    return int(any(target and np.median(r["ratio"]) < target for _, r, target, _ in rows))


def _peak(path):
    command = [sys.executable, "-m", "benchmarks.training", "--memory", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


if __name__ == "__main__":
    sys.exit(main())
