"""Masks: where an edit may act, and the film as it was everywhere else (paper App. H; Figs 3, 4).

Evidence of change, |eps(T') - eps(T)|, attention to the changed words, pixels that moved, is
multiplied, cut by Otsu's threshold and cleaned; `composite` then takes the edit inside and the
film outside, bit for bit. Shapes: R edits; evidence (R, h, w) of any size, never negative; films
(R, H, W) in [0, 1]; masks (R, H, W) bool. Used by notebook 04.
"""

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import interpolate

from prism_nb.diffusion import predict_noise
from prism_nb.images import uint8_to_unit, unit_to_uint8

VISIBLE = 0.5 / 255  # half a grey level: no 8-bit film shows a smaller change
# A film is kept where the edit would alter it by less than this: what a VAE loses of most grain.
# Of .03 to .05 on twelve films an edit, each a trade between what is removed and what is spared.
FINE = 0.04
SURE = 0.25  # and where it moves less than this share of what the VAE loses there, as at letters


class NoiseDifference:
    """walk_down's `predict` that watches where an edit points: eps(T') - eps(T), at its latents.

    It sums the size of that for `map`, and takes out of it what it shares with held directions,
    eps(H) - eps(T). source: embeddings of T (R, L, D); weights (J, R) of the targets; held: those
    of captions H (K, R, L, D); has_source: T is the walk's own base, so it costs no call.
    """

    def __init__(self, source, weights, held=(), has_source=False):
        self.source, self.weights, self.held = source, weights, list(held)
        self.has_source, self.total, self.num_calls = has_source, 0, 0

    def __call__(self, model, z, t, cond):
        """As predict_noise; the targets are the last J R rows, the base the first R."""
        num_edits, num_rows = len(self.source), len(z)
        more = [*([] if self.has_source else [self.source]), *self.held]
        latents = torch.cat([z, *[z[-num_edits:]] * len(more)])
        eps = predict_noise(model, latents, t, torch.cat([cond, *more]))
        edits = eps[num_rows - self.weights.numel() : num_rows].unflatten(0, self.weights.shape)
        rest = eps[num_rows:].unflatten(0, (-1, num_edits)) if more else eps[:0]
        own, held = (eps[:num_edits], rest) if self.has_source else (rest[0], rest[1:])
        steps = edits - own  # (J, R, C, h, w)
        if self.held:
            steps = without(steps, held - own)
            eps[num_rows - self.weights.numel() : num_rows] = (own + steps).flatten(0, 1)
        sizes = steps.abs().mean(2) * self.weights.abs()[..., None, None]
        self.total, self.num_calls = self.total + sizes.amax(0), self.num_calls + 1
        return eps[:num_rows]

    @property
    def map(self):
        """Mean over the steps of |w (eps(T') - eps(T))|, the largest over targets: (R, h, w)."""
        return self.total / max(self.num_calls, 1)


def without(steps, held):
    """Take from each film's steps (J, R, ...) their part in the span of held ones (K, R, ...)."""
    span = held.flatten(2).permute(1, 2, 0)  # (R, n, K)
    flat = steps.flatten(2).permute(1, 2, 0)  # (R, n, J)
    left = flat - span @ (torch.linalg.pinv(span) @ flat)
    return left.permute(2, 0, 1).reshape(steps.shape)


def automatic(edited, reconstruction, evidence=(), threshold=0.8, films=None):
    """Where edits acted, (R, H, W) bool: where pixels moved, times other evidence (R, h, w).

    threshold: times Otsu's; below 1 masks grow. Where no pixel moved by half a grey level a mask
    is empty. Specks of less than 1 / 2000 of the film go; the rest gets a margin of side / 64.
    films: given, what is left shrinks to where they would change by FINE, and side / 128 around,
    and where the edit moved SURE of what the VAE loses there, however small the islands: texture
    and letters that it only blurs stay.
    """
    pixels = _smooth(np.abs(np.asarray(edited, np.float64) - reconstruction))
    joint = pixels
    for other in evidence:
        other = torch.as_tensor(other, dtype=torch.float64)[:, None].cpu()
        if other.shape[:1] != joint.shape[:1]:
            raise ValueError(f"evidence of {len(other)} edits, pixels of {len(joint)}: give alike")
        large = interpolate(other, joint.shape[1:], mode="bilinear")[:, 0].numpy()
        joint = joint * large / np.maximum(large.max((1, 2), keepdims=True), 1e-12)
    joint = joint ** (1 / (1 + len(evidence)))  # the geometric mean: each has an equal say
    cuts = [threshold * otsu(one) for one in joint]
    near = (joint > np.reshape(cuts, (-1, 1, 1))) & (pixels > VISIBLE)
    masks = np.stack([_clean(one) for one in near])
    if films is None:
        return masks
    return (
        masks & _altered(films, edited) & (pixels > SURE * _smooth(np.abs(films - reconstruction)))
    )


