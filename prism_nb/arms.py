"""Arms: training sets that differ in one thing, at equal budget, and their training (Table 3).

An arm is the real films of the training split, as many extra ones as every other arm has, and the
same number of steps: a gain is then not the gain of having more. A trained arm is written as soon
as it ends, with a key that is a digest of its films, recipe and code: a run that was cut short, or
repeated, trains only what is missing. N films uint8 (N, H, W), labels float (N, K), NaN: missing.
Used by notebook 06; study.py says what came out.
"""

import ast
import hashlib
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from prism_nb.checkpoints import DAMAGE
from prism_nb.classifiers import build_classifier, fit, predict, save_classifier
from prism_nb.files import atomic_path, read_json, sha256_file
from prism_nb.findings import nearest
from prism_nb.networks import CARD_FILE, refresh_norms, weights_file

ARMS = {
    "plain": "the real films alone, for as many steps",
    "duplicates": "real films again: more films, nothing new",
    "standard_augmentation": "the same, each time moved, turned, scaled and brightened a little",
    "text_to_image": "films generated from noise under the counterfactuals' captions",
    "gan_counterfactuals": "GANterfactual's device edits of the same films",
    "counterfactuals": "the counterfactuals that 04_edit made, all of them",
    "counterfactuals_filtered": "those alone that pass the S_CLIP filter, repeated to the budget",
    "true_counterfactuals": "the same edits rendered: the ceiling, on the phantom alone",
    "group_balanced": "real films, the four groups drawn evenly",
    "group_dro": "the same, weighted towards the group with the highest loss",
}
BALANCED = ("group_balanced", "group_dro")
AGAIN = ("duplicates", "standard_augmentation")
DRO_STEP, DRO_DECAY = 0.01, 1.0  # Sagawa 2020: step of the groups' weights; strong weight decay
PROBABILITIES_FILE = "probabilities.safetensors"
NO_COUNTERFACTUALS = (
    "there are no counterfactuals of training films: raise num_train_films in 03_invert and name "
    "edits in 04_edit that those films can take."
)


class AugmentError(ValueError):
    """An arm that cannot be built, or a comparison that would not be fair."""


def group_of(labels, columns):
    """The group (N,) that a film's labels of two findings put it in, 0 to 3; -1 where one is NaN.

    columns: (effusion, device): 0 neither, 1 the device alone, 2 the effusion alone, 3 both.
    """
    first, second = (np.asarray(labels, dtype=float)[:, column] for column in columns)
    known = ~np.isnan(first) & ~np.isnan(second)
    return np.where(known, 2 * (first == 1) + (second == 1), -1).astype(int)


def budget_of(extra, wanted=0):
    """How many films each arm adds: `wanted`, or (0) as many as there are counterfactuals."""
    there = len(extra["counterfactuals"][0]) if "counterfactuals" in extra else 0
    if not there:
        raise AugmentError(NO_COUNTERFACTUALS)
    if wanted > there:
        raise AugmentError(
            f"augment_budget is {wanted} and there are {there} counterfactuals: lower it, or raise "
            "num_train_films in 03_invert."
        )
    return wanted or there


def build_arm(name, images, labels, budget, extra=None, groups=None, seed=0):
    """Make one arm's training set: (images, labels).

    budget: films to add; an arm with fewer of its own repeats them, one with more leaves some out.
    extra: {arm: (images, labels)}. groups (N,): of the real films, for the balanced arms.
    Raises AugmentError for an unknown arm, one without films, an empty group, and films that do
    not match.
    """
    if name not in ARMS:
        raise AugmentError(f"arm {name!r} is not known; the nearest is {nearest(name, ARMS)!r}.")
    images, labels = _films("real films", images, labels)
    if len(images) == 0:
        raise AugmentError("there are no real films; give the films of the training split.")
    if name == "plain":
        return images, labels
    if name in BALANCED:
        rows = _evenly(name, groups, len(images) + budget, seed)
        return images[rows], labels[rows]
    source = (images, labels) if name in AGAIN else (extra or {}).get(name)
    if source is None or len(source[0]) == 0:
        raise AugmentError(f"arm {name} cannot be built: it has no films of its own to add.")
    source = _films(name, *source, like=(images, labels))
    rows = _draw(len(source[0]), budget, seed)
    pairs = zip((images, labels), source, strict=True)
    return tuple(np.concatenate([real, more[rows]]) for real, more in pairs)


