"""Algorithm 1: fine-tune the U-Net on films and captions; all else stays frozen (paper 2.2).

    loss = || eps_theta(z_t, t, E_T(caption)) - eps ||^2
    z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps

Training is a generator: the notebook decides what to plot. What is drawn for a film comes from
(seed, its place in the order of films) alone, so neither the number of processes nor a killed run
changes the result. Shapes: z (B, C, h, w); cond (B, L, D). Used by notebook 02, and as a program:
torchrun --nproc_per_node 2 -m prism_nb.finetune --params params/phantom.yaml
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import InitProcessGroupKwargs, is_tensorboard_available
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr

from prism_nb.checkpoints import DAMAGE, Checkpoints, newest_first, read_state
from prism_nb.cohort import CohortError, read_cohort
from prism_nb.diffusion import (
    ModelError,
    autocast,
    embed_captions,
    load_model,
    predict_noise,
    save_unet,
    token_ids,
    weights_hash,
)
from prism_nb.files import atomic_path, read_json
from prism_nb.latents import LatentError, encode_cohort, load_latents

NUM_TIMESTEPS = 1000
TRAINING, VALIDATION = 0, 1  # no draw is shared between the two
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAMW_PARTS = ("step", "exp_avg", "exp_avg_sq")
# The settings that change the weights; what else does is added in training_key.
KEY_SETTINGS = ("seed", "learning_rate", "lr_schedule", "lr_warmup_steps", "weight_decay")
KEY_SETTINGS += ("grad_clip", "caption_dropout", "min_snr_gamma", "ema_decay", "lora_rank")
KEY_SETTINGS += ("train_text_encoder",)
log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to try."""


@dataclass(frozen=True)
class Progress:
    """One update of the weights."""

    step: int
    loss: float
    grad_norm: float  # before clipping
    learning_rate: float


COLUMNS = [field.name for field in fields(Progress)]


def finetune(model, latents, rows, settings, folder=None, accelerator=None):
    """Fine-tune model.unet in place on some rows of the latents, yielding a Progress an update.

    `settings` is notebook 02's parameters; `folder` keeps checkpoints and log.csv, and training
    goes on from there: a finished one yields nothing and loads its weights. At the end model.unet
    holds the EMA weights (ema_decay 0: the last); stopped early, it is as it was given. Raises
    TrainingError when a loss is not finite.
    """
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    check_request(rows, settings, accelerator)
    key = training_key(model, latents, rows, settings)
    checkpoints, training = folder and Checkpoints(folder, key), Training(model, settings)
    try:
        tensors = checkpoints and checkpoints.load(settings.num_train_steps)
        if tensors:
            training.load(tensors)
        yield from _updates(training, latents, rows, accelerator, checkpoints)
        training.finish(latents)
    except BaseException:  # an interrupt as well, and a caller that stops early
        training.undo()
        raise
    finally:
        training.freeze()


def check_request(rows, settings, accelerator):
    """Refuse what cannot be trained as asked: no films, or another number of processes."""
    started, promised = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if started != promised:
        raise TrainingError(f"{promised} processes were promised, {started} started: use torchrun")
    if settings.train_batch_size % started:
        raise TrainingError(
            f"train_batch_size is {settings.train_batch_size} for {started} processes: "
            f"give a multiple of {started}"
        )
    if len(rows) == 0:
        raise TrainingError("no film to train on: the training split is empty, run 01_caption")


def check_equal_steps(step, accelerator):
    """Refuse to train when the processes do not go on from one checkpoint."""
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise TrainingError(
            f"the processes found checkpoints of steps {sorted(set(steps))}: "
            "give a run folder that all of them share"
        )


class Trainee(torch.nn.Module):
    """What is trained, as one module: the U-Net, and the text encoder if asked."""

    def __init__(self, model, with_text):
        """Hold the model's parts themselves, not copies."""
        super().__init__()
        self.model, self.with_text = model, with_text
        self.parts = torch.nn.ModuleList([model.unet, model.text_encoder][: 1 + with_text])

    def forward(self, noisy, t, text):
        """Predict the noise; `text` is embeddings (B, L, D), or tokens (B, L) to be encoded."""
        if self.with_text:
            with autocast(self.model):
                text = self.model.text_encoder(text)[0]  # (B, L, D)
        return predict_noise(self.model, noisy, t, text)


