"""Every film and every caption of a cohort, encoded once: training never touches VAE or CLIP again.

The VAE's posterior is kept as mean and standard deviation, so that each step can draw its own
sample, as Algorithm 1's `vae.encode` does. Equal captions share one row of text embeddings.
Shapes: mean, std (N, C, h, w), already scaled; text (U, L, D); caption_index (N,). Used by
notebook 02.
"""

from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from prism_nb.diffusion import embed_captions
from prism_nb.files import atomic_path, read_json, write_json
from prism_nb.images import load_films, uint8_to_unit, unit_to_sd

CHUNK = 256  # films decoded at a time: memory stays flat however large the cohort


@dataclass
class Latents:
    """A cohort in latent space, row by row in the order of `film_ids`."""

    film_ids: list
    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    caption_index: np.ndarray
    captions: list

    def rows(self, film_ids):
        """Row numbers of some films."""
        place = {film: i for i, film in enumerate(self.film_ids)}
        return np.array([place[film] for film in film_ids])

    def sample(self, rows, generator):
        """Latents z0 (B, C, h, w) drawn from the posterior of some rows."""
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        return self.mean[rows] + self.std[rows] * noise

    def cond(self, rows):
        """Caption embeddings (B, L, D) of some rows."""
        return self.text[self.caption_index[rows]]


def encode_cohort(model, table, image_root, size, fit, folder, batch_size=16):
    """Encode a cohort's films and captions into `folder` and return the Latents."""
    paths, film_ids = [image_root / p for p in table["path"]], list(table["film_id"])
    means, stds = [], []
    for start in range(0, len(paths), CHUNK):
        films = uint8_to_unit(load_films(paths[start : start + CHUNK], size, fit))
        for first in range(0, len(films), batch_size):
            mean, std = _posterior(model, films[first : first + batch_size])
            means.append(mean)
            stds.append(std)
    captions, index = np.unique(table["caption"].to_numpy(dtype=str), return_inverse=True)
    captions = [*captions.tolist(), ""]  # the empty caption comes last: it is what dropout uses
    tensors = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    tensors["text"] = torch.cat([embed_captions(model, [c]).cpu() for c in captions])
    tensors["caption_index"] = torch.from_numpy(index.astype(np.int64))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "latents.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / "latents.json",
        {"film_ids": film_ids, "captions": captions, "size": size, "fit": fit},
    )
    return load_latents(folder)


@torch.no_grad()
def _posterior(model, films):
    scale = model.vae.config.scaling_factor
    posterior = model.vae.encode(unit_to_sd(films).to(model.device)).latent_dist
    return (posterior.mean * scale).float().cpu(), (posterior.std * scale).float().cpu()


def load_latents(folder):
    """Read what encode_cohort wrote."""
    index = read_json(folder / "latents.json")
    tensors = load_file(folder / "latents.safetensors")
    return Latents(
        film_ids=index["film_ids"],
        mean=tensors["mean"],
        std=tensors["std"],
        text=tensors["text"],
        caption_index=tensors["caption_index"].numpy(),
        captions=index["captions"],
    )
