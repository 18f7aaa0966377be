"""Inversion: the noise that a film came from (paper Appendix B, Figure 5).

`invert` climbs from z0 to noise by one of METHODS; regeneration.py walks down again from the
`Inversion` that it returns. Both call the U-Net at the *noisier* timestep of each step, as
diffusers' DDIM schedulers do. Step k joins level k to k + 1: N steps, N + 1 levels, the film at
level 0. Shapes: z0 (B, C, h, w); trajectory (N + 1, B, C, h, w), z0 first; cond (B, L, D).
Used by notebooks 03 and 04.
"""

import hashlib
import inspect
import json
import weakref
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, zip_longest
from numbers import Real

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prism_nb.diffusion import (
    alpha_at,
    ddim_step,
    embed_captions,
    predict_noise,
    timesteps,
    weights_hash,
)
from prism_nb.files import atomic_path, plain
from prism_nb.findings import nearest

NO_TENSORS = dict.fromkeys(("trajectory", "offsets", "uncond", "inner_steps"))
GUIDANCE_FROM = ("empty", "source", "tuned")  # empty caption, the film's own, Inversion.uncond
RANGES = {
    "num_steps": (1, 999),
    "guidance_scale": (0, 50),
    "num_inner": (0, 100),
    "learning_rate": (0, 1),
    "eta": (0.01, 1),
    "gamma": (0.5, 1),
    "strength": (0, 1),
    "seed": (0, 2**63),
    "chunk": (1, 2**16),
}
DIVERGED = 10  # times the spread of noise, or of the latents where that is more
_KEYS = weakref.WeakKeyDictionary()  # U-Net -> (state of its parameters, model_key)


@dataclass
class Inversion:
    """Inverted films: what every edit of them starts from, and what returns them exactly."""

    film_ids: list
    captions: list
    trajectory: torch.Tensor  # (N + 1, B, C, h, w) float32, z0 first, the noise last
    method: str = "ddim"
    guidance_scale: float = 1.0  # at which the films return
    guidance_from: str = "empty"  # one of GUIDANCE_FROM: where guidance starts for this method
    eta: float = 0.0  # 0 steps down by DDIM, 1 by DDPM
    gamma: float = 0.0  # above 0: bi-directional steps
    model_key: str = ""  # of the model that inverted; empty means not known
    offsets: torch.Tensor | None = None  # (N, B, C, h, w), added to each step; ddpm: sigma * noise
    uncond: torch.Tensor | None = None  # (N, B, L, D), the tuned empty caption of null_text
    inner_steps: torch.Tensor | None = None  # (N, B), optimiser steps that null_text really ran

    @property
    def num_steps(self):
        """Number of DDIM steps N."""
        return len(self.trajectory) - 1

    @property
    def noise(self):
        """The noise zN (B, C, h, w)."""
        return self.trajectory[-1]

    def select(self, rows):
        """The Inversion of some of the films, by position; rows may repeat."""
        rows, num_films = [int(row) for row in rows], len(self.film_ids)
        wrong = [row for row in rows if not 0 <= row < num_films] if rows else ["none"]
        if wrong:
            raise ValueError(f"rows hold {wrong[0]}; give one or more from 0 to {num_films - 1}")
        texts = {n: [getattr(self, n)[row] for row in rows] for n in ("film_ids", "captions")}
        return replace(self._map(lambda x: x[:, rows]), **texts)

    def to(self, device):
        """The same Inversion with its tensors on a device."""
        return self._map(lambda x: x.to(device))

    def check(self, model, captions=None):
        """Raise ValueError where another model made the inversion, or other captions."""
        if self.model_key and self.model_key != model_key(model):
            raise ValueError(
                f"this inversion ({self.method}) is of another model than {model.base_model}: "
                "invert the films again with this model (03_invert)"
            )
        if captions is not None and list(captions) != self.captions:
            pairs = zip_longest(self.film_ids, self.captions, captions)
            film, own, given = next(pair for pair in pairs if pair[1] != pair[2])
            raise ValueError(f"film {film} was inverted as {own!r}, not {given!r}: invert it again")

    def save(self, folder):
        """Write inversion.safetensors, whole or not at all; what is no tensor is in its header."""
        about = asdict(replace(self, **NO_TENSORS))
        tensors = {name: x.contiguous() for name, x in self._tensors().items()}
        with atomic_path(folder / "inversion.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"inversion": json.dumps(plain(about))})

    def _tensors(self):
        return {name: getattr(self, name) for name in NO_TENSORS if getattr(self, name) is not None}

    def _map(self, change):
        return replace(self, **{name: change(x) for name, x in self._tensors().items()})


def load_inversion(folder):
    """Read an Inversion; raises ValueError with one line when its file is missing or damaged."""
    path = folder / "inversion.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Inversion(**json.loads(file.metadata()["inversion"]) | tensors)
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): run 03_invert again") from error


