"""Metrics: how far a counterfactual went, whether it was the right way, and how sure we are (3.2).

One function a metric: arrays in, one number an image out, shape (B,). Images are float (B, H, W)
in [0, 1], one grey channel; a mask is bool (B, H, W); p_ is a classifier's probability, of one
head (B,) or of all heads (B, K). With x the factual, x^ the counterfactual and x* the true one,
which only the phantom knows: d = x^ - x is the edit that was made, D = x* - x the one wanted.
What is not defined (an empty mask, no change wanted) is NaN and is left out of the means.
Intervals resample patients, not films: films of one patient are not independent evidence.
Used by notebooks 05 and 06.
"""

from pathlib import Path

import numpy as np
import pandas as pd

VISIBLE = 8 / 255  # a smaller change is not seen
PSNR_CAP = 100.0  # decibels given to identical images, so that means stay finite
_RESAMPLED_AT_ONCE = 4_000_000  # numbers held while resampling: 32 MB


class MetricError(ValueError):
    """Images, probabilities or patients that a metric cannot use."""


def l1(factual, counterfactual):
    """Mean absolute change of a pixel: 0 to 1, lower is a smaller edit (Table 2).

    A low value alone proves nothing: doing nothing has 0, and a true counterfactual more.
    """
    return _mean(np.abs(_change(factual, counterfactual)))


def psnr(factual, counterfactual):
    """Peak signal-to-noise ratio in decibels, higher is closer; identical images get 100."""
    mse = _mean(_change(factual, counterfactual) ** 2)
    return -10 * np.log10(np.maximum(mse, 10 ** (-PSNR_CAP / 10)))


def ssim(factual, counterfactual):
    """Structural similarity in 11 x 11 Gaussian windows: -1 to 1, higher is closer, the same 1."""
    from torch import from_numpy
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    _change(factual, counterfactual)
    if not len(factual):
        return np.empty(0)
    x, x_cf = (from_numpy(_images(x, ""))[:, None] for x in (factual, counterfactual))
    return similarity(x_cf, x, data_range=1.0, reduction="none").numpy()