class Training:
    """The weights in training, and all that it takes to go on exactly: AdamW, EMA, history."""

    def __init__(self, model, settings):
        """Unfreeze what the settings train; float32 whatever the weights were loaded in."""
        self.model, self.settings, self.history = model, settings, []
        model.unet.float().requires_grad_(not settings.lora_rank)
        if settings.lora_rank:
            add_lora(model.unet, settings.lora_rank, settings.seed)
        if settings.train_text_encoder:
            model.text_encoder.float().requires_grad_(True)
        self.module = Trainee(model, settings.train_text_encoder).train()
        named = {n: w for n, w in self.module.named_parameters() if w.requires_grad}
        self.names, self.weights = list(named), list(named.values())
        self.start = [w.detach().to("cpu", copy=True) for w in self.weights]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimiser = torch.optim.AdamW(
            [{"params": self.weights, "initial_lr": rate}], lr=rate, weight_decay=decay, fused=True
        )
        self.ema = None
        if settings.ema_decay:
            self.ema = EMAModel(self.weights, decay=settings.ema_decay, foreach=True)

    @property
    def step(self):
        """Number of updates made so far."""
        return len(self.history)

    def tensors(self):
        """Everything as named tensors, for safetensors."""
        tensors = {"history": torch.tensor([astuple(p) for p in self.history]).double()}
        for i, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            tensors[f"weights.{name}"] = weight.detach()
            if self.ema:
                tensors[f"ema.{name}"] = self.ema.shadow_params[i]
            for part in ADAMW_PARTS:
                tensors[f"adamw.{part}.{name}"] = self.optimiser.state[weight][part]
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors):
        """Take back what tensors() gave."""
        self.history = [Progress(int(step), *rest) for step, *rest in tensors["history"].tolist()]
        for i, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            weight.copy_(tensors[f"weights.{name}"])
            if self.ema:
                self.ema.shadow_params[i].copy_(tensors[f"ema.{name}"])
            self.optimiser.state[weight] = {
                part: tensors[f"adamw.{part}.{name}"].to(weight.device, copy=True)
                for part in ADAMW_PARTS
            }
        if self.ema:
            self.ema.optimization_step = self.step

    def finish(self, latents):
        """Leave the averaged weights in the model; embed the captions anew if E_T was trained."""
        if self.ema:
            self.ema.copy_to(self.weights)
        if self.settings.lora_rank:
            self.model.unet.fuse_lora()
        if self.settings.train_text_encoder:
            self.model.own_text_encoder = True
            latents.text = embed_captions(self.model, latents.captions).cpu()

    @torch.no_grad()
    def undo(self):
        """Take the weights back to where they were, so that a second call starts from there."""
        for weight, start in zip(self.weights, self.start, strict=True):
            weight.copy_(start)

    def freeze(self):
        """Make the model plain and frozen again; LoRA that finish() did not fuse is dropped."""
        if self.settings.lora_rank:
            self.model.unet.unload_lora()
        self.module.requires_grad_(False).eval()


def add_lora(unet, rank, seed):
    """Add trainable low-rank matrices to every attention layer; their start comes from the seed."""
    if importlib.util.find_spec("peft") is None:
        raise TrainingError(f"lora_rank is {rank}, which needs peft: pip install 'prism_nb[lora]'")
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS))


