"""Inversion: the noise that a film came from (paper Appendix B, Figure 5).

`ddim_invert` walks z0 up the schedule with the film's own caption; `ddim_sample` walks back down.
Both use one `ddim_step`, and both call the U-Net at the *noisier* timestep of each step, as
diffusers' DDIMInverseScheduler and DDIMScheduler do. Inversion is approximate: the noise is
predicted from the cleaner latent. Shapes: trajectory (N + 1, B, C, h, w), z0 first; cond (B, L,
D). Used by notebooks 03, 04.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prism_nb.diffusion import alpha_at, ddim_step, predict_noise, timesteps
from prism_nb.files import atomic_path, read_json, write_json


@dataclass
class Inversion:
    """Inverted films: what every edit of them starts from."""

    film_ids: list
    captions: list
    trajectory: torch.Tensor  # (N + 1, B, C, h, w) float32, z0 first, the noise last

    @property
    def num_steps(self):
        """Number of DDIM steps N."""
        return len(self.trajectory) - 1

    @property
    def noise(self):
        """The noise zN (B, C, h, w)."""
        return self.trajectory[-1]

    def save(self, folder):
        """Write trajectory.safetensors and inversion.json."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "trajectory.safetensors") as temporary:
            save_file({"trajectory": self.trajectory.contiguous()}, temporary)
        write_json(
            folder / "inversion.json", {"film_ids": self.film_ids, "captions": self.captions}
        )


def load_inversion(folder):
    """Read an Inversion; raises ValueError with one line when its file is damaged."""
    about = read_json(folder / "inversion.json")
    try:
        trajectory = load_file(folder / "trajectory.safetensors")["trajectory"]
    except SafetensorError as error:
        raise ValueError(
            f"{folder}/trajectory.safetensors is damaged ({error}): run 03_invert again"
        ) from error
    return Inversion(about["film_ids"], about["captions"], trajectory)


def levels(model, num_steps):
    """Noise levels from clean to noise: -1 (the film itself), then DDIM's N timesteps, rising."""
    return [-1, *timesteps(model, num_steps).tolist()]


@torch.no_grad()
def ddim_invert(model, z0, cond, num_steps):
    """Walk z0 (B, C, h, w) up to noise with its own caption: the trajectory (N + 1, B, C, h, w)."""
    trajectory = [z0.float()]
    for t_from, t_to in pairwise(levels(model, num_steps)):
        eps = predict_noise(model, trajectory[-1], t_to, cond)
        trajectory.append(
            ddim_step(trajectory[-1], eps, alpha_at(model, t_from), alpha_at(model, t_to))
        )
    return torch.stack(trajectory)


@torch.no_grad()
def ddim_sample(model, noise, cond, num_steps, guidance_scale=1.0, uncond=None):
    """Walk noise (B, C, h, w) down to z0, guided from `uncond` towards `cond`.

    Classifier-free guidance: eps = eps_uncond + w (eps_cond - eps_uncond); w = 1 is the caption
    alone.
    """
    if guidance_scale != 1.0 and uncond is None:
        raise ValueError(
            f"guidance_scale is {guidance_scale}: guidance needs the embedding of the empty caption"
        )
    z = noise.float()
    for t_to, t_from in pairwise(reversed(levels(model, num_steps))):
        eps = guided_noise(model, z, t_to, cond, uncond, guidance_scale)
        z = ddim_step(z, eps, alpha_at(model, t_to), alpha_at(model, t_from))
    return z


def guided_noise(model, z, t, cond, uncond, guidance_scale):
    """Noise prediction under classifier-free guidance; both branches run as one batch."""
    if guidance_scale == 1.0:
        return predict_noise(model, z, t, cond)
    both = predict_noise(model, torch.cat([z, z]), t, torch.cat([uncond.expand_as(cond), cond]))
    eps_uncond, eps_cond = both.chunk(2)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)
