"""Regeneration: from noise down to films, under the old caption or a new one (paper 2.3).

`ddim_sample` walks noise down under a caption, `generate_films` does so from no film at all;
`walk_down` re-generates many edits of many films from one `Inversion`: with T' = T it returns the
film where the inversion's method is exact. Shapes: z (R, C, h, w) of R edits; cond (R, L, D).
Used by notebooks 02, 03, 04 and 06.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from prism_nb.diffusion import (
    alpha_at,
    ddim_step,
    decode_latents,
    embed_captions,
    predict_noise,
)
from prism_nb.inversion import (
    GUIDANCE_FROM,
    RANGES,
    alphas_of,
    check_range,
    guided_noise,
    levels,
    step_down,
)


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


def generate_films(model, captions, mean, num_steps=20, guidance_scale=2.0, seed=0, batch_size=16):
    """Films (N, H, W) in [0, 1] from N captions and noise alone: text to image.

    mean (C, h, w): the mean film in latent space, see Latents.mean. At its noisiest step Stable
    Diffusion still shows a film's large shapes, so the U-Net never learned to begin without any:
    sampling begins with the mean film's, noised to that step; with mean 0 films come out grey
    (Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2024, section 3.1).
    """
    alpha = float(alpha_at(model, levels(model, num_steps)[-1]))
    shape = (len(captions), *mean.shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    start = alpha**0.5 * mean.float() + (1 - alpha) ** 0.5 * noise
    empty, films = embed_captions(model, [""]), []
    for first in range(0, len(captions), batch_size):
        part = slice(first, first + batch_size)
        cond = embed_captions(model, list(captions[part]))
        z0 = ddim_sample(
            model, start[part].to(model.device), cond, num_steps, guidance_scale, empty
        )
        films.append(decode_latents(model, z0).numpy())
    return np.concatenate(films)


@dataclass
class Step:
    """Where a walk down stands. Assign `z` to steer it: a local blend, a mask."""

    level: int  # N is noise, 0 the film
    z: torch.Tensor  # (R, C, h, w), the edits at this level; float64 for bdia
    source: torch.Tensor  # (R, C, h, w), their films at this level


@torch.no_grad()
def walk_down(
    model,
    inversion,
    cond,
    rows=None,
    guidance_scale=1.0,
    guidance_from=None,
    strength=1.0,
    offsets="both",
    with_source=False,
    predict=predict_noise,
):
    """Re-generate films under new captions: yields a Step at the start and after each U-Net call.

    rows: R positions in the inversion, which may repeat; cond: their targets (R, L, D), or J
    targets for each at once (J, R, L, D). eps = base + sum_j w_j (eps_j - base): the base from
    guidance_from (by default the method's own), w from guidance_scale, a number or what broadcasts
    to (J, R). strength: share of the steps that are walked. offsets: "both", or "source" to leave
    the edits without (direct as published; T' = T is then no identity).
    predict(model, z, t, cond) runs once a step. Its rows: R of the base unless w = 1; with_source,
    one for each film of sorted(set(rows)) at its own level (for attention control); J R targets.
    """
    inversion.check(model)
    rows = list(range(len(inversion.film_ids)) if rows is None else map(int, rows))
    edits = inversion.select(rows).to(model.device)
    noise = _predictor(model, edits, cond, guidance_scale, guidance_from, predict)
    sources = [rows.index(film) for film in sorted(set(rows))] if with_source else []
    own = embed_captions(model, [edits.captions[i] for i in sources]) if sources else None
    alphas, top = alphas_of(model, edits.num_steps), _top(edits, strength, offsets)
    precise = torch.float64 if edits.gamma else torch.float32
    above = edits.trajectory[min(top + 1, edits.num_steps)].to(precise)
    step = Step(top, edits.trajectory[top].to(precise), edits.trajectory[top])
    yield step
    for k in reversed(range(top)):
        z, eps = step.z, noise(step.z, k, step.source[sources], own)
        z_to = step_down(z, eps, alphas[k + 1], alphas[k], edits.eta)
        if edits.offsets is not None and offsets == "both":
            z_to = z_to + edits.offsets[k]
        if edits.gamma:
            z_to = z_to + edits.gamma * (above - ddim_step(z, eps, alphas[k + 1], alphas[k + 2]))
        above, step = z, Step(k, z_to, edits.trajectory[k])
        yield step


def regenerate(model, inversion, cond, rows=None, **dials):
    """Walk down to the end: latents z0 (R, C, h, w) float32; the dials are walk_down's."""
    for step in walk_down(model, inversion, cond, rows, **dials):
        last = step
    return last.z.float()


def _top(inversion, strength, offsets):
    check_range("strength", strength)
    if offsets not in ("both", "source") or (offsets == "source" and inversion.eta > 0):
        raise ValueError(f"offsets is {offsets!r}; take 'both', or 'source' where eta is 0")
    top = round(strength * inversion.num_steps)
    return min(top, inversion.num_steps - 1) if inversion.gamma else top


def _predictor(model, edits, cond, guidance_scale, guidance_from, predict):
    """A function of (z, k): guided noise (R, C, h, w) at level k + 1, from one U-Net call."""
    num_edits, times = len(edits.film_ids), levels(model, edits.num_steps)
    if cond.ndim not in (3, 4) or cond.shape[-3] != num_edits:
        raise ValueError(f"cond is {tuple(cond.shape)}; give a target for each of {num_edits} rows")
    cond = cond.reshape(-1, *cond.shape[-3:])  # (J, R, L, D)
    weights = torch.as_tensor(guidance_scale, dtype=torch.float32, device=cond.device)
    if not (weights.abs() <= RANGES["guidance_scale"][1]).all():
        raise ValueError(f"guidance_scale is {guidance_scale}; it must lie from -50 to 50")
    weights = weights.broadcast_to(cond.shape[:2])[..., None, None, None]  # (J, R, 1, 1, 1)
    base = _base(model, edits, guidance_from or edits.guidance_from)  # (N or 1, R, L, D)
    alone = len(cond) == 1 and bool((weights == 1).all())

    def noise(z, k, source, own):
        start = [] if alone else [base[min(k, len(base) - 1)]]
        texts = [*start, *([] if own is None else [own]), *cond]
        latents = torch.cat([*[z for _ in start], source, *[z for _ in cond]]).float()
        eps = predict(model, latents, times[k + 1], torch.cat(texts))
        targets = eps[-len(cond) * len(z) :].view(len(cond), *z.shape)
        if alone:
            return targets[0]
        return eps[: len(z)] + (weights * (targets - eps[: len(z)])).sum(0)

    return noise


def _base(model, edits, guidance_from):
    """Embeddings (N or 1, R, L, D) from which guidance starts."""
    if guidance_from not in GUIDANCE_FROM:
        known = ", ".join(GUIDANCE_FROM)
        raise ValueError(f"guidance_from is {guidance_from!r}; it must be one of {known}")
    if guidance_from == "tuned" and edits.uncond is None:
        raise ValueError(
            "guidance_from is 'tuned', as in the preset prism, and the films were not inverted by "
            "null_text: invert them so, or give 'source' or 'empty'"
        )
    if guidance_from == "tuned":
        return edits.uncond
    empty = [""] * len(edits.captions)
    return embed_captions(model, empty if guidance_from == "empty" else edits.captions)[None]