def _updates(training, latents, rows, accelerator, checkpoints):
    """Make the updates that are left, keep checkpoints, and assert that each film has its turn."""
    settings, first = training.settings, training.step
    check_equal_steps(first, accelerator)
    record = tracker(settings.tracker, checkpoints, training.history, accelerator)
    schedule, module = rate_schedule(training), accelerator.prepare_model(training.module)
    text = latents.text  # what the number of a caption stands for: embeddings, or tokens
    if settings.train_text_encoder:
        text = token_ids(training.model, latents.captions).cpu()
    seen = torch.zeros(len(latents), dtype=torch.int64)
    while training.step < settings.num_train_steps:
        parts = own_positions(training.step, settings, accelerator)  # (accumulation, share)
        progress = update(training, module, latents, rows, text, parts, accelerator)
        schedule.step()
        training.history.append(progress)
        chosen = torch.from_numpy(epoch_rows(rows, parts.ravel(), settings.seed))
        seen.index_add_(0, chosen, torch.ones_like(chosen))
        record(progress)
        due = training.step % settings.checkpoint_every == 0
        due |= training.step == settings.num_train_steps
        if checkpoints and due and accelerator.is_main_process:
            checkpoints.save(training.step, training.tensors())
        yield progress
    check_seen(accelerator.reduce(seen.to(accelerator.device)).cpu()[rows], training, first)


def update(training, module, latents, rows, text, parts, accelerator):
    """One update of the weights from some micro-batches, each given as positions of its films."""
    settings, model, losses = training.settings, training.model, []
    for number, positions in enumerate(parts, start=1):
        noisy, t, captions, noise = batch(model, latents, rows, positions, settings)
        weight = snr_weights(model.scheduler, t, settings.min_snr_gamma)
        inputs = [x.to(accelerator.device) for x in (noisy, t, text[captions], noise, weight)]
        last = number == len(parts)  # gradients of the processes meet once an update
        with nullcontext() if last else accelerator.no_sync(module):
            loss = noise_loss(module, *inputs)
            (loss / len(parts)).backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(training.weights, settings.grad_clip)
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    loss, norm = torch.stack([loss, norm]).tolist()  # the one wait for the device
    check_finite(loss, norm, training.step)
    rate = training.optimiser.param_groups[0]["lr"]
    training.optimiser.step()
    training.optimiser.zero_grad(set_to_none=True)
    if training.ema:
        training.ema.step(training.weights)
    return Progress(training.step, loss, norm, rate)


def check_finite(loss, norm, step):
    """Stop before the weights are spoilt; the last checkpoint stays as it is."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"loss is {loss}, gradient norm {norm} at step {step}: lower learning_rate or use "
            "precision fp32; the last checkpoint is kept"
        )


def noise_loss(module, noisy, t, text, noise, weight):
    """Squared error between predicted and true noise, as in Algorithm 1; weight (B,) is 1 there."""
    error = (module(noisy, t, text) - noise).square().mean(dim=(1, 2, 3))  # (B,)
    return (error * weight).mean()


def snr_weights(scheduler, t, gamma):
    """Weights min(SNR, gamma) / SNR of timesteps (B,) (Hang 2023); all 1 at gamma 0."""
    if not gamma:
        return torch.ones(len(t))
    snr = compute_snr(scheduler, t)
    return snr.clamp(max=gamma) / snr


def rate_schedule(training):
    """diffusers' schedule of the learning rate, at the step where training stands."""
    settings = training.settings
    names = {"constant": "constant_with_warmup", "cosine": "cosine"}
    return get_scheduler(
        names[settings.lr_schedule],
        training.optimiser,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.num_train_steps,
        last_epoch=training.step - 1,
    )


def own_positions(step, settings, accelerator):
    """This process's films of an update (accumulation, share), as places in the endless order."""
    size = settings.train_batch_size
    micro = np.arange(settings.accumulation) + step * settings.accumulation
    share = np.arange(size).reshape(accelerator.num_processes, -1)[accelerator.process_index]
    return micro[:, None] * size + share


def batch(model, latents, rows, positions, settings):
    """Noisy latents, timesteps, caption numbers and noise of the films at some positions."""
    chosen = epoch_rows(rows, positions, settings.seed)
    mean, std = latents.gather(chosen)
    spread, noise, t, chance = draws(settings.seed, positions, mean.shape[1:])
    noisy = model.scheduler.add_noise(mean + std * spread, noise, t)  # spread makes it float32
    captions = torch.from_numpy(latents.caption_index[chosen])
    captions[chance < settings.caption_dropout] = len(latents.captions) - 1  # the empty one
    return noisy, t, captions, noise