def lpips_weights():
    """Where LPIPS looks for the weights of torchvision's AlexNet: in torch's own cache."""
    from torch.hub import get_dir
    from torchvision.models import AlexNet_Weights

    return Path(get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name


def lpips(factual, counterfactual):
    """Perceptual distance over AlexNet's features: 0 and up, lower is closer, 0 the same.

    Nothing is fetched: MetricError says which file is missing. Trained on photographs, not on
    films.
    """
    import torch
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    _change(factual, counterfactual)
    if not (file := lpips_weights()).is_file():
        raise MetricError(
            f"LPIPS needs AlexNet's weights: put torchvision's {file.name} into {file.parent}."
        )
    both = (torch.tensor(_images(x, ""))[:, None] for x in (factual, counterfactual))
    with torch.inference_mode():
        x, x_cf = (films.expand(-1, 3, -1, -1) for films in both)
        return np.atleast_1d(distance(x, x_cf, reduction="none", normalize=True).numpy())


def sparsity(factual, counterfactual, threshold=VISIBLE):
    """Share of the pixels that visibly changed: 0 to 1, lower is a sparser edit."""
    return _mean((np.abs(_change(factual, counterfactual)) > threshold).astype(np.float32))


def composition(factual, regenerate, num_cycles=1):
    """L1 after so many null edits in a row: 0 to 1, lower is better, 0 for doing nothing.

    regenerate(films) asks for what is there: films (B, H, W) in and out.
    """
    films = factual
    for _ in range(num_cycles):
        films = regenerate(films)
    return l1(factual, films)


def reversibility(factual, there, back, num_cycles=1):
    """L1 after so many times there and back again: 0 to 1, lower is better, 0 for doing nothing.

    there(films) makes the edit and back(films) its opposite: films (B, H, W) in and out.
    """
    return composition(factual, lambda films: back(there(films)), num_cycles)


def cpg(p_factual, p_counterfactual, toward):
    """Counterfactual prediction gain, signed: -1 to 1, higher moved further toward the edit.

    p_ (B,): the edited head; toward: 1 where the finding was added, 0 where removed (one or B).
    """
    before, after = _probabilities(p_factual, p_counterfactual)
    return np.where(_toward(toward) == 1, 1, -1) * (after - before)


def cpg_absolute(p_factual, p_counterfactual):
    """The paper's counterfactual prediction gain: 0 to 1; it rewards the wrong way as well."""
    before, after = _probabilities(p_factual, p_counterfactual)
    return np.abs(after - before)


def flip(p_factual, p_counterfactual, toward, threshold=0.5):
    """Whether the prediction crossed to the wanted side: 1 or 0, higher is better.

    NaN where the factual was on the wanted side already: there was nothing to flip.
    """
    before, after = _probabilities(p_factual, p_counterfactual)
    wanted = _toward(toward) == 1
    there, arrived = (before >= threshold) == wanted, (after >= threshold) == wanted
    return np.where(there, np.nan, arrived.astype(float))


def leakage(p_factual, p_counterfactual, head, p_true=None):
    """How much the other heads moved: 0 to 1, lower is better.

    p_ (B, K): all heads; head: the edited one's number. With p_true (the true counterfactual's)
    they are to move as the truth moves them: 0 is then the perfect editor's. One head only: NaN.
    """
    before, after = _probabilities(p_factual, p_counterfactual, heads=True)
    others = np.arange(before.shape[1]) != head
    if others.all():
        raise MetricError(f"head is {head!r}; it must be a number from 0 to {len(others) - 1}.")
    if not others.any():
        return np.full(len(before), np.nan)
    wanted = before if p_true is None else _probabilities(p_factual, p_true, heads=True)[1]
    return np.abs(after - wanted)[:, others].mean(axis=1)


def identity_shift(p_factual, p_counterfactual):
    """How much the film became another person's: 0 to 1, lower is better, 0 for doing nothing.

    p_ (B, K): a classifier's probabilities of what no edit may touch, such as sex and age.
    """
    before, after = _probabilities(p_factual, p_counterfactual, heads=True)
    return np.abs(after - before).mean(axis=1)


def kid(features, others, num_subsets=100, subset_size=50, seed=0):
    """Kernel distance between two sets of films: (mean, standard deviation) over subsets.

    features (N, D), others (M, D): a classifier's, of films that need not be paired. Unbiased, so
    around 0, below it too, for sets of one kind; higher is farther apart. subset_size is at most
    the smaller set. Our classifier's features: not comparable with numbers of other work.
    """
    sets = [np.asarray(part, dtype=np.float64) for part in (features, others)]
    if any(part.ndim != 2 or len(part) < 2 for part in sets):
        shapes = " and ".join(str(part.shape) for part in sets)
        raise MetricError(f"features have shape {shapes}; (N, D) with 2 films or more is needed.")
    rng, size = np.random.default_rng(seed), min(subset_size, *map(len, sets))
    values = [
        _mmd(*(part[rng.permutation(len(part))[:size]] for part in sets))
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _mmd(a, b):
    """Unbiased squared maximum mean discrepancy under the kernel (a . b / D + 1)^3."""
    n, kernel = len(a), lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = sum(k.sum() - np.trace(k) for k in (kernel(a, a), kernel(b, b)))
    return within / (n * (n - 1)) - 2 * kernel(a, b).mean()


def true_error(factual, counterfactual, truth):
    """Distance to the truth over that of doing nothing: 0 is perfect, 1 no better than nothing.

    Over the whole film, so above 1 for an edit that harms more than it does. NaN where the truth
    changes nothing.
    """
    return ratio(l1(counterfactual, truth), l1(factual, truth))


def id_ratio(factual, counterfactual, truth):
    """Size of the edit over that of the true one: 1 is perfect, 0 none, > 1 too much.

    NaN where the truth changes nothing.
    """
    return ratio(l1(factual, counterfactual), l1(factual, truth))


def error_inside(counterfactual, truth, mask):
    """Mean absolute error to the truth where it should have changed: 0 to 1, lower is better.

    mask: where the true counterfactual differs. An empty one gives NaN.
    """
    return _masked_mean(np.abs(_change(truth, counterfactual, "truth")), mask)


def error_outside(counterfactual, truth, mask):
    """Mean absolute error to the truth where nothing should have changed: 0 to 1, lower is better.

    A mask that covers the whole image gives NaN.
    """
    error = np.abs(_change(truth, counterfactual, "truth"))
    return _masked_mean(error, ~_mask(mask, error))


def tea_effectiveness(factual, counterfactual, truth):
    """How much of the wanted change was made, <d, D> / |D|^2: 1 is perfect, 0 none, > 1 too much.

    Negative went the wrong way. NaN where the truth changes nothing.
    """
    made, wanted = edits_of(factual, counterfactual, truth)
    return ratio((made * wanted).sum(axis=1), (wanted**2).sum(axis=1))


def tea_amplification(factual, counterfactual, truth):
    """How much was changed besides the wanted change, |d - a D| / |D|: 0 and up, lower is better.

    a is the effectiveness. NaN where the truth changes nothing.
    """
    made, wanted = edits_of(factual, counterfactual, truth)
    effectiveness = tea_effectiveness(factual, counterfactual, truth)
    beside = made - np.nan_to_num(effectiveness)[:, None] * wanted
    return ratio(np.linalg.norm(beside, axis=1), np.linalg.norm(wanted, axis=1))


def over_edit(factual, counterfactual, truth, mask=None):
    """Share of the change that was made where none was wanted: 0 to 1, lower is better.

    mask: where change is wanted; without it, wherever truth and factual differ. Doing nothing is 0.
    """
    made, wanted = edits_of(factual, counterfactual, truth)
    inside = wanted != 0 if mask is None else _mask(mask, np.asarray(factual)).reshape(made.shape)
    total = np.abs(made).sum(axis=1)
    outside = (np.abs(made) * ~inside).sum(axis=1)
    return np.where(total > 0, ratio(outside, total), 0.0)


def under_edit(factual, counterfactual, truth):
    """Share of the wanted change still missing: 0 is perfect, 1 is doing nothing, lower is better.

    Measured where truth and factual differ; above 1 went the wrong way. NaN where they do not.
    """
    made, wanted = edits_of(factual, counterfactual, truth)
    missing = (np.abs(wanted - made) * (wanted != 0)).sum(axis=1)
    return ratio(missing, np.abs(wanted).sum(axis=1))


def iou_at_area(factual, counterfactual, truth, threshold=VISIBLE):
    """Overlap of the strongest changes with the true ones: 0 to 1, higher is better.

    As many pixels are taken as the truth visibly changes (|D| > threshold), so that nothing is
    tuned; ties at the last pixel count in proportion. NaN where the truth changes nothing visibly.
    """
    made, wanted = edits_of(factual, counterfactual, truth)
    pairs = zip(np.abs(made), np.abs(wanted) > threshold, strict=True)
    return np.array([_iou_at_area(strength, true) for strength, true in pairs], dtype=float)


def _iou_at_area(strength, true):
    area = int(true.sum())
    if area == 0:
        return np.nan
    last = np.partition(strength, -area)[-area]  # the area-th strongest change
    above, tied = strength > last, (strength == last) & (strength > 0)
    share = (area - above.sum()) / tied.sum() if tied.any() else 0.0
    hits = (above & true).sum() + share * (tied & true).sum()
    taken = above.sum() + share * tied.sum()
    return hits / (taken + area - hits)


def pointing_game(factual, counterfactual, mask, sigma=2.0):
    """Whether the strongest change lies where one was wanted: 1 or 0, higher is better.

    The change is smoothed over sigma pixels first. Doing nothing is 0; an empty mask gives NaN.
    """
    from scipy.ndimage import gaussian_filter

    change = np.abs(_change(factual, counterfactual))
    pairs = zip(gaussian_filter(change, (0, sigma, sigma)), _mask(mask, change), strict=True)
    hits = [s.any() and m.flat[s.argmax()] if m.any() else np.nan for s, m in pairs]
    return np.array(hits, dtype=float)


def bootstrap_interval(values, patients, num_bootstrap=1000, seed=0, level=0.95):
    """Mean over films with a percentile interval over resampled patients: (mean, low, high).

    values (B,), NaN left out; patients (B,). The same seed and patients give the same resamples.
    The bounds are NaN for fewer than two patients or num_bootstrap=0, the mean where no value is.
    """
    values, patients = np.asarray(values, dtype=float), np.asarray(patients, dtype=object)
    if values.shape != patients.shape or values.ndim != 1:
        raise MetricError(
            f"values have shape {values.shape} and patients {patients.shape}; one patient a value "
            "is needed."
        )
    known = ~np.isnan(values)
    values, codes = values[known], patient_codes(patients[known])
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    sums, films = np.bincount(codes, values), np.bincount(codes)
    # A resampled mean is a ratio of sums: patients with more films weigh more, as in the mean.
    draws = [(w @ sums) / (w @ films) for w in resample_patients(len(sums), num_bootstrap, seed)]
    return float(values.mean()), *percentile_bounds(draws, level)


def patient_codes(patients):
    """Number the patients 0, 1, ... in sorted order, whatever the order of the films."""
    if pd.isna(patients).any():
        raise MetricError("a film has no patient; give every film one, its own if need be.")
    return np.unique(np.asarray(patients).astype(str), return_inverse=True)[1]


def resample_patients(num_patients, num_bootstrap, seed):
    """Yield how often each patient was drawn, (r, num_patients), until num_bootstrap rows are out.

    Yields nothing for fewer than two patients: one alone says nothing about the next.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _RESAMPLED_AT_ONCE // max(1, num_patients))
    for start in range(0, num_bootstrap if num_patients > 1 else 0, rows):
        count = min(rows, num_bootstrap - start)
        drawn = rng.integers(0, num_patients, (count, num_patients))
        drawn += num_patients * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * num_patients)
        yield counts.reshape(count, num_patients).astype(float)


def percentile_bounds(draws, level=0.95):
    """The interval that holds `level` of the resampled values: (low, high), NaN without any."""
    draws = np.concatenate(draws) if len(draws) else np.array([])
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return np.nan, np.nan
    return tuple(float(q) for q in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))


def summarise(frame, by, values, patient="patient_id", num_bootstrap=1000, seed=0, level=0.95):
    """Mean and interval of each metric in each group: one row a group and metric.

    frame: one row an edit; by, values: column names (one or a list). Columns: by, metric,
    n (values that are not NaN), patients, mean, low, high. by=[] takes all rows as one group.
    """
    by = [by] if isinstance(by, str) else list(by)
    values = [values] if isinstance(values, str) else list(values)
    for name in [*by, *values, patient]:
        if name not in frame:
            raise MetricError(f"no column {name!r}; the table has {', '.join(map(str, frame))}.")
    rows = []
    groups = frame.groupby(by, sort=False, dropna=False) if by else [((), frame)]
    for key, group in groups:
        for name in values:
            known = group[group[name].notna()]
            interval = bootstrap_interval(known[name], known[patient], num_bootstrap, seed, level)
            size = (len(known), known[patient].nunique())
            rows.append((*key, name, *size, *interval))
    columns = [*by, "metric", "n", "patients", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _change(before, after, name="factual"):
    """after - before, (B, H, W), once both are images in [0, 1] of one shape."""
    before, after = _images(before, name), _images(after, "counterfactual")
    _same_shape(before, after, name)
    return after - before


def edits_of(factual, counterfactual, truth):
    """The edit made and the edit wanted, both (B, H * W)."""
    factual, counterfactual = _images(factual, "factual"), _images(counterfactual, "counterfactual")
    truth = _images(truth, "truth")
    _same_shape(factual, counterfactual, "factual")
    _same_shape(truth, counterfactual, "truth")
    shape = (len(factual), -1) if len(factual) else (0, 0)
    return (counterfactual - factual).reshape(shape), (truth - factual).reshape(shape)


def _images(images, name):
    images = np.asarray(images)
    if images.ndim != 3:
        raise MetricError(f"{name} has shape {images.shape}; (B, H, W), one grey channel, needed.")
    low, high = (images.min(), images.max()) if images.size else (0.0, 0.0)
    if images.dtype.kind == "f" and low >= -1e-6 and high <= 1 + 1e-6:
        return images.astype(np.float32, copy=False)
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise MetricError(f"{name} holds values that are not finite; [0, 1] is needed.")
    convert = "sd_to_unit" if low < 0 else "uint8_to_unit"
    raise MetricError(
        f"{name} is {images.dtype} and spans [{low:.4g}, {high:.4g}]; float in [0, 1] is needed. "
        f"Use images.{convert}."
    )


def _same_shape(images, counterfactual, name):
    if images.shape != counterfactual.shape:
        raise MetricError(
            f"{name} has shape {images.shape} and counterfactual {counterfactual.shape}; "
            "they must be the same. Resize before measuring."
        )


def _mask(mask, images):
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != images.shape:
        raise MetricError(
            f"mask is {mask.dtype} of shape {mask.shape}; bool of shape {images.shape} is needed."
        )
    return mask


def _masked_mean(error, mask):
    mask = _mask(mask, error)
    return ratio((error * mask).sum(axis=(1, 2)), mask.sum(axis=(1, 2)))


def _mean(values):
    return values.mean(axis=(1, 2)) if values.size else np.full(len(values), np.nan)


def ratio(above, below):
    """above / below, NaN where below is 0."""
    below = np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def _probabilities(before, after, heads=False):
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    shape = "(B, K)" if heads else "(B,)"
    if before.shape != after.shape or before.ndim != 1 + heads:
        raise MetricError(f"shapes are {before.shape} and {after.shape}; both {shape} needed.")
    if not all(((p >= 0) & (p <= 1)).all() for p in (before, after)):
        raise MetricError("probabilities from 0 to 1 are needed; these are not (logits, NaN?).")
    return before, after


def _toward(toward):
    toward = np.asarray(toward, dtype=float)
    if not np.isin(toward, (0, 1)).all():
        raise MetricError("toward must be 1 (the finding was added) or 0 (removed).")
    return toward
