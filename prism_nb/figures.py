"""Every figure of the notebooks: data and `ax=None` in, Axes out; nothing is shown or saved here.

One seaborn style, one colour-blind-safe palette. Films are shown in [0, 1] as radiologists see
them; difference maps are counterfactual - factual in [-1, 1], symmetric, blue where density was
lost. Used by all notebooks; `Run.save_figure` writes what they return.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from prism_nb import phantom

PALETTE = "colorblind"
DIFFERENCE = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
FILM = {"cmap": "gray", "vmin": 0, "vmax": 1}
ABSOLUTE = {"cmap": "magma", "vmin": 0, "vmax": 0.2}
MARKERS = "osD^vPX<>*"  # beside its colour, a shape of its own
RULE = {"color": "k", "lw": 1.8, "ls": "--", "zorder": 1.5}  # to be told from the grid's lines
NAMES = {  # as a reader knows them, where that differs from the name in the tables
    "VAE": "VAE alone",
    "inversion": "inverted and back",
    "sdedit": "SDEdit",
    "ledits++": "LEDITS++",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "bdia": "BDIA",
    "cpg": "signed CPG",
    "tea_effectiveness": "effectiveness: 0 nothing, 1 the true change",
    "points": "points of accuracy",
    "share": "share of the true change",
    "et_tube": "ET tube",
    "ecg": "ECG leads",
}


def use_style():
    """Set the one style of all figures, and show captions in tables whole."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 90, "axes.titlesize": "medium", "figure.constrained_layout.use": True}
    )
    pd.set_option("display.max_colwidth", 120)


def readable(text):
    """A method, arm or measure as a reader knows it."""
    return NAMES.get(text, text if " " in text else text.replace("_", " "))