def draws(seed, positions, shape):
    """Posterior sample and noise (B, *shape), timestep (B,) and chance (B,) of some positions.

    Each position has its own stream, so the company that a film is drawn in does not matter.
    """
    streams = [stream(seed, TRAINING, position) for position in positions]
    t = torch.stack([torch.randint(NUM_TIMESTEPS, (), generator=each) for each in streams])
    chance = torch.stack([torch.rand((), generator=each) for each in streams])
    normal = torch.stack([torch.randn((2, *shape), generator=each) for each in streams], dim=1)
    return *normal, t, chance


def stream(*key):
    """A generator of its own for some whole numbers, which may stand close together."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def epoch_rows(rows, positions, seed):
    """Rows at some positions: every film once an epoch, in an order decided by (seed, epoch)."""
    epochs, places = np.divmod(positions, len(rows))
    order = {e: _order(len(rows), seed, int(e)) for e in np.unique(epochs)}
    return np.asarray(rows)[[order[e][p] for e, p in zip(epochs, places, strict=True)]]


@lru_cache(maxsize=2)
def _order(num_films, seed, epoch):
    return np.random.default_rng([seed, 77, epoch]).permutation(num_films)


def check_seen(seen, training, first):
    """Assert that every film was seen once an epoch between two updates, over all processes."""
    films = training.settings.train_batch_size * training.settings.accumulation
    start, end, num = first * films, training.step * films, len(seen)
    whole, touched = end // num - -(-start // num), -(-end // num) - start // num
    fair = max(whole, 0) <= seen.min() and seen.max() <= touched and seen.sum() == end - start
    if not fair:
        raise TrainingError(
            f"films were seen {seen.min()} to {seen.max()} times in {whole} to {touched} epochs: "
            "the processes do not share one order; check that they were given the same films"
        )


def training_key(model, latents, rows, settings):
    """Digest of everything that decides the weights after some number of updates."""
    key = {name: getattr(settings, name) for name in KEY_SETTINGS}
    key["films_per_update"] = settings.train_batch_size * settings.accumulation
    if settings.lr_schedule != "constant":
        key["num_train_steps"] = settings.num_train_steps
    key |= {"unet": weights_hash(model.unet), "dtype": str(model.dtype), "latents": latents.key}
    key["films"] = [latents.film_ids[row] for row in rows]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def history(folder, last_step=None):
    """Loss, gradient norm and learning rate of every step so far, from the newest checkpoint.

    last_step: of the training that is meant; a longer one may have left checkpoints beyond it.
    """
    for path in newest_first(folder):
        try:
            if last_step and read_json(path / "checkpoint.json")["step"] > last_step:
                continue
            steps = read_state(path)["history"].numpy()
        except DAMAGE:
            continue
        return pd.DataFrame(steps, columns=COLUMNS).astype({"step": int})
    raise FileNotFoundError(f"{folder} holds no checkpoint: run finetune with this folder first")


def tracker(kind, checkpoints, steps, accelerator):
    """A function that records a Progress: in log.csv, for TensorBoard, or nowhere."""
    if kind == "tensorboard" and not is_tensorboard_available():
        raise TrainingError("tracker is tensorboard: pip install tensorboard, or use csv")
    if kind == "none" or not checkpoints or not accelerator.is_main_process:
        return lambda progress: None
    if kind == "tensorboard":
        board = TensorBoardTracker("tensorboard", checkpoints.folder, purge_step=len(steps))
        board.start()
        return lambda progress: board.log(asdict(progress), step=progress.step)
    path = checkpoints.folder / "log.csv"
    with atomic_path(path) as partial:  # lines beyond the checkpoint would be written twice
        pd.DataFrame(steps, columns=COLUMNS).to_csv(partial, index=False)
    options = {"mode": "a", "header": False, "index": False}
    return lambda progress: pd.DataFrame([progress]).to_csv(path, **options)


def validation_levels(num_timesteps=8):
    """Timesteps at the middle of equal buckets of the noise schedule."""
    return ((np.arange(num_timesteps) + 0.5) * NUM_TIMESTEPS / num_timesteps).astype(int)


@torch.no_grad()
def validation_loss(model, latents, rows, seed=0, num_timesteps=8, batch_size=16):
    """Noise-prediction error by film and timestep bucket (len(rows), num_timesteps).

    A film meets the same noise at a level whatever the batch and the U-Net, so two U-Nets are
    compared on equal terms, film by film.
    """
    errors, moving = [], any(w.requires_grad for w in model.text_encoder.parameters())
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        mean, cond = latents.gather(part)[0].float(), latents.cond(part)
        if moving:  # it is in training, and what it gave before is out of date
            words = [latents.captions[i] for i in latents.caption_index[part]]
            cond = embed_captions(model, words, warn=False)
        cond = cond.to(model.device)
        columns = []
        for level in validation_levels(num_timesteps).tolist():
            streams = [stream(seed, VALIDATION, row, level) for row in part]
            noise = torch.stack([torch.randn(mean.shape[1:], generator=s) for s in streams])
            t = torch.full((len(part),), level)
            noisy = model.scheduler.add_noise(mean, noise, t)
            eps = predict_noise(model, noisy.to(model.device), t.to(model.device), cond)
            columns.append((eps - noise.to(model.device)).square().mean(dim=(1, 2, 3)))
        errors.append(torch.stack(columns, dim=1))  # (B, num_timesteps)
    return torch.cat(errors).cpu().numpy()


def main(arguments=None):
    """Fine-tune for a run folder as notebook 02 does, in every process that torchrun starts."""
    from prism_nb.execute import prepare
    from prism_nb.params import ParamError, for_notebook
    from prism_nb.run import Run, RunFolderError

    parser = argparse.ArgumentParser(prog="python -m prism_nb.finetune", description=main.__doc__)
    parser.add_argument("--params", type=Path, required=True, help="a profile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--num-processes", type=int, help="stop unless so many were started")
    options = parser.parse_args(arguments)
    known = (TrainingError, ModelError, LatentError, CohortError, ParamError, RunFolderError)
    try:
        job = prepare(options.params, settings=tuple(options.set))
        run = Run("02_finetune", for_notebook(job.values, "02_finetune"))
        train_run(run, options.num_processes)
    except (*known, OSError) as error:
        sys.exit(f"finetune: {error}")


def train_run(run, num_processes=None):
    """Cohort, latents, training, model, in the order of notebook 02."""
    p, patience = run.params, timedelta(days=1)  # the others wait while one encodes
    accelerator = Accelerator(
        cpu=run.device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)]
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel("INFO" if accelerator.is_main_process else "ERROR")
    if num_processes not in (None, accelerator.num_processes):
        raise TrainingError(
            f"{num_processes} processes were promised, {accelerator.num_processes} started: "
            f"torchrun --nproc_per_node {num_processes} starts them"
        )
    cohort, folder = read_cohort(run.need("cohort.parquet").parent), run.folder / "latents"
    device = str(accelerator.device)
    model = load_model(p.base_model, p.revision, p.unet_weights, device, p.precision)
    if accelerator.is_main_process:
        size, fit = cohort.settings["image_size"], cohort.settings["fit"]
        encode_cohort(model, cohort.table, cohort.image_root, size, fit, folder)
    accelerator.wait_for_everyone()
    latents = load_latents(folder)
    rows = latents.rows(cohort.table.loc[cohort.table["split"] == "train", "film_id"])
    started = time.monotonic()
    steps = finetune(model, latents, rows, p, run.folder / "training", accelerator)
    for done, progress in enumerate(steps, start=1):
        if done % 10 == 0 or progress.step == p.num_train_steps - 1:
            log_progress(progress, p, (time.monotonic() - started) / done)
    if accelerator.is_main_process:
        save_unet(model, run.folder / "model")
    accelerator.end_training()


def log_progress(progress, settings, seconds):
    """Say where training stands; `seconds` is the time of one update."""
    step, num_steps = progress.step + 1, settings.num_train_steps
    films = settings.train_batch_size * settings.accumulation / seconds
    left = (num_steps - step) * seconds / 60
    said = f"loss {progress.loss:.4f}, {films:.1f} films/s, {left:.1f} min left"
    log.info("step %d of %d: %s", step, num_steps, said)


if __name__ == "__main__":
    main()
