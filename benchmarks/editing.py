"""W6 to W8: inversion and editing (paper 2.3), against LANCE's, which the released code calls."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from benchmarks.paired import check, off
from benchmarks.peers import lance
from prism_nb import inversion
from prism_nb.diffusion import decode_latents, embed_captions, encode_films
from prism_nb.editing import edit
from prism_nb.images import uint8_to_unit
from prism_nb.inversion import ddim_invert, invert, invert_null_text
from prism_nb.metrics import psnr, true_error
from prism_nb.regeneration import regenerate

SHARES, NUM_TARGETS = (0.4, 0.5, 0.6, 0.7, 0.8), 4  # the released sweep of self_replace


def climbing(case):
    """W6: DDIM inversion of many films."""
    many, steps, model = case.scale.many, case.scale.steps, case.model
    films = uint8_to_unit(np.resize(case.cases.films, (many, *case.cases.films.shape[1:])))
    z0, text = encode_films(model, films), embed_captions(model, case.table["caption"][:many])
    exact = lance.climb(model, z0[:1], text[:1], steps)[-1]
    theirs, name = (case.half, "bf16") if case.gpu else (model, "fp32")
    half = replace(case.load(), dtype=torch.bfloat16)  # to be compiled; the peer's is not

    def peer():
        for n in range(many):
            lance.climb(theirs, z0[n : n + 1], text[n : n + 1], steps)

    for own in (half,) if case.brief else (half, model):
        bf16 = own is half

        def ours(own=own):
            return ddim_invert(own, z0, text, steps)

        gate = [check("noise, relative", off(ours()[-1, :1], exact), 0.05 if bf16 else 1e-3)]
        made = case.compiled(own.unet, ours)
        what = f"invert {many} films, {steps} steps, {'bf16' if bf16 else 'fp32'}{made}"
        target = (1.6, 6) if bf16 else (None, None)
        about = f"diffusers' DDIM, one by one, {name}", peer, gate, target, "a film", (many, many)
        yield case.time("W6", what, ours, *about, bf16=bf16)


def one_edit(case):
    """W7: films edited, ours by its default, the peer's by null-text and prompt-to-prompt."""
    cases, steps, half, count = case.cases, case.scale.steps, case.half, case.scale.edited
    films, few = uint8_to_unit(cases.films), 1 if case.gpu else min(count, 4)

    def ours():
        z0 = encode_films(half, films)
        found = invert(half, z0, cases.film_ids, cases.sources, num_steps=steps)
        return found, edit(half, found, films, range(count), cases.targets, batch_size=count).films

    def peer(row=0):
        film = cases.films[row], cases.sources[row], cases.targets[row]
        return lance.edit_film(case.model, *film, steps)

    found, made = ours()
    back = regenerate(half, found, embed_captions(half, cases.sources))[:few]
    theirs = [np.stack(part) for part in zip(*map(peer, range(few)), strict=True)]
    pairs = [(decode_latents(half, back).numpy(), theirs[0]), (made[:few], theirs[1])]
    truth = uint8_to_unit(cases.truth[:few])
    if case.parts:  # random weights make no edit to speak of, nor a film
        gate = no_worse(films[:few], truth, pairs[0], (truth, truth), slack=1)[:1]
    else:
        gate = no_worse(films[:few], truth, *pairs)
    gate.append(f"peer's loss small after {theirs[2].mean():.1f} of {lance.INNER} inner steps")
    about = "null-text, rebuilt, p2p, fp32, one by one", peer, gate, (10, 30), "a film", (count, 1)
    what = f"edit {count} films, {steps} steps, bf16"
    slow = {"pairs": 3, "slow": True} if case.gpu else {"pairs": 5}
    yield case.time("W7", what, ours, *about, bf16=True, **slow)


def no_worse(films, truth, back, made, slack=0.1):
    """The gate of W7: films come back as well as the peer's, and edits are as near to the truth.

    back, made: pairs of films (N, H, W) in [0, 1], ours and the peer's; slack in dB.
    """
    (ours, theirs), what = (psnr(films, x).mean() for x in back), "PSNR rebuilt, dB"
    gate = [check(f"{what} (n = {len(films)})", ours, theirs - slack, least=True)]
    ours, theirs = (np.nanmean(true_error(films, x, truth)) for x in made)
    return [*gate, check("error to the truth over doing nothing's", ours, theirs)]


@contextmanager
def forced():
    """Let null-text run all its inner steps: small and random models meet its tolerance at once."""
    tune = inversion._tune
    with mock.patch.object(inversion, "_tune", lambda *given: tune(*given[:-1], 0.0)):
        yield


def null_text(case):
    """W7b: null-text itself, ten inner steps in both."""
    model, steps, few = case.model, min(case.scale.steps, 2), min(case.scale.edited, 4)
    z0 = encode_films(model, uint8_to_unit(case.cases.films[:few]))
    text = embed_captions(model, case.cases.sources[:few])

    def ours():
        with forced():
            return invert_null_text(model, z0, text, steps, lance.GUIDANCE, lance.INNER)["uncond"]

    def peer():
        parts = [(z0[n : n + 1], text[n : n + 1]) for n in range(few)]
        return torch.cat([lance.null_text(model, *part, steps)[1] for part in parts], 1)

    gate = [check("tuned captions, relative", off(ours(), peer()), 0.01)]
    what, name = f"null-text, {few} films, {steps} steps", "LANCE's, one by one, U-Net not frozen"
    yield case.time("W7b", what, ours, name, peer, gate, (1.4, 4), "a film", (few, few))


def sweep(case):
    """W8: one film, five values of self_replace, four target captions."""
    steps, num, model = min(case.scale.steps, 4), len(SHARES) * NUM_TARGETS, case.model
    film, source = uint8_to_unit(case.cases.films[:1]), case.cases.sources[0]
    targets = [text for text in dict.fromkeys(case.table["caption"]) if text != source]
    targets = list(np.resize(targets, NUM_TARGETS))

    def inverted(model):
        return invert(model, encode_films(model, film), ["film"], [source], num_steps=steps)

    def edits(model, found, share, texts, **dials):
        dials |= {"control": "p2p", "mask": "none", "self_replace": share, "batch_size": len(texts)}
        return edit(model, found, film, [0] * len(texts), texts, **dials).films

    def shared(model=case.half):
        found = inverted(model)
        return np.concatenate([edits(model, found, share, targets) for share in SHARES])

    def one_by_one():
        each = [(share, [text]) for share in SHARES for text in targets]
        return np.concatenate([edits(model, inverted(model), *one) for one in each])

    def released():  # its loop puts the captions in one batch, where memory allows
        found = inverted(model)
        return [edits(model, found, share, targets, guidance_from="empty") for share in SHARES]

    alone, name = one_by_one(), "to one by one, dB"
    gate = [check(f"PSNR, fp32, {name}", psnr(shared(model), alone).min(), 40, least=True)]
    if not case.parts:  # random weights do not bear rounding
        gate += [check(f"bf16, {name}", psnr(shared(), alone).min(), 30, least=True)]
    what = f"a sweep, {len(SHARES)} values x {NUM_TARGETS} captions, {steps} steps, bf16"
    about, options = (gate, (2.8, 6), "an edit", (num, num)), {"bf16": True}
    name = "one by one, each inverted, fp32"
    yield case.time("W8", what, shared, name, one_by_one, *about, **options)
    yield case.time("W8b", what, shared, "the released sweep, fp32", released, *about, **options)