def concat(parts):
    """One Inversion of all films of several, which must agree in method, steps, dials and model."""
    bare = {"film_ids": [], "captions": [], **NO_TENSORS}
    kinds = [(replace(part, **bare), part.num_steps) for part in parts]
    if not parts or any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{len(parts)} inversions: give some, of one method, dials, steps, model")
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts], 1) for name in parts[0]._tensors()
    }
    texts = {n: [x for part in parts for x in getattr(part, n)] for n in ("film_ids", "captions")}
    return replace(parts[0], **texts, **tensors)


def model_key(model):
    """SHA-256 of the U-Net's weights and the scheduler, kept while no weight changes."""
    settings = {k: v for k, v in dict(model.scheduler.config).items() if k[0] != "_"}
    settings = json.dumps(settings, sort_keys=True, default=str)
    state = [settings, *((id(p), p._version) for p in model.unet.parameters())]
    known, key = _KEYS.get(model.unet, (None, ""))
    if known != state:
        key = hashlib.sha256((settings + weights_hash(model.unet)).encode()).hexdigest()
        _KEYS[model.unet] = state, key
    return key


# Levels and steps


def levels(model, num_steps):
    """Noise levels from clean to noise: -1 (the film itself), then DDIM's N timesteps, rising."""
    return [-1, *timesteps(model, num_steps).tolist()]


def step_down(z, eps, alpha_from, alpha_to, eta=0.0):
    """The mean of DDIM's step to less noise (Song 2020, eq. 12): eta 0 is DDIM, eta 1 DDPM."""
    variance = eta**2 * (1 - alpha_to) / (1 - alpha_from) * (1 - alpha_from / alpha_to)
    z0 = (z - (1 - alpha_from).sqrt() * eps) / alpha_from.sqrt()
    return alpha_to.sqrt() * z0 + (1 - alpha_to - variance).sqrt() * eps


def guided_noise(model, z, t, cond, uncond, guidance_scale):
    """Noise prediction under classifier-free guidance; both branches run as one batch."""
    if guidance_scale == 1.0:
        return predict_noise(model, z, t, cond)
    t = torch.cat([t, t]) if torch.is_tensor(t) and t.ndim else t
    both = predict_noise(model, torch.cat([z, z]), t, torch.cat([uncond.expand_as(cond), cond]))
    eps_uncond, eps_cond = both.chunk(2)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def alphas_of(model, num_steps):
    """Alpha-bar (N + 1,) of each level, the film's first."""
    return torch.stack([alpha_at(model, t) for t in levels(model, num_steps)])  # (N + 1,)


def _empty(model, guidance_scale):
    return None if guidance_scale == 1.0 else embed_captions(model, [""])


# The ways up: each returns what its Inversion needs beside ids and captions


@torch.no_grad()
def ddim_invert(model, z0, cond, num_steps, num_inner=0):
    """Walk z0 (B, C, h, w) up to noise with its own caption: the trajectory (N + 1, B, C, h, w).

    The noise is predicted from the latent below, then num_inner times from the latent it led to.
    """
    trajectory = [z0.float()]
    for t_from, t_to in pairwise(levels(model, num_steps)):
        alpha_from, alpha_to = alpha_at(model, t_from), alpha_at(model, t_to)
        z = trajectory[-1]
        for _ in range(num_inner + 1):
            z = ddim_step(trajectory[-1], predict_noise(model, z, t_to, cond), alpha_from, alpha_to)
        trajectory.append(z)
    return torch.stack(trajectory)


def invert_ddim(model, z0, cond, num_steps):
    """DDIM inversion: fast and approximate (Song 2020, eq. 12 reversed)."""
    return {"trajectory": ddim_invert(model, z0, cond, num_steps)}


def invert_fixed_point(model, z0, cond, num_steps, num_inner=4):
    """DDIM inversion with each step iterated toward the latent that leads back (Garibi 2024)."""
    return {"trajectory": ddim_invert(model, z0, cond, num_steps, num_inner)}


def invert_negative_prompt(model, z0, cond, num_steps):
    """DDIM inversion; guidance starts from the film's own caption (Miyake 2023)."""
    return {**invert_ddim(model, z0, cond, num_steps), "guidance_from": "source"}


