"""W4 and W5: a training step (Algorithm 1), against the released code's and with checkpointing."""

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.data import same_latents
from benchmarks.paired import GateError, Row, check
from benchmarks.peers.prism import Loop
from prism_nb.diffusion import predict_noise
from prism_nb.finetune import finetune
from prism_nb.params import validate


def updates(model, latents, precision, batch):
    """A call that makes one update from a batch of films, as 02_finetune does."""
    wanted = {"num_train_steps": 10_000, "train_batch_size": batch}
    settings = validate("02_finetune", wanted | {"precision": precision})
    model.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    steps = finetune(model, latents, np.arange(len(latents)), settings)
    return lambda: next(steps)


@torch.no_grad()
def loss_of(model, latents, dtype):
    """The loss of some films at one timestep and noise, in a precision."""
    rows, model.dtype = np.arange(min(8, len(latents))), dtype
    z0, text = latents.gather(rows)[0].float().to(model.device), latents.cond(rows)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0)
    noisy = model.scheduler.add_noise(z0, noise, torch.full((len(rows),), 400, device=z0.device))
    return F.mse_loss(predict_noise(model, noisy, 400, text.to(z0)), noise).item()


def step(case):
    """W4: one update of the U-Net's weights."""
    half, about = torch.bfloat16 if case.gpu else torch.float32, (case.scale.size, case.scale.batch)
    mine, loops = case.load(half), {"PRISM's loop": Loop(case.load(), case.table, *about)}
    if case.gpu:
        loops["diffusers' loop, no workers"] = Loop(case.load(half), case.table, *about)
    latents, targets = case.latents(mine), dict(zip(loops, ((2.0, 2.5), (None, 3.0)), strict=False))
    exact, rounded = (loss_of(mine, latents, kind) for kind in (torch.float32, torch.bfloat16))
    gate = same_latents(case, loops["PRISM's loop"], latents)
    gate.append(check("loss in bf16, relative", abs(rounded / exact - 1), 0.03))
    size = case.scale.batch
    kinds = [("bf16", size), ("fp32", size)][: 1 + (not case.brief)]
    if case.gpu:  # as it comes at several batches, then compiled
        kinds = [("bf16", batch) for batch in (max(1, size // 4), size, 2 * size)]
        kinds.append(("bf16, compiled", size))
    for kind, batch in kinds:
        precision, _, made = kind.partition(", ")
        ours, bf16 = updates(mine, latents, precision, batch), precision == "bf16"
        what = f"a training step of {batch}, {precision}"
        what += case.compiled(mine.unet, ours) if made else ""
        for name, loop in loops.items():
            loop.batch, target = batch, targets[name] if made or not case.gpu else (None, None)
            peer = name, loop.step, gate, target if bf16 else (None, None), "a step"
            try:
                yield case.time("W4", what, ours, *peer, bf16=bf16)
            except torch.OutOfMemoryError:
                yield Row("W4", what, name, refused="more memory than this GPU has")


def checkpointing(case):
    """W5: the same step without and with gradient checkpointing, which small memories need."""
    mine, theirs = case.load(), case.load()
    latents = case.latents(mine)
    theirs.unet.enable_gradient_checkpointing()
    ours, peer = (updates(model, latents, "bf16", case.scale.batch) for model in (mine, theirs))
    if not theirs.unet.is_gradient_checkpointing:
        raise GateError("the peer does not checkpoint")
    gate = [check("loss, relative", abs(ours().loss / peer().loss - 1), 1e-3)]
    what, about = f"a training step of {case.scale.batch}, all kept", ((None, 1.25), "a step")
    yield case.time("W5", what, ours, "the same, checkpointed", peer, gate, *about, bf16=True)
