"""Editors: the latents of edited films, by prism's own walk or by a peer (paper 2.3).

    eps = eps(base) + sum_j w_j (eps(T'_j) - eps(base)), down from the film's own noise

Each of EDITORS takes a Job and returns latents (R, C, h, w) and a list of evidence (R, h, w) for
the mask: to add a method is to add a function. Shapes: R edits with J captions each; weights
(J, R). `editing.edit` calls them; used by notebook 04.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Real
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from prism_nb.attention import Controller, align, control, layout, split_words
from prism_nb.diffusion import alpha_at, autocast, embed_captions, predict_noise
from prism_nb.inversion import Inversion, levels
from prism_nb.masks import NoiseDifference, diffedit_mask
from prism_nb.regeneration import walk_down

CONTROLS = ("plain", "p2p", "p2p+blend")
RANGES = {"guidance_scale": (0, 50), "reweight": (-10, 10), "threshold": (0, 10)}
RANGES |= {"feather": (0, 512), "seed": (0, 2**63)}
NO_HOLD = ("diffedit", "ledits++")  # they have no one direction of an edit to take from
SHARES = ("strength", "cross_replace", "self_replace", "blend_threshold", "detail")
RANGES |= dict.fromkeys(SHARES, (0, 1))


@dataclass(frozen=True, eq=False)
class Dials:
    """How an edit is made."""

    method: str = "inversion"  # one of EDITORS
    guidance_scale: float = 2.0  # w
    guidance_from: str | None = "source"  # or empty, tuned; None: as the inversion's method has it
    strength: float = 1.0  # share of the steps that are walked; of LEDITS++: 1 - its `skip`
    control: str = "plain"  # one of CONTROLS; the last also blends the latents
    cross_replace: float = 0.8  # share of the steps that follow the film's attention
    self_replace: float = 0.5
    reweight: float = 1.0  # factor for the words of T' that T lacks
    weights: dict = field(default_factory=dict)  # phrase, in each T' -> factor
    blend_threshold: float = 0.3  # of the largest attention; 0 blends everywhere
    mask: object = "auto"  # "none", "auto", an array; a list of some: their union
    keep: object = None  # an array of what may not change; it wins over every mask
    threshold: float = 0.8  # of the automatic mask, times Otsu's
    feather: float = 0  # pixels over which an edit fades in, inside its mask
    detail: float = 1.0  # share of the film's grain given back inside a mask; without one, none
    hold: tuple = ()  # captions; what tells them from T stays as it is
    seed: int = 0  # of the peers' noise, with the film's id

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, Real) and low <= value <= high):
                raise ValueError(f"{name} is {value!r}; it must be a number from {low} to {high}")
        for name, allowed in (("method", EDITORS), ("control", CONTROLS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if isinstance(self.hold, str):
            raise ValueError(f"hold is {self.hold!r}; give a list of captions")
        if self.hold and self.method in NO_HOLD:
            raise ValueError(f"{self.method} cannot hold captions: leave hold out, or use another")

    @property
    def masks(self):
        """The masks asked for, as a list."""
        return list(self.mask) if isinstance(self.mask, list | tuple) else [self.mask]

    @property
    def automatic(self):
        """Whether an automatic mask is asked for."""
        return any(isinstance(mask, str) and mask == "auto" for mask in self.masks)

    @property
    def grain(self):
        """What `detail` comes to: an edit without a mask stays as decoded."""
        unmasked = all(isinstance(mask, str) and mask == "none" for mask in self.masks)
        return 0.0 if unmasked else self.detail


class Job(NamedTuple):
    """A batch of R edits, as every editor takes it."""

    model: object
    inversion: Inversion
    films: np.ndarray  # (R, H, W) float32 in [0, 1]
    rows: list  # R positions in the inversion
    sources: list  # R captions T
    targets: list  # J lists of R captions T'
    weights: torch.Tensor  # (J, R), signed, times the guidance scale
    dials: Dials

    def embed(self, lists):
        """Lists of R captions as embeddings (len(lists), R, L, D)."""
        texts = list(chain(*lists))
        unique = list(dict.fromkeys(texts))
        rows = embed_captions(self.model, unique)[[unique.index(text) for text in texts]]
        return rows.unflatten(0, (len(lists), -1))

    def alone(self):
        """The same edits with an inversion of their own rows."""
        part = self.inversion.select(self.rows).to(self.model.device)
        return self._replace(inversion=part, rows=list(range(len(self.rows))))


# Our own: from the film's noise down, with or without prompt-to-prompt


def by_inversion(job):
    """Walk down from the inversion under the targets, with prompt-to-prompt where it is asked."""
    dials, scale = job.dials, job.dials.guidance_scale * job.weights
    has_base = len(scale) > 1 or bool((scale != 1).any())  # w = 1 is the caption alone
    start = dials.guidance_from or job.inversion.guidance_from
    options = {"guidance_from": start, "strength": dials.strength}
    options["with_source"] = dials.control != "plain"
    if watched := bool(dials.automatic or dials.hold):
        held = job.embed([[text] * len(job.rows) for text in dials.hold]) if dials.hold else ()
        source, known = job.embed([job.sources])[0], has_base and start == "source"
        options["predict"] = watch = NoiseDifference(source, job.weights, held, known)
    cond = job.embed(job.targets)
    walk = walk_down(job.model, job.inversion, cond, job.rows, scale, **options)
    evidence = []
    if dials.control == "plain":
        for step in walk:
            last = step
    else:
        last, evidence = _controlled(job, walk, len(job.rows) * has_base)
    return last.z.float(), [watch.map, *evidence] if watched and watch.num_calls else evidence


def _controlled(job, walk, first):
    """Walk under prompt-to-prompt: the last Step, and attention to the changed words (R, h, w).

    first: rows of the guidance base, which come before the sources in walk_down's batch.
    """
    dials, films, step = job.dials, sorted(set(job.rows)), next(walk)
    plans, counts = _plans(job), job.weights != 0
    follow = [films.index(row) for row in job.rows] * len(job.targets)
    edits = layout(plans, follow, first, first + len(films))
    shares = dials.cross_replace, dials.self_replace
    halvings = len(job.model.unet.config.block_out_channels) - 1
    lowest = math.ceil(max(step.z.shape[-2:]) / 2**halvings)  # pixels a side of the coarsest maps
    options = {"store": dials.automatic, "blend_threshold": dials.blend_threshold, "step": 0}
    options["store_side"] = max(Controller.store_side, lowest)
    plan = Controller(edits, max(step.level, 1), *shares, **options)
    size = step.z.shape[-2:]
    with control(job.model.unet, plan):
        for step in walk:
            blends = dials.control == "p2p+blend" and plan.blended.any()
            if blends and plan.step >= plan.num_unblended:
                near = plan.blend_mask(size).unflatten(0, counts.shape)  # (J, R, 1, h, w)
                near = (near & counts[..., None, None, None]).any(0)
                step.z = torch.where(near, step.z, step.source)
            plan.step += 1
    if not (dials.automatic and plan.step):
        return step, []
    rows, tokens = torch.cat([plan.sources, plan.targets]), plan.phrases.flatten(0, 1)
    return step, [plan.maps(rows, tokens, size).unflatten(0, (-1, *counts.shape[1:])).amax(0)]


def _plans(job):
    """Alignments of J R targets: changed words re-weighted, and marked where maps are needed."""
    tokenizer, dials, plans = job.model.tokenizer, job.dials, []
    for texts, weights in zip(job.targets, job.weights.tolist(), strict=True):
        for source, target, weight in zip(job.sources, texts, weights, strict=True):
            plan = align(tokenizer, source, target, weights=dials.weights if weight else {})
            factors, marked = plan.weights.clone(), plan.blend.clone()
            gone, new = changed_words(tokenizer, source, target)
            for side, word in [*((0, word) for word in gone), *((1, word) for word in new)]:
                factors[word.tokens] *= dials.reweight if side else 1
                marked[side, word.tokens] = dials.automatic or dials.control == "p2p+blend"
            plans.append(plan._replace(weights=factors, blend=marked))
    return plans


def changed_words(tokenizer, source, target):
    """The words of T that T' lacks, and those of T' that T lacks: two lists of Word."""
    mapper = align(tokenizer, source, target).mapper
    return [
        [word for word in split_words(tokenizer, text) if _is_new(word, kept)]
        for text, kept in ((source, mapper.sum(1)), (target, mapper.sum(0)))
    ]


def _is_new(word, kept):
    return word.text[0].isalnum() and not kept[word.tokens].any()


# The peers


def generator(seed, film_id, number=0):
    """A torch.Generator on the CPU, seeded by run, film and draw, whatever the batch."""
    return torch.Generator().manual_seed(Random(f"{seed}/{film_id}/{number}").getrandbits(60))


def _noise(job, number=0):
    """Noise (R, C, h, w), each film's own."""
    shape, ids = job.inversion.trajectory.shape[2:], job.inversion.film_ids
    draws = [torch.randn(shape, generator=generator(job.dials.seed, x, number)) for x in ids]
    return torch.stack(draws).to(job.model.device)