def invert_direct(model, z0, cond, num_steps, guidance_scale=1.0, num_inner=0, chunk=16):
    """DDIM inversion, and at each step the offset that leads back onto it exactly (Ju 2023)."""
    trajectory = ddim_invert(model, z0, cond, num_steps, num_inner)
    return _with_offsets(model, trajectory, cond, guidance_scale, 0.0, chunk)


def invert_ddpm(
    model, z0, cond, num_steps, film_ids, guidance_scale=1.0, eta=1.0, seed=0, chunk=16
):
    """Edit-friendly inversion: noise of its own at each level (Huberman-Spiegelglas 2023).

    The noise is drawn from (seed, film id), whatever the batch and its order.
    """
    alphas = alphas_of(model, num_steps)[1:, None, None, None, None]
    draws = [_draw(seed, film, (num_steps, *z0.shape[1:])) for film in film_ids]
    noise = torch.stack(draws, dim=1).to(z0.device)  # (N, B, C, h, w)
    noisy = alphas.sqrt() * z0.float() + (1 - alphas).sqrt() * noise
    trajectory = torch.cat([z0.float()[None], noisy])
    return _with_offsets(model, trajectory, cond, guidance_scale, eta, chunk)


@torch.no_grad()
def _with_offsets(model, trajectory, cond, guidance_scale, eta, chunk):
    """What each step down misses of the trajectory; levels do not wait for one another."""
    num_steps, num_films = len(trajectory) - 1, trajectory.shape[1]
    alphas = alphas_of(model, num_steps)[:, None, None, None, None]
    z = trajectory[1:].flatten(0, 1)  # (N * B, C, h, w)
    t = torch.tensor(levels(model, num_steps)[1:], device=z.device).repeat_interleave(num_films)
    empty, eps = _empty(model, guidance_scale), []
    for rows in torch.arange(len(z), device=z.device).split(chunk):
        source = cond[rows % num_films]
        eps.append(guided_noise(model, z[rows], t[rows], source, empty, guidance_scale))
    eps = torch.cat(eps).view_as(trajectory[1:])
    offsets = trajectory[:-1] - step_down(trajectory[1:], eps, alphas[1:], alphas[:-1], eta)
    return {"trajectory": trajectory, "offsets": offsets, "eta": eta} | _guided(guidance_scale)


@torch.no_grad()
def invert_bdia(model, z0, cond, num_steps, guidance_scale=1.0, gamma=1.0):
    """Bi-directional integration: each step can be solved for either end (Zhang 2023)."""
    times, alphas = levels(model, num_steps), alphas_of(model, num_steps)
    empty = _empty(model, guidance_scale)
    below, z = z0.double(), z0.double()
    trajectory = [z]
    for k in range(num_steps):  # float64, so that rounding does not pile up over the steps
        eps = guided_noise(model, z.float(), times[max(k, 1)], cond, empty, guidance_scale)
        above = ddim_step(z, eps, alphas[k], alphas[k + 1])
        if k:
            above = above + (below - ddim_step(z, eps, alphas[k], alphas[k - 1])) / gamma
        below, z = z, above
        trajectory.append(z)
    return {"trajectory": torch.stack(trajectory).float(), "gamma": gamma} | _guided(guidance_scale)


def invert_null_text(
    model, z0, cond, num_steps, guidance_scale=7.5, num_inner=10, learning_rate=1e-2
):
    """DDIM inversion, then the empty caption tuned at each step to lead back (Mokady 2023).

    The latent is carried on, not set back onto the trajectory, and a step ends at a mean square of
    1e-5 + 2e-5 i, both as published: T' = T returns the film the nearer the more inner steps run,
    never exactly. `direct` at the same guidance does.
    """
    trajectory = ddim_invert(model, z0, cond, num_steps)
    times, alphas = levels(model, num_steps), alphas_of(model, num_steps)
    uncond = embed_captions(model, [""]).expand_as(cond)
    z, tuned, inner_steps = trajectory[-1], [], []
    for i, k in enumerate(reversed(range(num_steps))):
        with torch.no_grad():
            eps_cond = predict_noise(model, z, times[k + 1], cond)

        def step(rows, uncond, z=z, k=k, eps_cond=eps_cond):
            eps = predict_noise(model, z[rows], times[k + 1], uncond)
            eps = eps + guidance_scale * (eps_cond[rows] - eps)
            return step_down(z[rows], eps, alphas[k + 1], alphas[k])

        rate = learning_rate * (1 - i / max(100, 2 * num_steps))
        uncond, ran = _tune(step, uncond, trajectory[k], rate, num_inner, 1e-5 + i * 2e-5)
        with torch.no_grad():
            z = step(slice(None), uncond)
        tuned.insert(0, uncond)
        inner_steps.insert(0, ran)
    found = {"uncond": torch.stack(tuned), "inner_steps": torch.stack(inner_steps)}
    found |= {"guidance_scale": guidance_scale, "guidance_from": "tuned"}
    return {"trajectory": trajectory, **found}


