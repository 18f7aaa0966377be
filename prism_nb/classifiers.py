"""Classifiers: which findings does a film show? (section 3.2: the judge; Table 3: the pupil)

fit trains, fit_temperature calibrates, score_heads says how good it is; networks.py has the
classifier itself. N films, uint8 (N, H, W) with H = W; K heads; labels float (N, K) with
1 present, 0 absent, NaN missing: a missing label counts neither in the loss nor in the scores.
A small network with a few hundred films trains in seconds on two cores; the same code takes
efficientnet_b0 with ImageNet weights at 512 pixels on a GPU.
Used by notebooks 05 and 06.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from prism_nb.metrics import patient_codes, percentile_bounds, ratio, resample_patients
from prism_nb.networks import (
    Classifier,
    ClassifierError,
    build_classifier,
    check_films,
    check_judge,
    features_of,
    film_keys,
    load_classifier,
    logits_of,
    predict,
    refresh_norms,
    save_classifier,
)

__all__ = [
    "Classifier",
    "ClassifierError",
    "Epoch",
    "build_classifier",
    "check_judge",
    "features_of",
    "film_keys",
    "fit",
    "fit_temperature",
    "jitter",
    "load_classifier",
    "logits_of",
    "masked_loss",
    "one_sided",
    "predict",
    "save_classifier",
    "score_heads",
]

log = logging.getLogger(__name__)

NUM_BINS = 15  # of the calibration error
SCORES = ("accuracy", "balanced_accuracy", "auroc", "auprc", "ece")


@dataclass
class Epoch:
    """One pass of training; `best`: these weights have the lowest validation loss so far."""

    epoch: int
    step: int
    loss: float
    val_loss: float
    val_auroc: float
    best: bool


def fit(
    model,
    images,
    labels,
    val_images,
    val_labels,
    epochs=8,
    batch_size=16,
    learning_rate=5e-3,
    seed=0,
    weight_decay=0.05,
    patience=None,
    num_steps=None,
    device="cpu",
    augment=False,
    on_bad="stop",
):
    """Train a classifier, yielding an Epoch after each; at the end the best weights are back.

    Best: lowest validation loss (without known validation labels, the last). num_steps: optimiser
    steps in all, cut into `epochs` validations, whatever the number of films (Table 3's arms);
    without it an epoch sees each film once. patience: stop after so many epochs without a
    better one. augment: shift, turn, scale and brighten films a little (no mirroring: the heart
    is on the left). AdamW with warm-up and cosine decay; the same seed gives the same weights.
    A head with one class only learns to say it: `one_sided` names such heads.
    on_bad: when the loss is no number, "stop" with the best weights so far, or "raise".
    Raises ClassifierError for unusable films or labels, and for a loss that never was a number.
    """
    images, labels = _check_set(model, images, labels)
    val_images, val_labels = _check_set(model, val_images, val_labels)
    if len(images) < 2 or batch_size < 2:
        raise ClassifierError(
            f"{len(images)} films in batches of {batch_size}; at least 2 of each are needed."
        )
    model.temperature, model.image_size = 1.0, images.shape[1]
    model.to(device)
    steps = num_steps or epochs * math.ceil(len(images) / batch_size)
    epochs = min(epochs, steps)
    optimizer, schedule = _optimizer(model, learning_rate, weight_decay, steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(images), min(batch_size, len(images)), generator)
    best, best_epoch, lowest, step = None, 0, math.inf, 0
    try:
        for epoch in range(1, epochs + 1):
            until = steps * epoch // epochs
            todo = [next(batches) for _ in range(until - step)]
            step = until
            loss = _train(model, images, labels, todo, optimizer, schedule, generator, augment)
            refresh_norms(model, images, seed)
            val_loss, val_auroc = _validate(model, val_images, val_labels)
            if not math.isfinite(loss) or math.isinf(val_loss):
                _bad_loss(loss, step, steps, learning_rate, best is not None, on_bad)
                return
            better = math.isnan(val_loss) or val_loss < lowest
            if better:
                lowest, best_epoch = val_loss, epoch
                best = {key: value.clone() for key, value in model.state_dict().items()}
            yield Epoch(epoch, step, loss, val_loss, val_auroc, better)
            if patience and epoch - best_epoch >= patience:
                return
    finally:  # also when the reader of the generator stops early
        if best is not None:
            model.load_state_dict(best)
        model.eval()


def _optimizer(model, learning_rate, weight_decay, steps):
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(model, weight_decay)  # none on norms and biases
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    warm_up = max(1, steps // 10)

    def scale(step):
        return min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def _batches(count, size, generator):
    """Yield (size,) indices without end: one shuffle of all films after another."""
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:size].numpy()
        rest = rest[size:]


def _train(model, images, labels, batches, optimizer, schedule, generator, augment):
    """Take one optimiser step a batch; returns the mean loss."""
    model.train()
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # for dropout
        for index in batches:
            films = torch.from_numpy(images[index]).to(device)  # (B, H, W) uint8
            films = jitter(films, generator) if augment else films
            loss = masked_loss(model(films), torch.from_numpy(labels[index]).to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
    return (total / max(1, len(batches))).item()


def masked_loss(logits, labels):
    """Mean binary cross-entropy over the labels that are known (0 where none is); both (B, K)."""
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def jitter(films, generator):
    """Move, turn (5 degrees), scale (5 %) and brighten (10 %) films at random.

    uint8 (B, H, W) in, float (B, H, W) in [0, 1] out; draws come from a CPU generator.
    """
    draw = (torch.rand(5, len(films), generator=generator) * 2 - 1).to(films.device)  # [-1, 1]
    angle, scale = draw[0] * math.radians(5), 1 + 0.05 * draw[1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, 0.06 * draw[2]]), torch.stack([sin, cos, 0.06 * draw[3]])]
    grid = F.affine_grid(
        torch.stack(rows).permute(2, 0, 1), [len(films), 1, *films.shape[1:]], align_corners=False
    )
    moved = F.grid_sample(
        films[:, None].float() / 255, grid, padding_mode="border", align_corners=False
    )
    return (moved[:, 0] * (1 + 0.1 * draw[4])[:, None, None]).clamp(0, 1)


def _validate(model, images, labels):
    """Validation loss (NaN without known labels, infinite if not a number) and mean AUROC."""
    logits = torch.from_numpy(logits_of(model, images))
    known = torch.from_numpy(labels)
    if known.isnan().all():
        return math.nan, math.nan
    loss = masked_loss(logits, known).item()
    if not math.isfinite(loss):
        return math.inf, math.nan
    scores = [_auroc(y, p) for y, p in zip(labels.T, logits.sigmoid().numpy().T, strict=True)]
    defined = [score for score in scores if not math.isnan(score)]
    return loss, float(np.mean(defined)) if defined else math.nan


def _bad_loss(loss, step, steps, learning_rate, has_best, on_bad):
    text = (
        f"the loss is {loss} after step {step} of {steps}; lower the learning rate "
        f"({learning_rate:g})."
    )
    if on_bad == "raise" or not has_best:
        raise ClassifierError(text)
    log.warning("Training stopped with the best weights so far: %s", text)


def _check_set(model, images, labels):
    images = check_films(images, model)
    return images, check_labels(labels, (len(images), model.num_heads))


def check_labels(labels, shape):
    """Labels as float32 (N, K), once they are 1, 0 or NaN; raises ClassifierError."""
    labels = np.asarray(labels, dtype=np.float32)
    if labels.shape != shape:
        raise ClassifierError(f"labels have shape {labels.shape}; films and heads need {shape}.")
    if not (np.isin(labels, (0, 1)) | np.isnan(labels)).all():
        raise ClassifierError(
            "labels must be 1, 0 or NaN (missing); resolve uncertain ones with "
            "findings.resolve_labels."
        )
    return labels


def fit_temperature(model, images, labels):
    """Divide the logits by the number that makes validation films most likely, and return it.

    Changes how sure the classifier is (ECE), never what it prefers (accuracy, AUROC).
    """
    from scipy.optimize import minimize_scalar

    images, labels = _check_set(model, images, labels)
    model.temperature = 1.0
    logits, known = torch.from_numpy(logits_of(model, images)), torch.from_numpy(labels)
    if not known.isnan().all():
        found = minimize_scalar(
            lambda log_t: masked_loss(logits / math.exp(log_t), known).item(),
            bounds=(math.log(0.25), math.log(10)),
            method="bounded",
        )
        model.temperature = math.exp(found.x)
    return model.temperature


def one_sided(labels, heads, split):
    """A line for each head that a split knows in one class only: nothing is learned or told there.

    labels (N, K), NaN where missing; heads: K names; split: its name.
    """
    lines = []
    for head, column in zip(heads, np.asarray(labels, float).T, strict=True):
        known = column[~np.isnan(column)]
        if len(np.unique(known)) < 2:
            all_of_them = f"all {len(known)} labels are {known[0]:g}" if len(known) else "no label"
            lines.append(f"{head} has one class in the {split} split ({all_of_them}): no AUROC")
    return lines


def score_heads(labels, probabilities, patients, heads, num_bootstrap=1000, seed=0, level=0.95):
    """Score every head: one row each, each score with an interval by patient.

    labels (N, K), NaN left out; probabilities (N, K); patients (N,). Columns: head, n, positives,
    majority (the accuracy of always giving the commoner answer), and for each of SCORES its value
    and `_low`, `_high`. Calibration error ece: |share present - mean probability| over 15 bins.
    Raises ClassifierError for shapes that differ; what one class alone leaves undefined is NaN.
    """
    labels = np.asarray(labels, dtype=np.float32)
    probabilities, patients = np.asarray(probabilities), np.asarray(patients, dtype=object)
    shape = (len(patients), len(heads))
    if labels.shape != shape or probabilities.shape != shape:
        raise ClassifierError(
            f"labels {labels.shape} and probabilities {probabilities.shape} do not fit "
            f"{len(patients)} patients and {len(heads)} heads; all must be {shape}."
        )
    check_labels(labels, shape)
    rows = []
    for column, head in enumerate(heads):
        known = ~np.isnan(labels[:, column])
        sample = labels[known, column], probabilities[known, column], patients[known]
        rows.append({"head": head} | _score(*sample, num_bootstrap, seed, level))
    return pd.DataFrame(rows)


def _score(labels, probabilities, patients, num_bootstrap, seed, level):
    """One head's row, from the labels that are known."""
    rate = labels.mean() if len(labels) else np.nan
    row = {"n": len(labels), "positives": int(labels.sum()), "majority": max(rate, 1 - rate)}
    codes = patient_codes(patients)
    whole = weighted_scores(labels, probabilities, np.ones((1, len(labels))))
    draws = [
        weighted_scores(labels, probabilities, counts[:, codes])
        for counts in resample_patients(len(np.unique(codes)), num_bootstrap, seed)
    ]
    for name in SCORES:
        low, high = percentile_bounds([draw[name] for draw in draws], level)
        row |= {name: whole[name][0], f"{name}_low": low, f"{name}_high": high}
    return row


def weighted_scores(labels, probabilities, weights):
    """SCORES of films that count `weights` times: labels (N,), weights (R, N), each score (R,).

    One sort serves all resamples. NaN where a score needs both classes and one has no weight.
    """
    if len(labels) == 0:
        return dict.fromkeys(SCORES, np.full(len(weights), np.nan))
    order = np.argsort(-probabilities, kind="stable")
    y, p, weights = labels[order], probabilities[order], weights[:, order]
    positive, right = y == 1, (p >= 0.5) == y
    starts = np.flatnonzero(np.diff(p, prepend=2.0))  # ties share a place
    shown, hits = (np.add.reduceat(weights * x, starts, axis=1) for x in (1, positive))  # (R, P)
    misses, total = shown - hits, weights.sum(axis=1)
    present, absent = hits.sum(axis=1), misses.sum(axis=1)
    won = (hits * (absent[:, None] - misses.cumsum(axis=1) + misses / 2)).sum(axis=1)
    precision = np.nan_to_num(ratio(hits.cumsum(axis=1), shown.cumsum(axis=1)))
    recalls = weights @ (right & positive) * absent + weights @ (right & ~positive) * present
    bins = np.eye(NUM_BINS)[np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)]  # (N, 15)
    return {
        "accuracy": ratio(weights @ right, total),
        "balanced_accuracy": ratio(recalls / 2, present * absent),
        "auroc": ratio(won, present * absent),
        "auprc": ratio((hits * precision).sum(axis=1) * absent, present * absent),
        "ece": ratio(np.abs((weights * (y - p)) @ bins).sum(axis=1), total),
    }


def _auroc(labels, probabilities):
    """AUROC of the labels that are known, NaN with one class only."""
    known = ~np.isnan(labels)
    ones = np.ones((1, known.sum()))
    return float(weighted_scores(labels[known], probabilities[known], ones)["auroc"][0])