def plot_films(films, titles=None, columns=6, size=1.9):
    """A grid of films (B, H, W), uint8 or in [0, 1], with a title each."""
    films = _unit(films)
    rows = -(-len(films) // columns)
    _, axes = _grid(rows, columns, size, (0, 0.5 * rows))
    for number, ax in enumerate(axes.flat):
        ax.axis("off")
        if number < len(films):
            ax.imshow(films[number], **FILM)
            ax.set_title(_wrap(titles[number], 26) if titles is not None else "", fontsize=8)
    return axes


def plot_grid(rows, names, titles, size=1.75):
    """Rows of films (H, W) uint8, or of differences in [-1, 1]; a name a row, a title a film."""
    fig, axes = _grid(len(rows), len(rows[0]), size, (0.8, 0.2 * len(rows)))
    signed = []
    for line, row, name, captions in zip(axes, rows, names, titles, strict=True):
        for ax, film, title in zip(line, row, captions, strict=True):
            if film.dtype == np.uint8:
                ax.imshow(_unit(film), **FILM)
            else:
                signed.append(ax.imshow(film, **DIFFERENCE))
            ax.set_title(title, fontsize=8)
            _bare(ax)
        line[0].set_ylabel(name, fontsize=9)
    if signed:
        _bar(fig, signed[0], axes, "difference")
    return axes


def plot_phantom(patient, size=256):
    """One phantom patient under five doses of fluid, heart size and devices, and what each changed.

    The maps below the films are true differences from the healthy film, exact to the pixel.
    """
    volumes, ratios = (0, 300, 700, 1400, 2300), (0.42, 0.48, 0.54, 0.60, 0.66)
    kinds = ("pacemaker", "central_line", "et_tube", "ecg")
    rows = {
        "effusion": [({"effusion_ml": ml}, f"{ml} ml") for ml in volumes],
        "heart": [({"heart_ratio": r}, f"heart / thorax {r:.2f}") for r in ratios],
        "devices": [
            (dict.fromkeys(kinds[:n], 1), "+ " + readable(kinds[n - 1]) if n else "none")
            for n in range(len(kinds) + 1)
        ],
    }
    pathologies = {label: 0 for label in phantom.DRAWN if label != "Support Devices"}
    films, names, titles = [], [], []
    for name, doses in rows.items():
        shown = []
        for do, _ in doses:
            set_here = {phantom.SEVERITIES[k].label for k in do if k in phantom.SEVERITIES}
            others = {k: v for k, v in pathologies.items() if k not in set_here}
            others |= {k: 0 for k in phantom.DEVICE_KINDS if not any(k.startswith(d) for d in do)}
            shown.append(phantom.render(patient, size, others | do).image)
        films += [shown, [(film.astype(np.float32) - shown[0]) / 255 for film in shown]]
        names += [name, "true difference"]
        titles += [[title for _, title in doses], [""] * len(doses)]
    return plot_grid(films, names, titles)


def plot_prevalence(table, findings, ax=None):
    """Share of films that show each finding, a bar a split."""
    ax = ax or plt.subplots(figsize=(8, 4.6))[1]
    sizes = table["split"].value_counts().reindex(["train", "val", "test"]).dropna().astype(int)
    named = {split: f"{split}, n = {n}" for split, n in sizes.items()}
    shares = table.melt("split", list(findings), "finding", "present").dropna()
    shares["present"] = (shares["present"].astype(float) == 1) * 100
    shares["split"] = shares["split"].map(named)
    look = {"x": "present", "y": "finding", "hue": "split", "hue_order": list(named.values())}
    sns.barplot(shares, **look, errorbar=None, legend=len(named) > 0, ax=ax)
    ax.set(xlabel="films that show it (%)", ylabel="", title="Prevalence by split")
    ax.legend(title="", fontsize=8)
    return ax


def plot_cooccurrence(matrix, num_films=None, ax=None):
    """P(column | row) as a heat map: the correlations that a model may pick up as shortcuts."""
    ax = ax or plt.subplots(figsize=(8, 6.4))[1]
    look = {"vmin": 0, "vmax": 1, "cmap": "crest", "square": True}
    sns.heatmap(matrix, annot=True, fmt=".2f", annot_kws={"size": 7}, ax=ax, **look)
    counted = "" if num_films is None else f", {num_films} films"
    ax.set(title=f"P(column | row){counted}", xlabel="", ylabel="")
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    return ax


def plot_losses(losses, validation=None, ax=None):
    """Training loss a step with a running mean; `validation` = {step: mean} as points."""
    ax = ax or plt.subplots(figsize=(7, 3.8))[1]
    window = max(1, len(losses) // 15)
    ax.plot(losses["step"], losses["loss"], lw=0.6, alpha=0.5, color="C0", label="a step")
    smooth = losses["loss"].rolling(window, min_periods=1, center=True).mean()
    ax.plot(losses["step"], smooth, color="C0", label=f"mean of {window} steps")
    if validation:
        points = list(validation), list(validation.values())
        ax.plot(*points, "D", color="C3", label="validation films, noise fixed")
    ax.set(xlabel="step", ylabel="noise-prediction error (MSE)")
    ax.set_title("Fine-tuning: Algorithm 1's loss")
    _legend(ax)
    return ax


def plot_levels(levels, losses, size=3.6):
    """Validation loss by timestep, and the change in % of the first: {name: (films, levels)}."""
    _, axes = plt.subplots(1, 2, figsize=(2.6 * size, size))
    (first, before), *others = losses.items()
    for number, (name, loss) in enumerate(losses.items()):
        look = {"marker": MARKERS[number], "color": f"C{number}", "ls": ("-", "--")[number % 2]}
        axes[0].plot(levels, loss.mean(axis=0), label=name, **look)
    for number, (name, loss) in enumerate(others, 1):
        change = 100 * (loss - before) / before.mean(axis=0)  # film by film: noise is the same
        reach = 1.96 * change.std(axis=0, ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0
        look = {"fmt": f"{MARKERS[number]}-", "color": f"C{number}", "capsize": 2}
        axes[1].errorbar(levels, change.mean(axis=0), reach, label=name, **look)
    axes[1].axhline(0, **RULE)
    axes[0].set(ylabel="noise-prediction error (MSE)", yscale="log")
    axes[0].set_title(f"Validation films by timestep, n = {len(before)}")
    axes[1].set(ylabel=f"change against {first} (%)", title="Change, 95 % interval over films")
    for ax in axes:
        ax.set_xlabel("timestep: little noise to much")
    axes[0].legend(fontsize=8)
    return axes


def plot_pairs(rows, headers, titles=None, size=1.9):
    """Rows of films under common headers: `rows` is a list of lists of (H, W) films."""
    _, axes = _grid(len(rows), len(headers), size, (0.5, 0.3))
    for r, row in enumerate(rows):
        for ax, film in zip(axes[r], row, strict=True):
            ax.imshow(_unit(film), **FILM)
        _head(axes[r], [readable(header) for header in headers], r)
        if titles is not None:
            axes[r, 0].set_ylabel(_wrap(titles[r], 24), fontsize=8)
    return axes


def plot_reconstructions(films, vae, back, titles, size=1.9):
    """Figure 5: film, VAE alone, inverted and back (T' = T), and how far that is from the film."""
    names = ["film", "VAE alone", "inverted and back", "absolute difference"]
    films, vae, back = _unit(films), _unit(vae), _unit(back)
    fig, axes = _grid(len(films), 4, size, (1.4, 0.3))
    for r, line in enumerate(axes):
        for ax, film in zip(line, (films[r], vae[r], back[r]), strict=False):
            ax.imshow(film, **FILM)
        last = line[3].imshow(abs(back[r] - films[r]), **ABSOLUTE)
        line[0].set_ylabel(_wrap(titles[r], 24), fontsize=8)
        _head(line, names, r)
    _bar(fig, last, axes, "|back - film|, larger alike", extend="max")
    return axes


def plot_edits(factual, counterfactual, titles, masks=None, truth=None, size=1.9):
    """Film, counterfactual, signed difference (Figures 3, 4); mask and truth where known."""
    names = ["original", "counterfactual", "difference", "mask"]
    names += ["true counterfactual", "true difference"]
    factual, counterfactual = _unit(factual), _unit(counterfactual)
    columns = [
        (factual, FILM),
        (counterfactual, FILM),
        (counterfactual - factual, DIFFERENCE),
        (masks, FILM),
        (None if truth is None else _unit(truth), FILM),
        (None if truth is None else _unit(truth) - factual, DIFFERENCE),
    ]
    shown = [n for n, (films, _) in enumerate(columns) if films is not None]
    fig, axes = _grid(len(factual), len(shown), size, (1.2, 0.3))
    for r, line in enumerate(axes):
        for ax, n in zip(line, shown, strict=True):
            ax.imshow(columns[n][0][r], **columns[n][1])
        line[0].set_ylabel(_wrap(titles[r], 24), fontsize=8)
        _head(line, [names[n] for n in shown], r)
    _bar(fig, line[2].images[0], axes, "counterfactual - original")
    return axes


def plot_doses(factual, films, doses, response, truth=None, size=1.9):
    """One film under rising doses of an edit, what each changed, and the response to the dose.

    factual (H, W); films (D, H, W); response (D,): mean signed change of the pixels that truly
    change, of which `truth` is the true value; without a truth, of those inside the mask.
    """
    factual, films = _unit(factual), _unit(films)
    fig = plt.figure(figsize=(size * len(films) + 0.8, size * 3.6))
    grid = fig.add_gridspec(3, len(films), height_ratios=(1, 1, 1.1))
    axes = np.array([[fig.add_subplot(grid[r, d]) for d in range(len(films))] for r in (0, 1)])
    for d, film in enumerate(films):
        axes[0, d].imshow(film, **FILM)
        axes[0, d].set_title(f"w = {doses[d]:g}", fontsize=9)
        axes[1, d].imshow(film - factual, **DIFFERENCE)
        _bare(axes[0, d])
        _bare(axes[1, d])
    axes[1, 0].set_ylabel("counterfactual\n- original", fontsize=8)
    _bar(fig, axes[1, 0].images[0], axes, "difference")
    curve = fig.add_subplot(grid[2, :])
    curve.plot(doses, response, "o-", label="the edit")
    if truth is not None:
        curve.axhline(truth, **RULE, label="the true counterfactual")
    where = "inside the mask" if truth is None else "of the pixels\nthat truly change"
    curve.set(xlabel="guidance scale w", ylabel=f"mean change {where}", xticks=doses)
    curve.legend(fontsize=8, loc="best")
    return axes


def plot_scores(frame, minimum, ax=None):
    """Distribution of S_CLIP an edit, with the filter's threshold."""
    ax = ax or plt.subplots(figsize=(7, 3.6))[1]
    counted = _counted(frame["edit"])
    place = {edit: number for number, edit in enumerate(dict.fromkeys(counted))}
    spread, splits = np.random.default_rng(0), frame["split"].unique()  # equal data, equal bytes
    for number, split in enumerate(splits):
        own = frame["split"] == split
        y = counted[own].map(place) + _beside(number, len(splits))
        y += spread.uniform(-0.1, 0.1, len(y))
        ax.plot(frame["s_clip"][own], y, MARKERS[number], ms=5, alpha=0.7, label=split)
    ax.axvline(minimum, **RULE, label=f"filter, {minimum:g}")
    ax.set(yticks=range(len(place)), yticklabels=list(place), ylim=(len(place) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.set(xlim=(-1, 1), xlabel="S_CLIP (Eq. 1); the filter keeps what lies right of the line")
    ax.set(ylabel="", title="Score of every edit")
    _legend(ax)
    return ax


def wide(tidy, metric):
    """Rows of one metric, as plot_methods takes them: its name, name_low and name_high."""
    part = tidy[(tidy["metric"] == metric) & tidy["n"].notna()]
    return part.rename(columns={"mean": metric, "low": f"{metric}_low", "high": f"{metric}_high"})


def plot_methods(table, value, title, ax=None):
    """A value and its interval a method and edit; columns method, edit, value, _low, _high, (n)."""
    methods, edits = list(dict.fromkeys(table["method"])), list(dict.fromkeys(table["edit"]))
    height = 1.7 + len(methods) * max(0.3, 0.12 * len(edits))
    ax = ax or plt.subplots(figsize=(7.5, height))[1]
    for e, edit in enumerate(edits):
        part = table[table["edit"] == edit].set_index("method").reindex(methods)
        y = np.arange(len(methods)) + _beside(e, len(edits))
        reach = _reach(part[value], part[f"{value}_low"], part[f"{value}_high"])
        counted = f", n = {part['n'].max():.0f}" if "n" in part else ""
        look = {"fmt": MARKERS[e % len(MARKERS)], "ms": 5, "capsize": 2, "color": f"C{e}"}
        ax.errorbar(part[value].to_numpy(float), y, xerr=reach, label=f"{edit}{counted}", **look)
    ax.set(yticks=range(len(methods)), yticklabels=[readable(method) for method in methods])
    ax.set(xlabel=f"{readable(value)} (mean, 95 % interval)", title=title)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.grid(False, axis="y")
    for between in range(1, len(methods)):
        ax.axhline(between - 0.5, color="0.85", lw=0.7)
    _legend(ax)
    return ax


def plot_predictions(factual, counterfactual, heads, titles, truth=None, size=2.0):
    """Films and the judge's probabilities before and after (Figure 6): (film, p) pairs.

    truth: for each film its labels (K,) before and after, marked beside the bars.
    """
    shape = {"figsize": (size * 4.1, size * len(factual) + 0.7), "squeeze": False}
    _, axes = plt.subplots(len(factual), 3, width_ratios=(1, 1, 1.3), **shape)
    y = np.arange(len(heads))
    for r, ((x, p), (x_cf, p_cf)) in enumerate(zip(factual, counterfactual, strict=True)):
        axes[r, 0].imshow(_unit(x), **FILM)
        axes[r, 1].imshow(_unit(x_cf), **FILM)
        axes[r, 0].set_ylabel(_wrap(titles[r], 24), fontsize=8)
        bars = axes[r, 2]
        bars.barh(y - 0.2, p, 0.38, color="C0", label="original")
        bars.barh(y + 0.2, p_cf, 0.38, color="C1", label="counterfactual")
        bars.set(xlim=(0, 1), yticks=y, yticklabels=heads)
        bars.axvline(0.5, **RULE)
        for labels, side in zip(truth[r] if truth else (), (-0.2, 0.2), strict=False):
            name = "label" if side < 0 else None
            look = {"ms": 7, "mec": "w", "clip_on": False, "zorder": 5}
            bars.plot(labels, y + side, "kD", **look, label=name)
        bars.invert_yaxis()
        bars.tick_params(labelsize=8, labelbottom=r == len(factual) - 1)
        for ax in axes[r, :2]:
            _bare(ax)
    for ax, name in zip(axes[0], ["original", "counterfactual", "probability"], strict=True):
        ax.set_title(name, fontsize=9)
    _legend(axes[0, 2])
    return axes


def plot_arms(frame, value="accuracy", ax=None):
    """A value by head or group and arm: its mean over trainings, and a dot each training.

    Bars are the 95 % interval by patient of one training, where frame has low and high.
    """
    ax = ax or plt.subplots(figsize=(8.5, 4.4))[1]
    arms, groups = list(dict.fromkeys(frame["arm"])), list(dict.fromkeys(frame["group"]))
    bounds = [name for name in ("low", "high") if name in frame]
    for a, arm in enumerate(arms):
        own = frame[frame["arm"] == arm]
        mean = own.groupby("group")[[value, *bounds]].mean().reindex(groups)
        x = pd.Series(np.arange(len(groups)) + _beside(a, len(arms)), groups)
        reach = _reach(mean[value], mean["low"], mean["high"]) if bounds else None
        look = {"fmt": MARKERS[a % len(MARKERS)], "ms": 6, "lw": 1, "color": f"C{a}"}
        ax.errorbar(x, mean[value], reach, label=readable(arm), **look)
        ax.plot(x[own["group"]], own[value], "k.", ms=3, alpha=0.5)
    sizes = frame.groupby("group")["n"].max() if "n" in frame else {}
    named = [_wrap(g, 20) + (f"\nn = {sizes[g]}" if g in sizes else "") for g in groups]
    ax.set(xticks=range(len(groups)), xticklabels=named, ylabel=value, ylim=(None, 1.02))
    about = ", bars the 95 % interval of one" if bounds else ""
    ax.set_title(f"Mean over trainings, a dot each training{about}")
    ax.grid(False, axis="x")
    _legend(ax)
    return ax


def plot_sweep(levels, size=4.2):
    """Worst-group accuracy, and its gain over plain, against P(device | effusion), a line an arm.

    levels: rows of tables/differences.csv of several runs, with `level`.
    """
    part = levels[(levels["measure"] == "worst group") & (levels["baseline"] == "plain")]
    _, axes = plt.subplots(1, 2, figsize=(2.4 * size, size))
    plain, arms = part.groupby("level")["baseline_accuracy"].first(), part["arm"].nunique()
    axes[0].plot(plain.index, plain, "ko--", ms=5, label="plain")
    for number, (arm, rows) in enumerate(part.groupby("arm", sort=False)):
        rows, mark = rows.sort_values("level"), MARKERS[(number + 1) % len(MARKERS)]
        look = {"fmt": f"{mark}-", "ms": 5, "color": f"C{number}"}
        x = rows["level"] + 0.03 * _beside(number, arms)  # so that intervals do not hide each other
        axes[0].errorbar(x, rows["accuracy"], label=readable(arm), **look)
        reach = _reach(rows["mean"], rows["low"], rows["high"])
        axes[1].errorbar(x, 100 * rows["mean"], 100 * reach, capsize=2, **look)
    axes[1].axhline(0, **RULE)
    axes[0].set(ylabel="accuracy in the worst group", ylim=(0, 1.02))
    axes[0].set_title(f"Worst of four groups, {part['films'].max():.0f} films in all")
    axes[1].set(ylabel="points of accuracy", title="Gain over plain, 95 % interval")
    for ax in axes:
        ax.set(xlabel="P(device | effusion) as set (arms drawn side by side)", xlim=(0.54, 1))
    _legend(axes[0])
    return axes


def plot_leakage(made, true=None, numbers=None, size=4.4):
    """Mean change of every head's probability, a row an edit: ours, and the truth's beside it.

    numbers: how many films have each edit.
    """
    both = {"counterfactuals made": made} | ({} if true is None else {"true counterfactuals": true})
    width = size * len(both) + 1.5
    fig, axes = plt.subplots(1, len(both), figsize=(width, 0.6 * len(made) + 2), squeeze=False)
    for ax, (title, change) in zip(axes[0], both.items(), strict=True):
        named = [edit if numbers is None else f"{edit}, n = {numbers[edit]}" for edit in made.index]
        shown = change.round(2).set_axis(named) + 0.0  # no -0.00
        look = {"vmin": -1, "vmax": 1, "cmap": "RdBu_r", "annot": True, "fmt": "+.2f"}
        sns.heatmap(shown, ax=ax, cbar=False, **look)
        ax.set(title=title, xlabel="", ylabel="")
        ax.tick_params(axis="x", labelrotation=20, labelsize=8)
        ax.tick_params(axis="y", labelrotation=0, labelsize=8, labelleft=ax is axes[0, 0])
    bar = fig.colorbar(axes[0, -1].collections[0], ax=axes)
    bar.set_label("mean change of probability", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return axes


def plot_matrices(matrices, size=4.6):
    """Shares from 0 to 1 as heat maps side by side: `matrices` = {title: rows by columns}."""
    width, height = size * len(matrices), 0.5 * max(map(len, matrices.values())) + 2
    _, axes = plt.subplots(1, len(matrices), figsize=(width, height), squeeze=False)
    for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        look = {"vmin": 0, "vmax": 1, "cmap": "crest", "annot": True, "fmt": ".2f", "cbar": False}
        sns.heatmap(matrix, ax=ax, **look)
        ax.set(title=title, xlabel="", ylabel="")
        ax.tick_params(axis="x", labelrotation=20, labelsize=8)
        ax.tick_params(axis="y", labelrotation=0, labelsize=8)
    return axes


def plot_filter(own, minimum, ylabel, ax=None):
    """S_CLIP of each edit against its error, and the filter's line; columns s_clip, error, edit."""
    ax = ax or plt.subplots(figsize=(6.8, 4.2))[1]
    own = own.assign(edit=_counted(own["edit"]))
    sns.scatterplot(own, x="s_clip", y="error", hue="edit", style="edit", ax=ax)
    ax.axvline(minimum, **RULE)
    ax.axhline(1, **RULE | {"ls": ":", "lw": 2.4})
    ax.set(xlim=(-1, 1), yscale="symlog", ylabel=f"{ylabel} (1: doing nothing)")
    ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50) if tick <= 2 * own["error"].max()]
    ax.set(ylim=(0, None), yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    ax.set_xlabel("S_CLIP (Eq. 1); the filter keeps what lies right of the line")
    ax.set_title("Is the edit with the better score the better edit?")
    _legend(ax)
    return ax


def _grid(rows, columns, size, room):
    """A figure and its axes for films without gaps; room in inches for what stands beside them."""
    shape = (size * columns + room[0], size * rows + room[1])
    return plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="compressed")


def _bar(fig, image, axes, label, **look):
    """One colour bar for all axes."""
    bar = fig.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.01, **look)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _legend(ax):
    """The legend below the axes, where it hides no data."""
    handles, labels = ax.get_legend_handles_labels()
    if ax.get_legend():
        ax.get_legend().remove()
    look = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    ax.figure.legend(handles, labels, ncols=min(4, len(labels)), **look)


def _counted(edits):
    """Each edit's name with how many there are of it."""
    return edits.map({edit: f"{edit}, n = {n}" for edit, n in edits.value_counts().items()})


def _beside(number, count):
    """Where the one of so many stands that share a place of width 1, from its middle."""
    return (number - (count - 1) / 2) * 0.7 / count


def _reach(middle, low, high):
    """How far an interval reaches below and above its mean: (2, n), 0 where it has none."""
    reach = np.stack([middle - low, high - middle]).astype(float)
    return np.nan_to_num(reach.clip(min=0))


def _head(line, names, row):
    """Bare axes of a row, with the names of the columns above the first."""
    for ax, name in zip(line, names, strict=True):
        _bare(ax)
        ax.set_title(name if row == 0 else "", fontsize=9)


def _bare(ax):
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
    ax.grid(False)


def _unit(films):
    films = np.asarray(films)
    return films.astype(np.float32) / 255 if films.dtype == np.uint8 else films


def _wrap(text, width=30):
    """Break long lines at spaces."""
    wrapped = []
    for line in str(text).split("\n"):
        wrapped += textwrap.wrap(line, width, break_long_words=False) or [""]
    return "\n".join(wrapped)
