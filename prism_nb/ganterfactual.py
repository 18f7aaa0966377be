"""GANterfactual (Mertes et al. 2022), the baseline of Table 2, from its paper's description.

A CycleGAN between films x without a finding and films y with it, and a frozen classifier C, the
guide, that must agree. With G = to_present, F = to_absent and least-squares PatchGANs D_x, D_y:
    (D_y(G(x)) - 1)^2 + (D_x(F(y)) - 1)^2 + 10 (|F(G(x)) - x| + |G(F(y)) - y|)
    + |F(x) - x| + |G(y) - y| + (C(G(x)) - 1)^2 + C(F(y))^2
Shapes: films uint8 (N, H, W); x and y (B, 1, S, S) in [-1, 1], S = gan.size. Used by notebook 05,
and as a program that trains the bundled one: python -m prism_nb.ganterfactual OUT
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from copy import deepcopy
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from prism_nb.checkpoints import Checkpoints
from prism_nb.classifiers import fit
from prism_nb.files import atomic_path, one_line, read_json, sha256_file, write_json
from prism_nb.findings import finding_from
from prism_nb.images import load_films, uint8_to_unit, unit_to_uint8
from prism_nb.networks import (
    CARD_FILE,
    WEIGHTS_FILE,
    build_classifier,
    check_films,
    load_classifier,
    predict,
    save_classifier,
)

BUNDLED = Path(__file__).parent / "assets" / "ganterfactual"
SMALLEST = 16  # pixels a side: the generators halve four times
GAN_SEED = 4_000_037  # a population of its own: its patients are never seen in a notebook
ADAM_PARTS = ("step", "exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


class GanError(ValueError):
    """The GAN, its films or its weights cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Progress:
    """One update of all four networks."""

    step: int
    generator_loss: float  # the weighted sum of the next three and the adversarial part
    discriminator_loss: float
    cycle_loss: float
    identity_loss: float
    guide_loss: float
    learning_rate: float


def _halve(inner, outer, norm=True):
    norms = [nn.InstanceNorm2d(outer)] if norm else []
    return nn.Sequential(nn.Conv2d(inner, outer, 4, 2, 1), *norms, nn.LeakyReLU(0.2))


def _double(inner, outer):
    up = nn.ConvTranspose2d(inner, outer, 4, 2, 1)
    return nn.Sequential(up, nn.InstanceNorm2d(outer), nn.ReLU())


class UNet(nn.Module):
    """A generator: four halvings, four doublings, skips between; tanh at the end."""

    def __init__(self, width):
        super().__init__()
        w = width
        # The first has no norm: it would take away how bright the film is.
        self.down = nn.ModuleList(
            [_halve(1, w, norm=False), _halve(w, 2 * w), _halve(2 * w, 4 * w), _halve(4 * w, 4 * w)]
        )
        self.up = nn.ModuleList([_double(4 * w, 4 * w), _double(8 * w, 2 * w), _double(4 * w, w)])
        self.last = nn.ConvTranspose2d(2 * w, 1, 4, 2, 1)

    def forward(self, x):
        """Films (B, 1, S, S) in [-1, 1] to films of the other kind, the same shape and range."""
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)  # (B, w .. 4 w, S / 2 .. S / 16, ..)
        for layer, skip in zip(self.up, skips[-2::-1], strict=True):
            x = torch.cat([layer(x), skip], dim=1)
        return self.last(x).float().tanh()


class GANterfactual(nn.Module):
    """Generators to_absent and to_present, and a discriminator of 46-pixel patches for each."""

    def __init__(self, size, width):
        super().__init__()
        self.size, self.width = size, width
        self.to_absent, self.to_present = UNet(width), UNet(width)
        self.discriminators = nn.ModuleDict()
        for kind in ("absent", "present"):
            layers = [_halve(1, width, norm=False), _halve(width, 2 * width)]
            layers += [_halve(2 * width, 4 * width), nn.Conv2d(4 * width, 1, 4, 1, 1)]
            self.discriminators[kind] = nn.Sequential(*layers)


