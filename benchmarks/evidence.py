"""W9 to W11: scores, classifiers and the GAN baseline (paper 3.2)."""

from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.paired import check, off
from benchmarks.peers import lance
from benchmarks.peers.ganterfactual import Port
from prism_nb.classifiers import _optimizer, _train, build_classifier, masked_loss
from prism_nb.findings import PAPER_HEADS
from prism_nb.ganterfactual import Training, build_gan, frozen, has_bf16, resize, to_sd
from prism_nb.images import load_films, uint8_to_unit, unit_to_uint8
from prism_nb.networks import MEAN, STD, logits_of

SWEEP = (0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the true change: five edits a film


def scores(case):
    """W9: S_CLIP of five edits a film."""
    scorer, cases, num = case.scorer(), case.cases, len(SWEEP) * len(case.cases.films)
    before, after = uint8_to_unit(cases.films), uint8_to_unit(cases.truth)
    made = np.concatenate([unit_to_uint8(before + s * (after - before)) for s in SWEEP])
    films, texts = np.tile(cases.films, (len(SWEEP), 1, 1)), (cases.sources, cases.targets)
    edits = films, made, *(part * len(SWEEP) for part in texts)

    def ours():
        return scorer.s_clip(uint8_to_unit(films), uint8_to_unit(made), *edits[2:])

    def peer():
        return [lance.s_clip(scorer, *each) for each in zip(*edits, strict=True)]

    gate = [check("largest difference", float(np.abs(ours() - peer()).max()), 0.01)]
    about = "LANCE's, one by one", peer, gate, (2.5, 8), "an edit", (num, num)
    yield case.time("W9", f"S_CLIP of {num} edits", ours, *about)


class PlainClassifier:
    """A classifier as timm's examples train one: files by Pillow, float32, default layout."""

    def __init__(self, model, table, size):
        """A copy of our network; its one grey channel is the first of three."""
        self.network = deepcopy(model.network).to(memory_format=torch.contiguous_format)
        self.labels, self.paths = _labels(table), list(table["path"])
        self.device = next(model.parameters()).device
        steps = [transforms.Resize((size, size)), transforms.ToTensor()]
        self.look = transforms.Compose([*steps, transforms.Normalize([MEAN] * 3, [STD] * 3)])
        self.adam = torch.optim.AdamW(self.network.parameters(), 1e-3, weight_decay=0.05)

    def logits(self, rows):
        """Logits (B, K) of some films, opened one by one."""
        films = [self.look(Image.open(self.paths[row]).convert("RGB")) for row in rows]
        return self.network(torch.stack(films)[:, :1].to(self.device))

    def ask(self, parts):
        """Logits (N, K) of films in batches."""
        self.network.eval()
        with torch.no_grad():
            return torch.cat([self.logits(rows) for rows in parts])

    def train(self, parts):
        """One update a batch."""
        self.network.train()
        for rows in parts:
            labels = torch.from_numpy(self.labels[rows]).to(self.device)
            loss = masked_loss(self.logits(rows), labels)
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            loss.item()


def _labels(table):
    return table[list(PAPER_HEADS)].to_numpy(np.float32)


def classifier(case):
    """W10: asking and training a classifier, from films in memory against files."""
    scale, name = case.scale, f"{case.scale.classifier}, {case.scale.size} px"
    films = load_films(case.table["path"][: scale.batch], scale.size)
    model = build_classifier(scale.classifier, len(PAPER_HEADS)).to(case.device)
    plain, parts = PlainClassifier(model, case.table, scale.size), [np.arange(len(films))]
    tools = *_optimizer(model, 1e-3, 0.05, 10_000), torch.Generator().manual_seed(0)
    wanted, bf16 = plain.ask(parts), has_bf16(case.device)
    gate = [check("logits, relative", off(logits_of(model, films), wanted), 1e-3)]

    def asked():
        with torch.autocast(case.device.type, torch.bfloat16, enabled=bf16):
            return logits_of(model, films)

    def trained():
        return _train(model, films, _labels(case.table), parts, *tools, False)

    half = [check("logits in bf16, relative", off(asked(), wanted), 0.05)] if bf16 else []

    def timed(verb, ours, peer, target, also=(), **options):
        per = len(films), len(films)
        about = "files by Pillow, fp32", peer, [*gate, *also], target, "a film", per
        return case.time("W10", f"{verb} {name}", ours, *about, **options)

    def peer():
        return plain.ask(parts)

    yield timed(f"ask, {'bf16' if bf16 else 'fp32'},", asked, peer, (2, 5), half, bf16=bf16)
    yield timed("ask, fp32,", lambda: logits_of(model, films), peer, (None, None))
    # backward through grouped convolutions counts too many
    yield timed("train", trained, lambda: plain.train(parts), (1.35, 5), share=False)


def gan(case):
    """W11: an update of GANterfactual, four pairs of films at once."""
    size, device, num = case.scale.gan, case.device, 4
    made, guide = build_gan(size).to(device), build_classifier("alexnet", 1).to(device)
    films = resize(np.concatenate([case.cases.films, case.cases.truth]), size)
    x, y = to_sd(np.resize(films, (2 * num, size, size)), device).chunk(2)
    port, own, rng = Port(made, guide), frozen(guide, device), np.random.default_rng(0)
    training, weights, bf16 = Training(made, pool_size=50), (1, 10, 1, 1), has_bf16(device)

    def ours(rows=slice(None)):
        return training.update(x[rows], y[rows], own, 0, weights, 2e-4, rng)

    def peer():
        for n in range(num):
            port.step(x[n : n + 1], y[n : n + 1])

    one, others = ours(slice(0, 1)), port.step(x[:1], y[:1])
    one = one.discriminator_loss, one.cycle_loss, one.identity_loss, one.guide_loss
    gate = [check("losses of the first update, relative", off(np.array(one), others), 0.03)]
    what = f"train the GAN, {num} pairs at once, {size} px, {'bf16' if bf16 else 'fp32'}"
    about = "a pair at a time, fp32", peer, gate, (1.5, 5), "a pair", (num, num)
    yield case.time("W11", what, ours, *about, bf16=bf16)
