"""LANCE's editing (github.com/Amarkr1/LANCE, lance/utils/edit_utils.py), which PRISM's code calls.

Null-text inversion a film at a time in float32: DDIM up, then at each step Adam on the empty
caption, the loss read at every inner step, the U-Net's weights never frozen, so that each backward
pass makes their gradients too; the film rebuilt; then prompt-to-prompt. CLIP's scores go through
Pillow, a film and an edit at a time (its misc_utils). Schedule and attention are the package's.
"""

import numpy as np
import torch
from diffusers import DDIMInverseScheduler
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import to_tensor

from prism_nb.diffusion import decode_latents, embed_captions, encode_films, predict_noise
from prism_nb.editing import edit
from prism_nb.inversion import Inversion, alphas_of, levels, step_down
from prism_nb.regeneration import regenerate

GUIDANCE, INNER = 7.5, 10


@torch.no_grad()
def climb(model, z0, text, num_steps):
    """diffusers' DDIMInverseScheduler, for one film: trajectory (N + 1, 1, C, h, w)."""
    scheduler = DDIMInverseScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_steps)
    trajectory = [z0]
    for t in scheduler.timesteps:
        eps = predict_noise(model, trajectory[-1], t, text)
        trajectory.append(scheduler.step(eps, t, trajectory[-1]).prev_sample)
    return torch.stack(trajectory)


def null_text(model, z0, text, num_steps):
    """The trajectory, the tuned empty captions (N, 1, L, D), and when each loss was small enough.

    All inner steps run, though the released code stops early; the last is where it would have.
    """
    unet, trajectory = model.unet.requires_grad_(True), climb(model, z0, text, num_steps)
    times, alphas = levels(model, num_steps), alphas_of(model, num_steps)
    z, empty, tuned, enough = trajectory[-1], embed_captions(model, [""]), [], []
    for i, k in enumerate(reversed(range(num_steps))):
        empty = empty.clone().detach().requires_grad_()
        adam = torch.optim.Adam([empty], lr=1e-2 * (1 - i / 100))
        with torch.no_grad():
            eps_text = unet(z, times[k + 1], encoder_hidden_states=text).sample

        def down(eps, z=z, k=k, eps_text=eps_text):
            return step_down(z, eps + GUIDANCE * (eps_text - eps), alphas[k + 1], alphas[k])

        losses = []
        for _ in range(INNER):
            eps = unet(z, times[k + 1], encoder_hidden_states=empty).sample
            loss = F.mse_loss(down(eps), trajectory[k])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        small = [j for j, value in enumerate(losses, start=1) if value < 1e-5 + i * 2e-5]
        enough.append(min([*small, INNER]))
        tuned.insert(0, empty.detach())
        with torch.no_grad():  # classifier-free guidance, both captions in one call
            pair = torch.cat([z, z]), times[k + 1], torch.cat([empty, text])
            z = down(unet(*pair).sample[:1])
    unet.requires_grad_(False)
    unet.zero_grad(set_to_none=True)
    return trajectory, torch.stack(tuned), np.mean(enough)


def edit_film(model, film, source, target, num_steps):
    """One film (H, W) uint8 inverted, rebuilt and edited: both films in [0, 1], inner steps."""
    z0 = encode_films(model, film[None].astype(np.float32) / 255)
    text = embed_captions(model, [source])
    trajectory, tuned, enough = null_text(model, z0, text, num_steps)
    about = {"method": "null_text", "guidance_scale": GUIDANCE, "guidance_from": "tuned"}
    found = Inversion(["film"], [source], trajectory, uncond=tuned, **about)
    back = decode_latents(model, regenerate(model, found, text, guidance_scale=GUIDANCE))
    made = edit(model, found, film[None], [0], [target], preset="prism").films
    return back.numpy()[0], made[0], enough


@torch.no_grad()
def s_clip(scorer, film, made, source, target):
    """Eq. 1 of one edit of films (H, W) uint8: both films and both captions are embedded anew."""
    steps = []
    for picture in (film, made):
        x = to_tensor(Image.fromarray(picture).convert("RGB"))[None].to(scorer.clip.device)
        side = scorer.clip.config.vision_config.image_size
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        seen = scorer.clip.get_image_features(pixel_values=(x - scorer.mean) / scorer.std)
        steps.append(F.normalize(getattr(seen, "pooler_output", seen), dim=-1))
    words = [scorer.embed_texts([text]) for text in (source, target)]
    return F.cosine_similarity(steps[1] - steps[0], words[1] - words[0]).item()