def build_gan(size=128, width=32, seed=0):
    """Make an untrained GANterfactual for films of size pixels; GanError for a size not fit."""
    if size < 2 * SMALLEST or size % SMALLEST:
        raise GanError(
            f"size is {size}; a multiple of {SMALLEST} from {2 * SMALLEST} pixels on is needed."
        )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(seed)
        return GANterfactual(size, width).to(memory_format=torch.channels_last)


def fit_gan(
    gan,
    absent,
    present,
    guide=None,
    num_steps=2000,
    batch_size=4,
    learning_rate=2e-4,
    cycle_weight=10,
    identity_weight=1,
    guide_weight=1,
    head=0,
    pool_size=50,
    seed=0,
    folder=None,
    checkpoint_every=200,
    device="cpu",
):
    """Train on films without and with the finding, unpaired, yielding a Progress an update.

    absent, present: uint8 (N, H, W), resized to gan.size once. guide: a classifier trained at
    that size, whose output `head` is the finding. Adam (.5, .999), its rate falling
    to zero over the second half. What is drawn comes from (seed, step); `folder` keeps checkpoints,
    pools included, so a killed training goes on to the same weights, and a finished one yields
    nothing. Stopped early, gan is as it was given. Raises GanError for a class without films, a
    guide of another size, and a loss that is not finite.
    """
    films = [resize(part, gan.size) for part in (absent, present)]
    check_request(films, guide, head)
    weights = (1, cycle_weight, identity_weight, guide_weight)
    settings = (num_steps, batch_size, learning_rate, *weights, head, pool_size, seed)
    checkpoints = folder and Checkpoints(folder, _key(gan.to(device), films, guide, settings))
    guide = guide and frozen(guide, torch.device(device))
    start = {name: value.clone() for name, value in gan.state_dict().items()}
    training = Training(gan, pool_size)
    try:
        tensors = checkpoints and checkpoints.load(num_steps)
        if tensors:
            training.load(tensors)
        for step in range(training.step, num_steps):
            rate = learning_rate * min(1, 2 * (1 - step / num_steps))
            rng = np.random.default_rng([seed, step])
            x, y = (to_sd(part[rng.integers(len(part), size=batch_size)], device) for part in films)
            training.history.append(training.update(x, y, guide, head, weights, rate, rng))
            if checkpoints and (training.step % checkpoint_every == 0 or step + 1 == num_steps):
                checkpoints.save(training.step, training.tensors())
            yield training.history[-1]
    except BaseException:  # an interrupt as well, and a caller that stops early
        gan.load_state_dict(start)
        raise


def check_request(films, guide, head):
    """Refuse a class without films, and a guide that does not fit them or lacks the head."""
    for kind, part in zip(("without", "with"), films, strict=True):
        if len(part) == 0:
            raise GanError(f"there is no film {kind} the finding: give films of both kinds.")
    if guide is None:
        return
    size = check_films(films[0], guide).shape[1]
    if guide.image_size not in (0, size) or not 0 <= head < guide.num_heads:
        raise GanError(
            f"the guide was trained at {guide.image_size} pixels with {guide.num_heads} heads; "
            f"{size} pixels and head {head} are asked: train it on films resized to gan.size."
        )


def frozen(guide, device):
    """A copy that only passes gradients on; in bf16, AlexNet is a third of the work."""
    guide = deepcopy(guide).to(device).eval().requires_grad_(False)
    return guide.bfloat16() if has_bf16(device) else guide


