"""Training the arms of the augmentation study: equal steps, equal films (Table 3).

A generator, so that the notebook shows progress. Films (N, H, W) uint8, labels (N, K) with NaN =
missing. Used by notebook 06.
"""

from dataclasses import dataclass
from math import ceil

from prism_nb.augment import build_arm
from prism_nb.classifiers import Classifier, build_classifier, fit, predict


@dataclass
class Outcome:
    """One trained arm: its probabilities (N, K) on every test set, and the classifier."""

    arm: str
    seed: int
    probabilities: dict
    model: Classifier


def train_arms(arms, films, labels, rows, extra, tests, heads, settings, device="cpu"):
    """Train every arm with every seed, yielding an Outcome each; all take the same number of steps.

    rows: {"train": ..., "val": ...} positions in films; extra as in build_arm; tests: name ->
    films; settings: notebook 06's parameters. The number of steps is that of the largest arm.
    """
    budget = min((len(part[0]) for part in extra.values()), default=0)
    num_films = len(rows["train"]) + budget
    num_steps = settings.classifier_epochs * ceil(num_films / settings.classifier_batch_size)
    val = films[rows["val"]], labels[rows["val"]]
    for seed in range(settings.seed, settings.seed + settings.num_augment_seeds):
        for arm in arms:
            own = build_arm(arm, films[rows["train"]], labels[rows["train"]], extra, seed)
            model = build_classifier(
                settings.classifier, len(heads), settings.classifier_weights, seed=seed
            )
            training = fit(
                model,
                *own,
                *val,
                settings.classifier_epochs,
                settings.classifier_batch_size,
                settings.classifier_learning_rate,
                seed=seed,
                num_steps=num_steps,
                device=device,
            )
            for _ in training:
                pass
            yield Outcome(
                arm, seed, {name: predict(model, part) for name, part in tests.items()}, model
            )
