"""Every figure of the notebooks: data and `ax=None` in, Axes out; nothing is shown or saved here.

One seaborn style, one colour-blind-safe palette. Films are shown in [0, 1] as radiologists see
them; difference maps are counterfactual - factual in [-1, 1], symmetric, blue where density was
lost. Used by all notebooks; `Run.save_figure` writes what they return.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from prism_nb import phantom

PALETTE = "colorblind"
DIFFERENCE = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
FILM = {"cmap": "gray", "vmin": 0, "vmax": 1}
ABSOLUTE = {"cmap": "magma", "vmin": 0, "vmax": 0.5}


def use_style():
    """Set the one style of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 90, "axes.titlesize": "medium", "figure.constrained_layout.use": True}
    )


def plot_films(films, titles=None, columns=6, size=1.9):
    """A grid of films (B, H, W), uint8 or in [0, 1], with a title each."""
    films = _unit(films)
    rows = -(-len(films) // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.35) * rows), squeeze=False
    )
    for number, ax in enumerate(axes.flat):
        ax.axis("off")
        if number < len(films):
            ax.imshow(films[number], **FILM)
            ax.set_title(_wrap(titles[number]) if titles is not None else "", fontsize=7)
    return axes


def plot_grid(rows, names, titles, size=1.75):
    """Rows of films (H, W) uint8, or of differences in [-1, 1]; a name a row, a title a film."""
    _, axes = plt.subplots(
        len(rows),
        len(rows[0]),
        figsize=(size * len(rows[0]), (size + 0.2) * len(rows)),
        squeeze=False,
    )
    for line, row, name, captions in zip(axes, rows, names, titles, strict=True):
        for ax, film, title in zip(line, row, captions, strict=True):
            signed = film.dtype != np.uint8
            ax.imshow(film if signed else _unit(film), **(DIFFERENCE if signed else FILM))
            ax.set_title(title, fontsize=7)
            _bare(ax)
        line[0].set_ylabel(name, fontsize=8)
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
            (dict.fromkeys(kinds[:n], 1), "+ " + kinds[n - 1].replace("_", " ") if n else "none")
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
    ax = ax or plt.subplots(figsize=(8, 4))[1]
    shares = table.melt("split", list(findings), "finding", "present").dropna()
    shares["present"] = (shares["present"].astype(float) == 1) * 100
    sns.barplot(
        shares,
        x="present",
        y="finding",
        hue="split",
        hue_order=["train", "val", "test"],
        errorbar=None,
        ax=ax,
    )
    ax.set(xlabel="films that show it (%)", ylabel="", title="Prevalence by split")
    return ax


def plot_cooccurrence(matrix, ax=None):
    """P(column | row) as a heat map: the correlations that a model may pick up as shortcuts."""
    ax = ax or plt.subplots(figsize=(5.2, 4.4))[1]
    sns.heatmap(matrix, vmin=0, vmax=1, cmap="crest", annot=len(matrix) <= 8, fmt=".2f", ax=ax)
    ax.set(title="P(column | row)", xlabel="", ylabel="")
    return ax


