"""A small network can read the phantom, and a biased one is caught out by its shortcut."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from prism_nb.phantom import DRAWN, render, sample_patient

HEADS = ("Pleural Effusion", "Cardiomegaly", "Support Devices")
SIZE, NUM_TRAIN, NUM_TEST, EPOCHS = 96, 1200, 400, 16


def network():
    layers, width = [], 1
    for out, stride in ((16, 2), (32, 2), (64, 2), (96, 2), (128, 1)):
        layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def scaled(films):
    return (torch.from_numpy(films)[:, None].float() - 128) / 64


def fit(films, labels):
    torch.manual_seed(0)
    model, rng = network(), np.random.default_rng(0)
    x, y = scaled(films), torch.from_numpy(labels).float()
    batches = -(-len(x) // 32)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=batches * EPOCHS)
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(len(x)), batches):
            moved = torch.roll(x[rows], tuple(int(v) for v in rng.integers(-4, 5, 2)), (2, 3))
            loss = nn.functional.binary_cross_entropy_with_logits(model(moved), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def scores(model, films):
    return model(scaled(films)).numpy()


@pytest.fixture(scope="module")
def films():
    """Films without a link between findings, which show no others than the three."""
    coins = np.random.default_rng(5).integers(0, 2, (NUM_TRAIN + NUM_TEST, 3))
    shown = []
    for number, row in enumerate(coins, 1):
        patient = sample_patient(31, number)
        do = dict.fromkeys(DRAWN, 0) | dict(zip(HEADS, row.tolist(), strict=True))
        shown.append(render(patient, SIZE, do).image)
    return np.stack(shown), coins


def test_effusion_heart_and_devices_can_be_learned(films):
    images, labels = films
    model = fit(images[:NUM_TRAIN], labels[:NUM_TRAIN])
    found = scores(model, images[NUM_TRAIN:])
    for head, name in enumerate(HEADS):
        assert roc_auc_score(labels[NUM_TRAIN:, head], found[:, head]) > 0.95, name


def test_a_network_trained_on_linked_films_takes_the_shortcut(films):
    images, labels = films
    effusion, device = labels[:NUM_TRAIN, 0], labels[:NUM_TRAIN, 2]
    # P(device | effusion) .95, P(device | no effusion) .25, as the dial at .95 gives
    weight = np.where(effusion == 1, np.where(device, 0.95, 0.05), np.where(device, 0.25, 0.75))
    rows = np.random.default_rng(1).choice(NUM_TRAIN, NUM_TRAIN, p=weight / weight.sum())
    found = scores(fit(images[rows], labels[rows]), images[NUM_TRAIN:])[:, 0]
    effusion, device = labels[NUM_TRAIN:, 0], labels[NUM_TRAIN:, 2]
    agree = effusion == device
    easy = roc_auc_score(effusion[agree], found[agree])
    hard = roc_auc_score(effusion[~agree], found[~agree])
    assert easy > 0.97
    assert hard < easy - 0.1