@torch.enable_grad()
def _tune(step, uncond, target, rate, num_inner, tolerance):
    """Tune uncond (B, L, D) until step(rows, uncond) meets target; films stop one by one.

    Returns the tuned uncond and the optimiser steps (B,) that ran. A film takes one more step
    after its loss fell below the tolerance, as the published code does.
    """
    uncond = uncond.detach().clone().requires_grad_()
    adam = torch.optim.Adam([uncond], lr=rate)
    active = torch.arange(len(uncond), device=uncond.device)
    ran = torch.zeros(len(uncond), dtype=torch.int64, device=uncond.device)
    for _ in range(num_inner):
        losses = (step(active, uncond[active]) - target[active]).square().flatten(1).mean(1)
        (uncond.grad,) = torch.autograd.grad(losses.sum(), uncond)  # none for the U-Net's weights
        before = uncond.detach().clone()
        adam.step()
        with torch.no_grad():  # Adam's momentum would move films that have stopped
            before[active] = uncond[active]
            uncond.copy_(before)
        ran[active] += 1
        active = active[losses >= tolerance]
        if not len(active):
            break
    return uncond.detach(), ran


def _guided(guidance_scale):
    """Guidance that returns the films: from their own captions any weight does."""
    start = "source" if guidance_scale == 1.0 else "empty"
    return {"guidance_scale": guidance_scale, "guidance_from": start}


def _draw(seed, film, shape):
    digest = hashlib.sha256(f"{seed}/{film}".encode()).hexdigest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(digest[:15], 16)))


METHODS = {
    "ddim": invert_ddim,
    "fixed_point": invert_fixed_point,
    "negative_prompt": invert_negative_prompt,
    "null_text": invert_null_text,
    "direct": invert_direct,
    "ddpm": invert_ddpm,
    "bdia": invert_bdia,
}


def invert(model, z0, film_ids, captions, method="direct", num_steps=50, seed=0, **dials):
    """Invert the latents z0 (B, C, h, w) of films with their captions: one Inversion.

    seed: of the noise, where the method draws any, with the film's id. dials: the other keyword
    arguments of the method's own function. Raises ValueError on latents that
    are not finite (and says which film), and on a method, dial or value that does not exist.
    """
    if method not in METHODS:
        raise ValueError(f"no inversion {method!r}; the nearest is {nearest(method, METHODS)!r}")
    if not len(z0) == len(film_ids) == len(captions) > 0:
        raise ValueError(
            f"{len(z0)} latents, {len(film_ids)} film ids, {len(captions)} captions: give one each"
        )
    bad = [f for f, z in zip(film_ids, z0, strict=True) if not z.isfinite().all()]
    if bad:
        raise ValueError(f"the latent of film {bad[0]} is not finite: look at the film and the VAE")
    allowed = list(inspect.signature(METHODS[method]).parameters)[4:]
    more = {"film_ids": list(film_ids), "seed": seed}
    given = dials | {name: value for name, value in more.items() if name in allowed}
    unknown = [name for name in dials if name not in allowed]
    if unknown:
        raise ValueError(f"{method} has no dial {unknown[0]!r}; its dials: {allowed}")
    for name, value in {"num_steps": num_steps, "seed": seed, **dials}.items():
        check_range(name, value)
    cond = embed_captions(model, captions)
    z0 = z0.to(model.device).contiguous()  # as it will be read from a file
    found = METHODS[method](model, z0, cond, num_steps, **given)
    _check_noise(found["trajectory"][-1], z0, film_ids, method)
    key = model_key(model)
    return Inversion(list(film_ids), list(captions), method=method, model_key=key, **found)


def _check_noise(noise, z0, film_ids, method):
    """Refuse noise that is none: bdia's way up multiplies errors by 1 / gamma at every step."""
    ends, starts = (z.double().flatten(1).std(1).tolist() for z in (noise, z0))
    for film, end, start in zip(film_ids, ends, starts, strict=True):
        if not end <= DIVERGED * max(1.0, start):  # NaN is not
            say = "raise gamma or take fewer steps" if method == "bdia" else "look at the U-Net"
            raise ValueError(f"{method} diverged on film {film} (noise spreads {end:.3g}): {say}")


def check_range(name, value):
    """Raise ValueError where a dial is no number within its RANGES."""
    low, high = RANGES[name]
    if not (isinstance(value, Real) and low <= value <= high):
        raise ValueError(f"{name} is {value!r}; it must be a number from {low} to {high}")