class Training:
    """The networks in training and all it takes to go on exactly: Adam, pools, history."""

    def __init__(self, gan, pool_size):
        """One Adam holds all: a step moves both sides, each by its own loss."""
        self.gan, self.history = gan, []
        gan.requires_grad_(True)
        self.named = dict(gan.named_parameters())
        self.optimiser = torch.optim.Adam(self.named.values(), betas=(0.5, 0.999), fused=True)
        device = next(gan.parameters()).device
        self.pools = torch.zeros(2, pool_size, 1, gan.size, gan.size, device=device)

    @property
    def step(self):
        """Number of updates made so far."""
        return len(self.history)

    def update(self, x, y, guide, head, weights, rate, rng):
        """One update of all networks from films without (x) and with the finding (y)."""
        gan, seen = self.gan, self.step * len(x)
        gan.discriminators.requires_grad_(False)  # here they only pass gradients on
        with precision(x.device):
            parts, made = generator_losses(gan, x, y)
            parts.append(guide_loss(guide, head, *made) if guide else x.new_zeros(()))
        loss = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        loss.backward()
        gan.discriminators.requires_grad_(True)
        pairs = zip(self.pools, made, strict=True)
        shown = [exchange(pool, films.detach(), seen, rng) for pool, films in pairs]
        with precision(x.device):
            other = discriminator_loss(gan, x, y, *shown)
        other.backward()
        norm = nn.utils.get_total_norm([w.grad for w in self.named.values()])
        values = torch.stack([loss, other, *parts[1:], norm]).tolist()  # the one wait for a device
        if not all(map(math.isfinite, values)):
            raise GanError(
                f"a loss is not finite at step {self.step} ({values}): lower learning_rate; the "
                "last checkpoint is kept."
            )
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return Progress(self.step, *values[:-1], rate)

    def tensors(self):
        """Everything as named tensors, for safetensors."""
        tensors = {"history": torch.tensor([astuple(p) for p in self.history]).double()}
        tensors["pools"] = self.pools
        for name, weight in self.named.items():
            tensors[f"weights.{name}"] = weight.detach()
            for part in ADAM_PARTS:
                tensors[f"adam.{part}.{name}"] = self.optimiser.state[weight][part]
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors):
        """Take back what tensors() gave."""
        self.history = [Progress(int(step), *rest) for step, *rest in tensors["history"].tolist()]
        self.pools.copy_(tensors["pools"])
        for name, weight in self.named.items():
            weight.copy_(tensors[f"weights.{name}"])
            state = {part: tensors[f"adam.{part}.{name}"] for part in ADAM_PARTS}
            # Adam goes through weights and averages in the order in which they lie in memory.
            state |= {k: torch.empty_like(weight).copy_(state[k]) for k in ADAM_PARTS[1:]}
            state["step"] = state["step"].to(weight.device)
            self.optimiser.state[weight] = state


def precision(device):
    """Half the time in bf16, where the device has units for it; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def has_bf16(device):
    """Whether the device multiplies matrices in bf16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def generator_losses(gan, x, y):
    """The generators' losses [adversarial, cycle, identity], and the films (F(y), G(x))."""
    present, same_y = gan.to_present(torch.cat([x, y])).chunk(2)
    absent, same_x = gan.to_absent(torch.cat([y, x])).chunk(2)
    adversarial = _off(gan.discriminators["present"](present), 1)
    adversarial = adversarial + _off(gan.discriminators["absent"](absent), 1)
    cycle = F.l1_loss(gan.to_absent(present), x) + F.l1_loss(gan.to_present(absent), y)
    identity = F.l1_loss(same_x, x) + F.l1_loss(same_y, y)
    return [adversarial, cycle, identity], (absent, present)


def guide_loss(guide, head, absent, present):
    """The counterfactual term: squared distance of C from 0 and 1 on films made absent, present."""
    films = (torch.cat([absent, present])[:, 0] + 1) / 2  # (2 B, S, S) in [0, 1]
    off, on = guide(films)[:, head].sigmoid().chunk(2)
    return _off(off, 0) + _off(on, 1)


def discriminator_loss(gan, x, y, absent, present):
    """Least squares: true films x and y are to be 1, made ones 0; a guess of .5 gives 1."""
    total = 0
    for kind, true, made in (("absent", x, absent), ("present", y, present)):
        real, fake = gan.discriminators[kind](torch.cat([true, made])).chunk(2)
        total = total + _off(real, 1) + _off(fake, 0)
    return total


def _off(scores, target):
    return (scores.float() - target).square().mean()


def exchange(pool, films, seen, rng):
    """What a discriminator is shown: half of the films made now are swapped for earlier ones.

    pool (P, 1, S, S) is changed in place; `seen` films went before, and the first P fill it.
    """
    shown = films.clone()
    for row, film in enumerate(films, start=seen):
        if row < len(pool):
            pool[row] = film
        elif len(pool) and rng.random() < 0.5:
            place = rng.integers(len(pool))
            shown[row - seen], pool[place] = pool[place].clone(), film
    return shown


