"""PRISM's released training (github.com/Amarkr1/PRISM, finetune_chexpert.py), from what it does.

Every step opens one image file a film with Pillow, as RGB, resizes and normalises it by
torchvision, runs VAE and CLIP in float32 and the U-Net in half precision on a GPU, and steps with
AdamW as it comes. diffusers' train_text_to_image.py is the same loop with all parts in half
precision; `cache` is the plain way to keep what VAE and CLIP give: a film at a time, a file each.
"""

from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms


def look(size):
    """From a file to what the VAE takes: (3, size, size) in [-1, 1]."""
    steps = [transforms.Resize((size, size)), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])
    return lambda path: prepare(Image.open(path).convert("RGB"))


class Loop:
    """The released loop: each step reads, encodes and embeds anew."""

    def __init__(self, model, table, size, batch):
        """Unfreeze the U-Net of a model of its own; table: files and captions of films."""
        self.model, self.batch, self.look = model, batch, look(size)
        model.vae.to(memory_format=torch.contiguous_format)  # as diffusers loads it
        self.paths, self.texts = list(table["path"]), list(table["caption"])
        model.unet.requires_grad_(True).train()
        self.optimiser = torch.optim.AdamW(model.unet.parameters(), lr=1e-5, weight_decay=1e-2)
        self.orders = np.random.default_rng(0)

    def draw(self, count=0):
        """Some films, as positions."""
        return self.orders.permutation(len(self.paths))[: count or self.batch]

    def read(self, rows):
        """Images (B, 3, S, S) and token ids (B, L) of some films: what its Dataset gives."""
        images = torch.stack([self.look(self.paths[row]) for row in rows])
        return images, torch.cat([self._tokens(self.texts[row]) for row in rows])

    def _tokens(self, text):
        tokenizer = self.model.tokenizer
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(text, max_length=tokenizer.model_max_length, **how).input_ids

    @torch.no_grad()
    def posterior(self, images, tokens):
        """The VAE's posterior of images, and the embeddings (B, L, D) of captions."""
        model = self.model
        posterior = model.vae.encode(images.to(model.device, model.vae.dtype)).latent_dist
        return posterior, model.text_encoder(tokens.to(model.device))[0].float()

    def encode(self, rows):
        """Latents (B, C, h, w) and embeddings (B, L, D) of some films."""
        posterior, text = self.posterior(*self.read(rows))
        return posterior.sample().float() * self.model.vae.config.scaling_factor, text

    def step(self):
        """One update of the weights; its loss."""
        model = self.model
        z0, text = self.encode(self.draw())
        noise, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=z0.device)
        noisy = model.scheduler.add_noise(z0, noise, t)
        half = z0.device.type == "cuda"  # accelerate's mixed precision, as released: the U-Net's
        with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            eps = model.unet(noisy, t, encoder_hidden_states=text).sample
        loss = F.mse_loss(eps.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def cache(self, folder):
        """Mean, spread and embedding of every film, one at a time, into files of its own."""
        folder.mkdir(exist_ok=True)
        scale = self.model.vae.config.scaling_factor
        for row in range(len(self.paths)):
            posterior, text = self.posterior(*self.read([row]))
            kept = {"mean": posterior.mean[0] * scale, "std": posterior.std[0] * scale}
            kept = {name: value.float().cpu() for name, value in kept.items()}
            torch.save(kept, folder / f"{row}.pt")
            torch.save(text[0].cpu(), folder / f"{row}-text.pt")


def read_files(folder, rows):
    """Means and spreads (B, C, h, w) from what `cache` wrote, a file a film."""
    parts = [torch.load(folder / f"{row}.pt", weights_only=True) for row in rows]
    return [torch.stack([part[name] for part in parts]) for name in ("mean", "std")]
