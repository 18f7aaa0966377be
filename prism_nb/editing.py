"""Editing: inversion and a new caption give the counterfactual film (paper 2.3, Figures 3 and 4).

This version re-generates plainly: from the film's own noise, guided from the empty caption
towards T'. No attention control and no mask yet, so what lies outside the edit also pays the
price of VAE and inversion. Films (B, H, W) in [0, 1]. Used by notebook 04.
"""

import numpy as np
import torch

from prism_nb.diffusion import decode_latents, embed_captions
from prism_nb.inversion import ddim_sample


def counterfactuals(model, inversion, rows, targets, guidance_scale, batch_size=8):
    """Re-generate inverted films under new captions.

    rows: positions in the inversion, one a target caption. Returns films (len(rows), H, W) in [0,
    1]; raises ValueError when rows and targets differ in number.
    """
    rows, targets = [int(row) for row in rows], list(targets)
    if len(rows) != len(targets) or not rows:
        raise ValueError(
            f"{len(rows)} films and {len(targets)} target captions: give one caption a film"
        )
    empty, films = embed_captions(model, [""]), []
    for start in range(0, len(rows), batch_size):
        noise = inversion.noise[rows[start : start + batch_size]].to(model.device)
        cond = embed_captions(model, targets[start : start + batch_size])
        z0 = ddim_sample(model, noise, cond, inversion.num_steps, guidance_scale, empty)
        films.append(decode_latents(model, z0))
    return torch.cat(films).numpy().astype(np.float32)