def by_sdedit(job):
    """SDEdit: noise the film's latent up to `strength`, and denoise it under T' (Meng 2022)."""
    job = job.alone()
    old = job.inversion
    alphas = [alpha_at(job.model, t) for t in levels(job.model, old.num_steps)[1:]]
    alphas = torch.stack(alphas)[:, None, None, None, None]
    noisy = alphas.sqrt() * old.trajectory[0] + (1 - alphas).sqrt() * _noise(job)
    trajectory = torch.cat([old.trajectory[:1], noisy])
    noised = Inversion(old.film_ids, old.captions, trajectory, model_key=old.model_key)
    dials = replace(job.dials, control="plain")
    return by_inversion(job._replace(inversion=noised, dials=dials))


@torch.no_grad()
def by_diffedit(job, num_draws=10):
    """DiffEdit: where T and T' differ on noised films, take T'; elsewhere DDIM's own path back.

    Couairon 2023: mask from noise at half the steps, mean of several draws; then a masked walk.
    """
    job, model, difference = job.alone(), job.model, 0
    t = levels(model, job.inversion.num_steps)[(job.inversion.num_steps + 1) // 2]
    alpha, z0 = alpha_at(model, t), job.inversion.trajectory[0]
    texts = job.embed([job.sources, *job.targets])  # (1 + J, R, L, D)
    for number in range(num_draws):
        z = alpha.sqrt() * z0 + (1 - alpha).sqrt() * _noise(job, number)
        eps = predict_noise(model, z.repeat(len(texts), 1, 1, 1), t, texts.flatten(0, 1))
        eps = eps.unflatten(0, texts.shape[:2])  # (1 + J, R, C, h, w)
        difference = difference + (eps[1:] - eps[:1]).abs().mean(2).amax(0) / num_draws
    mask, dials = diffedit_mask(difference)[:, None], job.dials
    bare = replace(job.inversion, offsets=None, eta=0.0, gamma=0.0)
    scale, options = dials.guidance_scale * job.weights, (dials.guidance_from, dials.strength)
    for step in walk_down(model, bare, texts[1:], None, scale, *options):
        step.z = torch.where(mask, step.z, step.source)
    return step.z, [difference]


def by_leditspp(job):
    """LEDITS++ as diffusers has it (Brack 2024), a film at a time: words gone, words new."""
    from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion  # slow

    model, made = job.model, [None] * len(job.rows)
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config, **settings)
    parts = (model.vae, model.text_encoder, _Tokenizer(model.tokenizer), model.unet, scheduler)
    pipe = LEditsPPPipelineStableDiffusion(*parts, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    num_steps, skip = job.inversion.num_steps, 1 - job.dials.strength
    before = model.unet.attn_processors
    try:
        with autocast(model), _Channels(job.inversion.trajectory.shape[2]):
            for row in sorted(set(job.rows)):
                edits = [i for i, own in enumerate(job.rows) if own == row]
                film = torch.tensor(job.films[edits[0]]).expand(1, 3, -1, -1)
                draw = generator(job.dials.seed, job.inversion.film_ids[row])
                pipe.invert(film, num_inversion_steps=num_steps, skip=skip, generator=draw)
                for i in edits:
                    made[i] = pipe(output_type="latent", **_signed(job, i)).images[0]
    finally:
        model.unet.set_attn_processor(before)
    return torch.stack(made).float(), []


def _signed(job, i):
    """Edit i in LEDITS++'s words: phrases, their guidance, and which are to go."""
    concepts = []
    for texts, weight in zip(job.targets, job.weights[:, i].tolist(), strict=True):
        gone, new = changed_words(job.model.tokenizer, job.sources[i], texts[i])
        for words, away in ((gone, weight > 0), (new, weight < 0)):
            if words and weight:
                phrase = " ".join(word.text for word in words)
                concepts.append((phrase, job.dials.guidance_scale * abs(weight), away))
    names = ("editing_prompt", "edit_guidance_scale", "reverse_editing_direction")
    return {name: [c[n] for c in concepts] for n, name in enumerate(names) if concepts}


class _Tokenizer:
    """A tokenizer whose `length` leaves out the padding, as LEDITS++ expects of it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *texts, **options):
        tokens = self.tokenizer(*texts, **options)
        tokens["length"] = tokens["attention_mask"].sum(1)
        return tokens


class _Channels(TorchFunctionMode):
    """LEDITS++ repeats its masks over 4 channels: here over as many as the latents have."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.repeat and args[1:] == (1, 4, 1, 1):
            args = (args[0], 1, self.channels, 1, 1)
        return func(*args, **(kwargs or {}))


EDITORS = {
    "inversion": by_inversion,
    "sdedit": by_sdedit,
    "diffedit": by_diffedit,
    "ledits++": by_leditspp,
}
