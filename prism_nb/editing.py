"""Editing: inversion x control x mask gives the counterfactual film (paper 2.3, Figures 3 and 4).

`edit` takes films, their Inversion and target captions. A preset names the dials, and what is
given besides overrides it; peers (SDEdit, DiffEdit, LEDITS++) stand behind the same call. Outside
its mask an edited film equals the film it was made of, exactly. Shapes: R edits; films (B, H, W),
made (R, H, W), in [0, 1]. Used by notebook 04.
"""

from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from prism_nb import masks as m
from prism_nb.attention import split_words
from prism_nb.captions import PromptError
from prism_nb.diffusion import decode_latents, film_side
from prism_nb.editors import EDITORS, Dials, Job
from prism_nb.findings import nearest
from prism_nb.images import uint8_to_unit


class Preset(NamedTuple):
    """A way to edit: what `invert` is to be called with, and the dials of `edit`."""

    inversion: dict
    dials: Dials


_PRISM = {"guidance_scale": 7.5, "control": "p2p", "reweight": 2.0, "mask": "none"}
_PEER = {"guidance_scale": 7.5, "guidance_from": "empty", "mask": "none"}
PRESETS = {
    "default": Preset({"method": "direct"}, Dials()),
    "prism": Preset(
        {"method": "null_text", "guidance_scale": 7.5, "num_inner": 10},
        Dials(guidance_from="tuned", **_PRISM),  # as published: cross .8, self .5
    ),
    "sdedit": Preset({"method": "ddim"}, Dials("sdedit", strength=0.5, **_PEER)),
    "diffedit": Preset({"method": "ddim"}, Dials("diffedit", strength=0.8, **_PEER)),
    "ledits++": Preset(
        {"method": "ddim"}, Dials("ledits++", strength=0.85, **_PEER | {"guidance_scale": 5.0})
    ),
}


@dataclass
class Edited:
    """Counterfactual films, and where they differ from those they were made of."""

    films: np.ndarray  # (R, H, W) float32 in [0, 1]; outside the masks, the given films exactly
    masks: np.ndarray  # (R, H, W) bool
    area: np.ndarray  # (R,) share of the film that its mask covers
    raw: np.ndarray | None = None  # (R, H, W) as decoded: no mask, no detail


def edit(
    model,
    inversion,
    films,
    rows,
    targets,
    *,
    preset=None,
    batch_size=8,
    progress=None,
    keep_raw=False,
    **dials,
):
    """Make the counterfactuals of inverted films under target captions: Edited.

    films: those of the inversion, uint8 or floats in [0, 1]. rows: R positions in it, which may
    repeat. targets: R captions T', or for each a list of (caption, signed weight). preset: one of
    PRESETS, by default the method's own; dials: those of Dials to override. progress(done, total)
    is called after each batch. Raises ValueError in one line on what is wrong or does not fit.
    """
    dials, rows, targets = choose(preset, dials), [int(row) for row in rows], list(targets)
    films = _check(model, inversion, films, rows, targets, dials)
    shape = (len(rows), *films.shape[1:])
    given, keep = _given(dials, shape)
    made, raw, masks = (np.empty(shape, kind) for kind in (np.float32, np.float32, bool))
    order = sorted(range(len(rows)), key=rows.__getitem__)  # edits of one film share a batch
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        job = _job(model, inversion, films, [(rows[i], targets[i]) for i in part], dials)
        raw[part], floor, evidence = _generate(job)
        seen = raw[part], floor, evidence, dials.threshold, job.films
        here = [_mask(one, part, *seen) for one in given]
        masks[part] = m.union(here, None if keep is None else keep[part])
        inside = m.restore_detail(job.films, floor, raw[part], dials.grain)
        made[part] = m.composite(job.films, inside, masks[part], dials.feather)
        if progress:
            progress(start + len(part), len(rows))
    return Edited(made, masks, masks.mean((1, 2)), raw if keep_raw else None)


def choose(preset, dials):
    """The Dials of a preset (None: of the method's own, or the default), some overridden."""
    preset = preset or (dials.get("method") if dials.get("method") in PRESETS else "default")
    names = [dial.name for dial in fields(Dials)]
    for what, name, known in [("preset", preset, PRESETS), *(("dial", n, names) for n in dials)]:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; the nearest is {nearest(name, known)!r}")
    return replace(PRESETS[preset].dials, **dials)