def plot_losses(losses, validation=None, ax=None):
    """Training loss a step with a running mean; `validation` = {step: mean} as points."""
    ax = ax or plt.subplots(figsize=(7, 3.4))[1]
    window = max(1, len(losses) // 15)
    ax.plot(losses["step"], losses["loss"], lw=0.6, alpha=0.4, color="C0", label="a step")
    smooth = losses["loss"].rolling(window, min_periods=1, center=True).mean()
    ax.plot(losses["step"], smooth, color="C0", label=f"mean of {window} steps")
    if validation:
        ax.plot(
            list(validation), list(validation.values()), "o", color="C3", label="validation films"
        )
    ax.set(
        xlabel="step",
        ylabel="noise-prediction error (MSE)",
        title="Fine-tuning: Algorithm 1's loss",
    )
    ax.legend()
    return ax


def plot_levels(levels, losses, ax=None):
    """Validation loss by timestep, on log scales: `losses` = {name: (films, levels)}."""
    ax = ax or plt.subplots(figsize=(7, 3.4))[1]
    for name, loss in losses.items():
        ax.plot(levels, loss.mean(axis=0), "o-", label=name)
    ax.set(xlabel="timestep", ylabel="noise-prediction error (MSE)", yscale="log")
    ax.set_title("Validation films by timestep")
    ax.legend()
    return ax


def plot_pairs(rows, headers, titles=None, size=1.9):
    """Rows of films under common headers: `rows` is a list of lists of (H, W) films."""
    _, axes = plt.subplots(
        len(rows),
        len(headers),
        figsize=(size * len(headers), size * len(rows) + 0.4),
        squeeze=False,
    )
    for r, row in enumerate(rows):
        for c, film in enumerate(row):
            axes[r, c].imshow(_unit(film), **FILM)
            _bare(axes[r, c])
            if r == 0:
                axes[r, c].set_title(headers[c], fontsize=9)
        if titles is not None:
            axes[r, 0].set_ylabel(_wrap(titles[r], 22), fontsize=7)
    return axes


def plot_reconstructions(films, vae, back, titles, size=1.9):
    """Figure 5: film, VAE alone, inverted and back (T' = T), and how far that is from the film."""
    names = ["film", "VAE alone", "inverted and back", "absolute difference"]
    films, vae, back = _unit(films), _unit(vae), _unit(back)
    fig, axes = plt.subplots(
        len(films), 4, figsize=(size * 4.4, size * len(films) + 0.5), squeeze=False
    )
    for r, line in enumerate(axes):
        for ax, film in zip(line, (films[r], vae[r], back[r]), strict=False):
            ax.imshow(film, **FILM)
        last = line[3].imshow(abs(back[r] - films[r]), **ABSOLUTE)
        line[0].set_ylabel(_wrap(titles[r], 22), fontsize=7)
        _head(line, names, r)
    fig.colorbar(last, ax=axes, shrink=0.6, aspect=30, pad=0.01, label="|back - film|")
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
    fig, axes = plt.subplots(
        len(factual),
        len(shown),
        figsize=(size * (len(shown) + 0.4), size * len(factual) + 0.5),
        squeeze=False,
    )
    for r, line in enumerate(axes):
        for ax, n in zip(line, shown, strict=True):
            ax.imshow(columns[n][0][r], **columns[n][1])
        line[0].set_ylabel(_wrap(titles[r], 22), fontsize=7)
        _head(line, [names[n] for n in shown], r)
    bar = fig.colorbar(line[2].images[0], ax=axes, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("counterfactual - original")
    return axes


def plot_doses(factual, films, doses, response, truth=None, size=1.9):
    """One film under rising doses of an edit, what each changed, and the response to the dose.

    factual (H, W); films (D, H, W); response (D,): mean signed change where it is looked for, of
    which `truth` is the true value.
    """
    factual, films = _unit(factual), _unit(films)
    fig = plt.figure(figsize=(size * len(films), size * 3.6))
    grid = fig.add_gridspec(3, len(films), height_ratios=(1, 1, 1.1))
    axes = np.array([[fig.add_subplot(grid[r, d]) for d in range(len(films))] for r in (0, 1)])
    for d, film in enumerate(films):
        axes[0, d].imshow(film, **FILM)
        axes[0, d].set_title(f"w = {doses[d]:g}", fontsize=9)
        axes[1, d].imshow(film - factual, **DIFFERENCE)
        _bare(axes[0, d])
        _bare(axes[1, d])
    axes[1, 0].set_ylabel("counterfactual\n- original", fontsize=7)
    curve = fig.add_subplot(grid[2, :])
    curve.plot(doses, response, "o-", label="made")
    if truth is not None:
        curve.axhline(truth, color="k", ls="--", lw=1, label="true")
    curve.set(xlabel="guidance scale w", ylabel="mean change")
    curve.legend(fontsize=8)
    return axes


def plot_scores(frame, minimum, ax=None):
    """Distribution of S_CLIP an edit, with the filter's threshold."""
    ax = ax or plt.subplots(figsize=(7, 3))[1]
    sns.stripplot(frame, x="s_clip", y="edit", hue="split", dodge=True, alpha=0.7, ax=ax)
    ax.axvline(minimum, color="k", lw=1, ls="--")
    ax.set(
        xlim=(-1, 1),
        xlabel="S_CLIP (Eq. 1); the filter keeps what lies right of the line",
        ylabel="",
    )
    return ax


def plot_methods(table, value, title, ax=None):
    """A value and its interval a method and edit; columns method, edit, value, _low, _high."""
    ax = ax or plt.subplots(figsize=(7.5, 3.6))[1]
    methods, edits = list(dict.fromkeys(table["method"])), list(dict.fromkeys(table["edit"]))
    for e, edit in enumerate(edits):
        part = table[table["edit"] == edit].set_index("method").reindex(methods)
        y = np.arange(len(methods)) + (e - (len(edits) - 1) / 2) * 0.7 / max(len(edits), 1)
        middle = part[value].to_numpy(float)
        reach = np.stack([middle - part[f"{value}_low"], part[f"{value}_high"] - middle]).clip(
            min=0
        )
        ax.errorbar(
            middle,
            y,
            xerr=np.nan_to_num(reach),
            fmt="o",
            ms=4,
            capsize=2,
            color=f"C{e}",
            label=edit,
        )
    ax.set(
        yticks=range(len(methods)), yticklabels=methods, xlabel=value.replace("_", " "), title=title
    )
    ax.invert_yaxis()
    ax.legend(fontsize=7)
    return ax


def plot_predictions(factual, counterfactual, heads, titles, truth=None, size=2.0):
    """Films and the judge's probabilities before and after (Figure 6): (film, p) pairs.

    truth: for each film its labels (K,) before and after, marked beside the bars.
    """
    _, axes = plt.subplots(
        len(factual), 3, figsize=(size * 4, size * len(factual) + 0.4), squeeze=False
    )
    y = np.arange(len(heads))
    for r, ((x, p), (x_cf, p_cf)) in enumerate(zip(factual, counterfactual, strict=True)):
        axes[r, 0].imshow(_unit(x), **FILM)
        axes[r, 1].imshow(_unit(x_cf), **FILM)
        axes[r, 0].set_ylabel(_wrap(titles[r], 22), fontsize=7)
        axes[r, 2].barh(y - 0.2, p, 0.38, color="C0", label="factual")
        axes[r, 2].barh(y + 0.2, p_cf, 0.38, color="C1", label="counterfactual")
        axes[r, 2].set(xlim=(0, 1), yticks=y, yticklabels=heads)
        axes[r, 2].axvline(0.5, color="k", lw=0.7, ls="--")
        for labels, side in zip(truth[r] if truth else (), (-0.2, 0.2), strict=False):
            name = "truth" if side < 0 else None
            axes[r, 2].plot(labels, y + side, "kD", ms=3.5, ls="none", clip_on=False, label=name)
        axes[r, 2].invert_yaxis()
        for ax in axes[r, :2]:
            _bare(ax)
    for ax, name in zip(axes[0], ["factual", "counterfactual", "probability"], strict=True):
        ax.set_title(name, fontsize=9)
    axes[0, 2].legend(fontsize=6)
    return axes


def plot_arms(frame, value="accuracy", ax=None):
    """Accuracy a head or group and arm, a point a training seed."""
    ax = ax or plt.subplots(figsize=(8, 3.6))[1]
    sns.pointplot(
        frame,
        x="group",
        y=value,
        hue="arm",
        linestyles="none",
        dodge=0.4,
        errorbar=None,
        markersize=5,
        ax=ax,
    )
    sns.stripplot(
        frame, x="group", y=value, hue="arm", dodge=True, alpha=0.35, size=3, legend=False, ax=ax
    )
    ax.set(xlabel="", ylim=(None, 1.02))
    ax.tick_params(axis="x", labelrotation=12, labelsize=8)
    ax.legend(fontsize=7, title="")
    return ax


def plot_sweep(levels, size=4.2):
    """Worst-group accuracy, and its gain over plain, against P(device | effusion), a line an arm.

    levels: rows of tables/differences.csv of several runs, with `level`.
    """
    part = levels[(levels["measure"] == "worst group") & (levels["baseline"] == "plain")]
    _, axes = plt.subplots(1, 2, figsize=(2.4 * size, size))
    plain = part.groupby("level")["baseline_accuracy"].first()
    axes[0].plot(plain.index, plain, "ko--", ms=4, label="plain")
    for number, (arm, rows) in enumerate(part.groupby("arm", sort=False)):
        rows, look = rows.sort_values("level"), {"fmt": "o-", "ms": 4, "color": f"C{number}"}
        x = rows["level"] + 0.002 * number  # so that intervals do not hide each other
        axes[0].errorbar(x, rows["accuracy"], label=arm.replace("_", " "), **look)
        reach = 100 * np.stack([rows["mean"] - rows["low"], rows["high"] - rows["mean"]])
        axes[1].errorbar(x, 100 * rows["mean"], np.nan_to_num(reach), capsize=2, **look)
    axes[1].axhline(0, color="k", lw=0.7, ls="--")
    axes[0].set(ylabel="accuracy in the worst group", title="Worst group", ylim=(0, 1.02))
    axes[1].set(ylabel="points", title="Gain over plain, 95 % interval")
    for ax in axes:
        ax.set(xlabel="P(device | effusion) in training", xlim=(0.54, 1))
    axes[0].legend(fontsize=7, loc="lower left")
    return axes


def plot_leakage(made, true=None, size=4.4):
    """Mean change of every head's probability, a row an edit: ours, and the truth's beside it."""
    both = {"made": made} | ({} if true is None else {"true": true})
    width = size * len(both) + 1.5
    _, axes = plt.subplots(1, len(both), figsize=(width, 0.6 * len(made) + 2), squeeze=False)
    for ax, (name, change) in zip(axes[0], both.items(), strict=True):
        sns.heatmap(change, vmin=-1, vmax=1, cmap="RdBu_r", annot=True, fmt="+.2f", ax=ax)
        ax.set(title=f"{name} counterfactuals", xlabel="", ylabel="")
        ax.tick_params(axis="x", labelrotation=20, labelsize=8)
        ax.tick_params(axis="y", labelrotation=0, labelsize=8, labelleft=ax is axes[0, 0])
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
    ax = ax or plt.subplots(figsize=(6.5, 3.8))[1]
    sns.scatterplot(own, x="s_clip", y="error", hue="edit", style="edit", ax=ax)
    ax.axvline(minimum, color="k", lw=1, ls="--")
    ax.axhline(1, color="k", lw=0.7, ls=":")
    ax.set(xlim=(-1, 1), yscale="symlog", ylim=(0, None), ylabel=ylabel)
    ax.set_xlabel("S_CLIP (Eq. 1); the filter keeps what lies right of the line")
    ax.legend(fontsize=7, title="")
    return ax


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
    """Break a long title at spaces."""
    lines = [""]
    for word in str(text).split():
        lines = (
            [*lines, word]
            if len(lines[-1]) + len(word) > width
            else [*lines[:-1], f"{lines[-1]} {word}".strip()]
        )
    return "\n".join(lines)
