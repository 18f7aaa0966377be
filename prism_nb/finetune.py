"""Algorithm 1: fine-tune the U-Net on films and captions; all else stays frozen (paper 2.2).

    loss = || eps_theta(z_t, t, E_T(caption)) - eps ||^2
    z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps

Training is a generator: the notebook decides what to plot and when to stop. Noise, timesteps and
dropped captions of a step come from (seed, step) alone. Shapes: z (B, C, h, w); cond (B, L, D).
Used by notebook 02.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from prism_nb.diffusion import predict_noise

NUM_TIMESTEPS = 1000


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to try."""


@dataclass(frozen=True)
class Progress:
    """One step of training."""

    step: int
    loss: float
    grad_norm: float


def finetune(model, latents, rows, settings):
    """Fine-tune model.unet in place on some rows of the latents, yielding a Progress a step.

    `settings` is notebook 02's parameters. At the end model.unet holds the EMA weights (ema_decay
    0: the last). Raises TrainingError when a loss is not finite.
    """
    model.unet.requires_grad_(True).train()
    weights = list(model.unet.parameters())
    optimiser = torch.optim.AdamW(
        weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    ema = EMAModel(weights, decay=settings.ema_decay) if settings.ema_decay else None
    for step in range(settings.num_train_steps):
        total = 0.0
        for part in range(settings.accumulation):
            micro = step * settings.accumulation + part
            loss = noise_loss(model, *batch(model, latents, rows, micro, settings))
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"loss is {loss.item()} at step {step}: lower learning_rate or use fp32"
                )
            (loss / settings.accumulation).backward()
            total += loss.item() / settings.accumulation
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.grad_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if ema:
            ema.step(weights)
        yield Progress(step, total, float(norm))
    if ema:
        ema.copy_to(weights)
    model.unet.requires_grad_(False).eval()


def batch(model, latents, rows, micro, settings):
    """Noisy latents, timesteps, embeddings and noise, decided by (seed, micro) alone."""
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([settings.seed, micro]).generate_state(1)[0])
    )
    chosen = epoch_rows(rows, micro, settings.train_batch_size, settings.seed)
    z0 = latents.sample(chosen, generator)
    noise = torch.randn(z0.shape, generator=generator)
    t = torch.randint(0, NUM_TIMESTEPS, (len(chosen),), generator=generator)
    index = latents.caption_index[chosen].copy()
    dropped = torch.rand(len(chosen), generator=generator) < settings.caption_dropout
    index[dropped.numpy()] = len(latents.captions) - 1  # the empty caption
    noisy = model.scheduler.add_noise(z0, noise, t)
    return [x.to(model.device) for x in (noisy, t, latents.text[index], noise)]


def epoch_rows(rows, micro, batch_size, seed):
    """Rows of one micro-batch: every film once an epoch, in an order decided by (seed, epoch)."""
    wanted = np.arange(micro * batch_size, (micro + 1) * batch_size)
    orders = {
        e: np.random.default_rng([seed, 77, e]).permutation(rows)
        for e in np.unique(wanted // len(rows))
    }
    return np.array([orders[n // len(rows)][n % len(rows)] for n in wanted])


def noise_loss(model, noisy, t, cond, noise):
    """Mean squared error between predicted and true noise, as in Algorithm 1."""
    return F.mse_loss(predict_noise(model, noisy, t, cond), noise)


@torch.no_grad()
def validation_loss(model, latents, rows, seed=0, num_timesteps=8, batch_size=16):
    """Noise-prediction error per film (len(rows),), at fixed noise and evenly spaced timesteps.

    The same arguments draw the same noise, so two U-Nets are compared on equal terms.
    """
    levels = np.linspace(0, NUM_TIMESTEPS - 1, num_timesteps + 2)[1:-1].astype(int)
    errors = torch.zeros(len(rows))
    for level in levels:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            generator = torch.Generator().manual_seed(
                seed * NUM_TIMESTEPS + int(level) + 1_000_000 * start
            )
            noise = torch.randn(latents.mean[part].shape, generator=generator)
            t = torch.full((len(part),), int(level))
            noisy = model.scheduler.add_noise(latents.mean[part], noise, t)
            eps = predict_noise(
                model,
                noisy.to(model.device),
                t.to(model.device),
                latents.cond(part).to(model.device),
            )
            errors[start : start + len(part)] += (eps.cpu() - noise).square().mean(dim=(1, 2, 3))
    return (errors / len(levels)).numpy()