def _check(model, inversion, films, rows, targets, dials):
    """The films as float32 (B, H, W); ValueError, in one line, where something is wrong."""
    if len(rows) != len(targets) or not rows:
        raise ValueError(f"{len(rows)} films and {len(targets)} targets: give one caption a film")
    num_films = len(inversion.film_ids)
    if wrong := [row for row in rows if not 0 <= row < num_films]:
        raise ValueError(f"rows hold {wrong[0]}; give some from 0 to {num_films - 1}")
    inversion.check(model)
    texts = [[x] if isinstance(x, str) else [text for text, _ in x] for x in targets]
    for text in {*chain(*texts), *dials.hold}:
        if not text.strip():
            raise PromptError("a target caption is empty: say what the film is to show")
        split_words(model.tokenizer, text)  # PromptError where some are cut
    films, side = np.asarray(films), _side(model, inversion)
    if films.shape != (num_films, side, side):
        need = f"{num_films} grey films of {side} x {side}"
        raise ValueError(f"films are {films.shape}; the inversion is of {need}: give those")
    films = uint8_to_unit(films) if films.dtype == np.uint8 else films.astype(np.float32)
    fine = ((films >= 0) & (films <= 1)).all((1, 2))  # NaN is neither
    if not fine.all():
        film = inversion.film_ids[int(np.argmin(fine))]
        raise ValueError(f"film {film} is not in [0, 1]: give uint8, or finite floats in [0, 1]")
    return films


def _side(model, inversion):
    """The side of the films in pixels, from the latents'."""
    return film_side(model, inversion.trajectory.shape[-1])


def _given(dials, shape):
    """The masks asked for, "none", "auto" or (R, H, W) bool, and the one to keep, or None."""
    masks = dials.masks
    words = {mask for mask in masks if isinstance(mask, str)}
    if not masks or not words <= {"none", "auto"}:
        raise ValueError(f"mask is {dials.mask!r}; it must be 'none', 'auto', or an array")
    masks = [mask if isinstance(mask, str) else m.as_mask(mask, shape) for mask in masks]
    return masks, None if dials.keep is None else m.as_mask(dials.keep, shape, "keep")


def _job(model, inversion, films, edits, dials):
    """A batch of edits (row, target). A film with fewer captions than others gets its own T."""
    rows = [row for row, _ in edits]
    sources = [inversion.captions[row] for row in rows]
    each = [[(x, 1.0)] if isinstance(x, str) else list(x) for _, x in edits]
    most = max(1, *map(len, each))
    padded = [x + [(own, 0.0)] * (most - len(x)) for x, own in zip(each, sources, strict=True)]
    texts = [[concepts[j][0] for concepts in padded] for j in range(most)]
    weights = [[concepts[j][1] for concepts in padded] for j in range(most)]
    weights = torch.tensor(weights, dtype=torch.float32, device=model.device)
    return Job(model, inversion, films[rows], rows, sources, texts, weights, dials)


def _generate(job):
    """Films (R, H, W) as decoded, those that the VAE makes of the given ones, and the evidence.

    The VAE's are None where nothing needs them. Each film is decoded once, however many its edits.
    """
    z, evidence = EDITORS[job.dials.method](job)
    for row, latent in zip(job.rows, z, strict=True):
        if not latent.isfinite().all():
            film = job.inversion.film_ids[row]
            raise ValueError(f"an edit of film {film} is not finite: lower guidance_scale")
    raw = decode_latents(job.model, z).numpy()
    if not (job.dials.automatic or job.dials.grain):
        return raw, None, evidence
    rows, back = np.unique(job.rows, return_inverse=True)
    z0 = job.inversion.trajectory[0][torch.as_tensor(rows)]
    return raw, decode_latents(job.model, z0.to(job.model.device)).numpy()[back], evidence


def _mask(given, part, raw, floor, evidence, threshold, films):
    """One of the masks that were asked for, on a batch: (R, H, W) bool."""
    if not isinstance(given, str):
        return given[part]
    if given == "none":
        return np.ones(raw.shape, bool)
    return m.automatic(raw, floor, evidence, threshold, films)