def _key(gan, films, guide, settings):
    """Digest of everything that decides the weights."""
    from prism_nb.diffusion import weights_hash

    parts = [gan.size, weights_hash(gan), *settings, has_bf16(next(gan.parameters()).device)]
    parts += [hashlib.sha256(part.tobytes()).hexdigest() for part in films]
    parts += [weights_hash(guide), guide.temperature] if guide is not None else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def resize(films, size):
    """Films uint8 (N, H, W) as uint8 (N, size, size): bilinear, averaged where they shrink."""
    films = _check(films)
    if films.shape[1:] == (size, size):
        return films
    parts = [films[k : k + 64] for k in range(0, len(films), 64)]
    parts = [unit_to_uint8((_bilinear(to_sd(part), (size, size))[:, 0] + 1) / 2) for part in parts]
    return np.concatenate([np.empty((0, size, size), np.uint8), *parts])


def _check(films):
    films = np.asarray(films)
    if films.dtype != np.uint8 or films.ndim != 3:
        raise GanError(f"films are {films.dtype} {films.shape}; uint8 (N, H, W) is needed.")
    return films


def to_sd(films, device="cpu"):
    """Films uint8 (B, H, W) to float32 (B, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(uint8_to_unit(films)).to(device).mul(2).sub(1).unsqueeze(1)


def _bilinear(x, shape):
    return F.interpolate(x, shape, mode="bilinear", antialias=True)


@torch.inference_mode()
def translate(gan, films, present, batch_size=16):
    """Films uint8 (N, H, W) with (present=True) or without the finding, at the size they came in.

    At gan.size they are what the generator gives. Others are shrunk, and the change that the
    generator makes is enlarged and added to the film, so that no film is charged for resolution.
    """
    films = _check(films)
    generator = gan.to_present if present else gan.to_absent
    device, made = generator.last.weight.device, np.empty_like(films)
    for start in range(0, len(films), batch_size):
        part = slice(start, start + batch_size)
        x = to_sd(films[part], device)
        if x.shape[-2:] == (gan.size, gan.size):
            x = generator(x)
        else:
            small = _bilinear(x, (gan.size, gan.size))
            x = x + _bilinear(generator(small) - small, x.shape[-2:])
        made[part] = unit_to_uint8((x[:, 0] + 1) / 2)
    return made


def _generators(gan):
    return nn.ModuleDict({"to_absent": gan.to_absent, "to_present": gan.to_present})


def save_gan(folder, gan, card):
    """Write the generators in half precision, and `card` with their size, width and digest."""
    folder, state = Path(folder), _generators(gan).state_dict()
    with atomic_path(folder / WEIGHTS_FILE) as partial:
        save_file({k: v.half().cpu().contiguous() for k, v in state.items()}, partial)
    known = {"size": gan.size, "width": gan.width, "sha256": sha256_file(folder / WEIGHTS_FILE)}
    write_json(folder / CARD_FILE, card | known)
    return folder


def load_gan(folder):
    """Read what save_gan wrote: (gan, card); its discriminators are new.

    Raises GanError if there is none, or if weights and card do not belong together.
    """
    folder = Path(folder)
    if not (folder / CARD_FILE).is_file():
        raise GanError(f"no GAN in {folder}: train it, python -m prism_nb.ganterfactual {folder}")
    try:
        card = read_json(folder / CARD_FILE)
        if sha256_file(folder / WEIGHTS_FILE) != card["sha256"]:
            raise ValueError("the weights are not those of its card")
        gan = build_gan(card["size"], card["width"])
        _generators(gan).load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"the GAN in {folder} is damaged ({one_line(error)}): train it anew."
        raise GanError(why) from None
    return gan.eval(), card


def main(arguments=None):
    """Train the GAN on phantom films that no notebook sees, and save it; killed, it goes on."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_nb.ganterfactual", description=main.__doc__
    )
    parser.add_argument("out", type=Path, help="folder of the weights and of work/")
    parser.add_argument("--num-patients", type=int, default=1200, help="films to render")
    parser.add_argument("--num-steps", type=int, default=3000, help="updates of the weights")
    parser.add_argument("--size", type=int, default=128, help="pixels a side that the GAN sees")
    parser.add_argument("--width", type=int, default=32, help="channels of the widest level")
    parser.add_argument("--finding", default="Support Devices", help="what is taken and given")
    parser.add_argument("--confounding", type=float, default=0.75, help="P(device | effusion)")
    parser.add_argument("--processes", type=int, default=2, help="that render, 0: none but this")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        _train(options)
    except (ValueError, OSError) as error:  # every error of the project's is a ValueError
        sys.exit(f"ganterfactual: {error}")