def _films(name, images, labels, like=None):
    images, labels = np.asarray(images), np.asarray(labels, dtype=np.float32)
    if images.ndim != 3 or labels.ndim != 2 or len(images) != len(labels):
        raise AugmentError(
            f"{name} have shape {images.shape} and labels {labels.shape}; (N, H, W) and (N, K) "
            "are needed."
        )
    if like is not None:
        given = images.dtype, images.shape[1:], labels.shape[1:]
        needed = like[0].dtype, like[0].shape[1:], like[1].shape[1:]
        if given != needed:
            raise AugmentError(
                f"{name} are {given[0]} {given[1]} with {given[2][0]} labels; the real films are "
                f"{needed[0]} {needed[1]} with {needed[2][0]}."
            )
    return images, labels


def _draw(count, budget, seed):
    """Which of `count` films make up the budget: whole copies, then a random rest, in order."""
    rest = np.random.default_rng(seed).permutation(count)[: budget % count]
    return np.sort(np.concatenate([np.tile(np.arange(count), budget // count), rest]))


def _evenly(name, groups, total, seed):
    """Rows of `total` films, as many of each of the four groups as of the others, or one more."""
    sizes = np.bincount(groups[groups >= 0], minlength=4)
    if (sizes == 0).any():
        raise AugmentError(
            f"arm {name} needs training films in all four groups, and they hold "
            f"{', '.join(map(str, sizes))} (neither, device alone, effusion alone, both): leave "
            "the arm out, or train on more films."
        )
    shares = [total // 4 + (group < total % 4) for group in range(4)]
    picked = [_draw(size, share, seed) for size, share in zip(sizes, shares, strict=True)]
    return np.concatenate([np.flatnonzero(groups == g)[rows] for g, rows in enumerate(picked)])


@dataclass
class Outcome:
    """One trained arm: its probabilities (N, K) on each test set, its seconds, its classifier."""

    arm: str
    seed: int
    probabilities: dict
    seconds: float
    folder: Path  # load_classifier reads it


@dataclass(frozen=True)
class Job:
    """One arm and seed to train, with all that it takes; the key is a digest of that."""

    arm: str
    seed: int
    real: tuple  # images, labels
    extra: dict
    tests: dict
    heads: tuple
    columns: tuple  # of the heads: the target, and what it must not listen to
    recipe: dict
    folder: Path
    device: str
    key: str = ""


def train_arms(arms, real, extra, tests, heads, columns, params, folder, device="cpu"):
    """Train every arm on every seed for the same number of steps, yielding an Outcome each.

    real: (images, labels) of the training split; extra: as for build_arm; tests: {name: images};
    columns: the target's head, and that of the shortcut; params: the notebook's (seed,
    num_augment_seeds, augment_budget, augment_workers, classifier_...). An arm that is in `folder`
    from the same films and recipe is read, not trained. The last weights count, not the best on
    validation films: those have the shortcut in them. Each training uses one thread, so that any
    number of processes gives the same numbers; outcomes come as they end.
    """
    from sklearn.utils.parallel import Parallel, delayed

    jobs = _jobs(arms, real, extra, tests, heads, columns, params, Path(folder), device)
    for job in jobs[: len(arms)]:  # what cannot be built is said before anything is trained
        _built(job)
    done = {job.key: _finished(job) for job in jobs}
    yield from (outcome for outcome in done.values() if outcome)
    left = [job for job in jobs if not done[job.key]]
    workers = Parallel(max(1, params.augment_workers), return_as="generator_unordered")
    yield from workers(delayed(train_job)(job) for job in left)


def _jobs(arms, real, extra, tests, heads, columns, params, folder, device):
    budget = budget_of(extra, params.augment_budget)
    epochs, batch_size = params.classifier_epochs, params.classifier_batch_size
    recipe = {"classifier": params.classifier, "weights": params.classifier_weights}
    recipe |= {"sees": params.classifier_size, "rate": params.classifier_learning_rate}
    recipe |= {"batch_size": batch_size, "budget": budget}
    recipe["steps"] = epochs * math.ceil((len(real[0]) + budget) / batch_size)
    about = recipe | {"heads": list(heads), "columns": list(columns), "code": _code()}
    if file := weights_file(params.classifier_weights):
        about["weights"] = sha256_file(file)
    about["films"] = _digest([*tests], *real, *tests.values())
    own = {arm: _digest(arm, *extra.get(arm, ())) for arm in arms}
    gpus = torch.cuda.device_count() if device == "cuda" and params.augment_workers > 1 else 0
    jobs = []
    for seed in range(params.seed, params.seed + params.num_augment_seeds):
        for arm in arms:
            where = f"cuda:{len(jobs) % gpus}" if gpus else device
            add = {arm: extra[arm]} if arm in extra else {}
            what = (arm, seed, real, add, tests, tuple(heads), tuple(columns), recipe)
            key = _digest(about | {"arm": own[arm], "seed": seed, "device": device})
            jobs.append(Job(*what, folder / f"{arm}-{seed}", where, key))
    return jobs


def _built(job):
    groups = group_of(job.real[1], job.columns)
    return build_arm(job.arm, *job.real, job.recipe["budget"], job.extra, groups, job.seed)


def train_job(job):
    """Train one arm and write its classifier and probabilities; the card, written last, says so."""
    began, recipe = time.monotonic(), job.recipe
    images, labels = _built(job)
    make = recipe["classifier"], len(job.heads), recipe["weights"], job.seed, recipe["sees"]
    with _one_thread():
        model = build_classifier(*make)
        if job.arm == "group_dro":
            fit_group_dro(model, images, labels, job.columns, recipe, job.seed, job.device)
        else:
            rates = 1, recipe["batch_size"], recipe["rate"], job.seed
            how = {"num_steps": recipe["steps"], "device": job.device}
            how["augment"] = job.arm == "standard_augmentation"
            for _ in fit(model, images, labels, images[:0], labels[:0], *rates, **how):
                pass
        probabilities = {name: predict(model, films) for name, films in job.tests.items()}
    with atomic_path(job.folder / PROBABILITIES_FILE) as partial:
        save_file(probabilities, partial)
    card = {"role": f"arm {job.arm}", "seed": job.seed, "key": job.key}
    card |= {"training_films": len(images), "seconds": time.monotonic() - began}
    save_classifier(job.folder, model, job.heads, card)
    return Outcome(job.arm, job.seed, probabilities, card["seconds"], job.folder)


def _finished(job):
    """The outcome of a job that is in its folder, or None."""
    try:
        card = read_json(job.folder / CARD_FILE)
        if card["key"] != job.key:
            return None
        probabilities = load_file(job.folder / PROBABILITIES_FILE)
        return Outcome(job.arm, job.seed, probabilities, card["seconds"], job.folder)
    except DAMAGE:
        return None


def fit_group_dro(model, images, labels, columns, recipe, seed=0, device="cpu"):
    """Train for the worst group: group DRO (Sagawa 2020, Algorithm 1) on group-balanced films.

    Groups' weights q grow with their loss of the target, q_g <- q_g exp(step loss_g); the loss of
    all heads is weighted by q. columns: as for group_of, the target first; recipe: batch_size,
    rate, steps.
    """
    model.image_size, log_q = images.shape[1], torch.zeros(4, device=device)
    groups, steps = torch.from_numpy(group_of(labels, columns)), recipe["steps"]
    rng, warm_up = np.random.default_rng(seed), max(1, steps // 10)
    weights = model.to(device).parameters()
    optimizer = torch.optim.AdamW(weights, recipe["rate"], weight_decay=DRO_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm_up) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    model.train()
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)  # for dropout
        for _ in range(steps):
            rows = rng.permutation(len(images))[: recipe["batch_size"]]
            films, known = (torch.from_numpy(part[rows]).to(device) for part in (images, labels))
            by_group = _group_losses(model(films), known, groups[rows])  # (4, K)
            log_q = torch.log_softmax(log_q + DRO_STEP * by_group[:, columns[0]].detach(), 0)
            optimizer.zero_grad()
            (log_q.exp() @ by_group).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    refresh_norms(model, images, seed)
    model.eval()


def _group_losses(logits, labels, groups):
    """Mean binary cross-entropy of each head in each group, (4, K); 0 where a batch has none."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0), reduction="none")
    known = ~labels.isnan()
    member = F.one_hot(groups, 4).float().to(logits.device).T  # (4, B)
    return (member @ (losses * known)) / (member @ known.float()).clamp(min=1)


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digest(about, *arrays):
    """SHA-256 of a description and of arrays: shapes, kinds and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _code():
    """What decides an arm's numbers besides its films and recipe: this code, and torch."""
    names = "arms.py", "classifiers.py", "networks.py"
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names]
    return _digest([torch.__version__, *(ast.dump(ast.parse(text)) for text in texts)])