def _altered(films, edited):
    """Where edits alter films (R, H, W) by FINE or more, and a little around."""
    side = films.shape[-1]
    sharp = ndimage.gaussian_filter(np.abs(edited - films), (0, side / 366, side / 366)) > FINE
    around = ndimage.generate_binary_structure(2, 1)[None]
    return ndimage.binary_dilation(sharp, around, iterations=max(1, side // 128))


def otsu(values):
    """Otsu's threshold (1979): the cut that best parts values in two; infinite if all are alike."""
    if np.ptp(values) <= 1e-9 * np.abs(values).max():
        return np.inf
    counts, edges = np.histogram(values, 256)
    below = counts.cumsum()[:-1]
    sums = (counts * (edges[:-1] + edges[1:]) / 2).cumsum()
    above, rest = counts.sum() - below, sums[-1] - sums[:-1]
    between = below * above * (sums[:-1] / below - rest / above) ** 2
    return edges[1:-1][between >= (1 - 1e-9) * between.max()].mean()  # the middle of a gap


def _clean(mask):
    """Drop islands and widen by a margin."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the ground
    mask = (sizes >= max(2, mask.size / 2000))[labels]
    margin = max(1, mask.shape[0] / 64)
    return mask if mask.all() or not mask.any() else ndimage.distance_transform_edt(~mask) <= margin


def _smooth(films):
    sigma = films.shape[-1] / 128
    return ndimage.gaussian_filter(films, (0, sigma, sigma))


def diffedit_mask(difference):
    """DiffEdit's mask of differences (R, h, w), clipped at 3 means and scaled: above a half."""
    top = 3 * difference.mean((1, 2), keepdim=True)
    return torch.minimum(difference, top) / top.clamp_min(1e-12) > 0.5


def as_mask(mask, shape, name="mask"):
    """A given mask (H, W) or (R, H, W), of bool or of 0 and 1, as bool of `shape` (R, H, W)."""
    mask = np.asarray(mask)
    kept = mask if mask.dtype == bool else mask == 1
    if mask.shape not in (shape, shape[1:]) or not (kept | (mask == 0)).all():
        need = f"give True and False (or 1 and 0) as {shape[1:]} or {shape}"
        raise ValueError(f"{name} is {mask.dtype} {mask.shape}: {need}")
    return np.broadcast_to(kept, shape)


def union(masks, keep=None):
    """Where any of the masks (R, H, W) lets an edit act and `keep` does not: keep wins."""
    joint = np.logical_or.reduce(masks)
    return joint if keep is None else joint & ~keep


def restore_detail(films, reconstruction, edited, amount=1.0, residual=0.02):
    """Give edited films back the grain that the VAE lost: (R, H, W) in [0, 1].

    Adds amount (0 is off) of film - reconstruction where the VAE reproduces the film (the local
    RMS of what it lost is well below `residual`): a thin wire that it cannot code must not come
    back once removed.
    """
    if amount == 0:
        return edited
    lost = films - reconstruction
    gate = np.exp(-_smooth(lost**2) / residual**2)
    return np.clip(edited + amount * gate * lost, 0, 1).astype(edited.dtype)


def composite(films, edited, masks, feather=0):
    """The edit inside the masks, the film itself outside, bit for bit; all (R, H, W).

    films: uint8 or floats in [0, 1], as is the result. feather: pixels inside a mask over which
    the edit fades in from its border.
    """
    films, edited, masks = np.asarray(films), np.asarray(edited), np.asarray(masks)
    if not films.shape == edited.shape == masks.shape or films.ndim != 3:
        given = f"films {films.shape}, edits {edited.shape}, masks {masks.shape}"
        raise ValueError(f"{given}: all must be (R, H, W)")
    if edited.dtype.kind != "f" or masks.dtype != bool:
        raise ValueError(f"edits are {edited.dtype}, masks {masks.dtype}: give floats and bool")
    whole, share = films.dtype == np.uint8, np.stack([_ramp(mask, feather) for mask in masks])
    unit = uint8_to_unit(films) if whole else films
    inside = np.where(share == 1, edited, unit + share * (edited - unit))
    inside = unit_to_uint8(inside) if whole else inside.astype(films.dtype)
    return np.where(masks, inside, films)


def _ramp(mask, feather):
    """How much of the edit each pixel of a mask (H, W) takes; a film's edge is no border."""
    if feather == 0 or mask.all():
        return np.ones(mask.shape)
    return np.minimum(ndimage.distance_transform_edt(mask) / (feather + 1), 1)