def _train(options):
    """Films, guide and GAN, each kept in OUT/work, then the generators and what they can do."""
    finding = options.finding = finding_from(options.finding)
    work, began, done = options.out / "work", time.monotonic(), []
    gan = build_gan(options.size, options.width)
    sets = phantom_sets(work / "cohort", options)
    guide = phantom_guide(work / "guide", finding, sets)
    films, present = sets["train"][0], sets["train"][1][:, 0] == 1
    pair, settings = (films[~present], films[present]), {"num_steps": options.num_steps}
    for progress in fit_gan(gan, *pair, guide, folder=work / "training", **settings):
        done.append(progress)
        if progress.step % 50 == 49 or progress.step + 1 == options.num_steps:
            log_progress(done, options.num_steps)
    card = vars(options) | {"seed": GAN_SEED, "rendered_at": 2 * options.size, "guide": "alexnet"}
    card |= {"films_absent": len(pair[0]), "films_present": len(pair[1])}
    card |= {"seconds": round(time.monotonic() - began), "steps_in_these_seconds": len(done)}
    card |= measure(gan, guide, *sets["test"])
    save_gan(options.out, gan, {k: v for k, v in card.items() if k not in ("out", "processes")})


def phantom_sets(folder, options):
    """By split: films of a population of its own, shrunk as a cohort's are, and labels (N, 1)."""
    from prism_nb.cohort import load_cohort, split_by_patient
    from prism_nb.phantom import write_cohort

    recipe = options.num_patients, 2 * options.size, GAN_SEED, options.confounding
    csv = write_cohort(folder, *recipe, workers=options.processes)
    cohort, sets = load_cohort(csv, check_images=False), {}
    for split, rows in split_by_patient(cohort.table, 0.1, 0.1).groupby("split"):
        films = load_films([cohort.image_root / path for path in rows["path"]], options.size)
        sets[split] = films, rows[[options.finding]].to_numpy(np.float32, copy=True)
    return sets


def phantom_guide(folder, finding, sets):
    """The AlexNet that guides, trained once a finding."""
    card = folder / CARD_FILE
    if not card.is_file() or read_json(card)["heads"] != [finding]:
        guide = build_classifier("alexnet", 1)
        for epoch in fit(guide, *sets["train"], *sets["val"], epochs=12, learning_rate=3e-4):
            log.info("guide, epoch %d: validation AUROC %.3f", epoch.epoch, epoch.val_auroc)
        save_classifier(folder, guide, [finding])
    return load_classifier(folder)[0]


def log_progress(done, num_steps):
    """Say where training stands: the means of the last 50 updates."""
    values = np.mean([astuple(progress) for progress in done[-50:]], axis=0)[[1, 2, 3, 5]]
    said = "step %d of %d: generators %.3f, discriminators %.3f, cycle %.4f, guide %.3f"
    log.info(said, done[-1].step + 1, num_steps, *values)


def measure(gan, guide, films, labels):
    """The guide's AUROC on films not trained on, and what translation does to its probability."""
    from sklearn.metrics import roc_auc_score

    found, present = predict(guide, films)[:, 0], labels[:, 0] == 1
    card = {"test_films": len(films), "guide_auroc": float(roc_auc_score(present, found))}
    for name, rows in (("to_present", ~present), ("to_absent", present)):
        made = translate(gan, films[rows], name == "to_present")
        before, after = found[rows].mean(), predict(guide, made)[:, 0].mean()
        off = np.abs(uint8_to_unit(made) - uint8_to_unit(films[rows])).mean()
        card[name] = {"before": float(before), "after": float(after), "l1": float(off)}
        log.info("%s: P(present) %.3f before, %.3f after, L1 %.4f", name, before, after, off)
    return card


if __name__ == "__main__":
    main()
