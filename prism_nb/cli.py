"""The command `prism-nb`: run a profile, look at a run, edit one film, check the machine.

Exit codes: 0 done, 1 a notebook failed or something is missing, 2 bad usage.
Everything heavy is imported inside the commands, so that the command line starts fast.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
NOTEBOOKS = typer.Option("--notebooks", hidden=True, help="Folder of the notebooks.")
EXECUTOR = typer.Option(help="local, or slurm: jobs of a cluster.")
SLURM = typer.Option("--slurm", help="key=value for submitit, as slurm_partition=gpu; repeatable.")


@contextlib.contextmanager
def _one_line_errors(*bad_usage: type[Exception]) -> Iterator[None]:
    from prism_nb.execute import StepFailed
    from prism_nb.jobs import JobsDied
    from prism_nb.params import ParamError
    from prism_nb.run import RunFolderError

    try:
        yield
    except BrokenPipeError:  # `| head` has read enough: typer ends quietly
        raise
    except (ParamError, RunFolderError, *bad_usage) as error:
        _stop(error, 2)
    except (StepFailed, JobsDied, OSError) as error:
        _stop(error, 1)
    except KeyboardInterrupt:
        _stop("interrupted; the same command continues", 130)


def _stop(error: object, code: int) -> None:
    print(f"prism-nb: {error}", file=sys.stderr)
    raise typer.Exit(code) from None


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """PRISM as notebooks: counterfactual chest radiographs."""
    context.call_on_close(sys.stdout.flush)  # at the interpreter's end it is too late to be quiet
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    profile: Annotated[Path, typer.Argument(help="A profile, such as params/phantom.yaml.")],
    name: Annotated[str, typer.Option(help="Run folder runs/NAME, not the profile's.")] = "",
    only: Annotated[str, typer.Option(help="One notebook, such as 04_edit or 04.")] = "",
    start: Annotated[str, typer.Option("--from", help="This notebook and those after it.")] = "",
    appendices: Annotated[
        bool, typer.Option("--appendices", help="The notebooks A1 to A3, too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run what has not changed, too.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the profile; repeatable.")
    ] = None,
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Execute the notebooks into a run folder; what has not changed is skipped."""
    from prism_nb.execute import StepFailed, chosen_steps, prepare, run_job
    from prism_nb.report import report_path, write_report

    with _one_line_errors():
        steps = chosen_steps(only, start, appendices)
        job = prepare(profile, name, tuple(settings or ()), notebooks)
        try:
            ran = run_job(job, steps, force)
        except StepFailed:
            with contextlib.suppress(Exception):  # the failure is the news, not its report
                write_report(job.folder, job.notebooks)
            raise
        if ran or not report_path(job.folder).exists():
            write_report(job.folder, job.notebooks)
        print(f"  report          {report_path(job.folder)}")


@app.command()
def status(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; else all runs.")] = None,
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Say of each notebook of a run whether its results still stand, and if not, why."""
    from prism_nb.execute import states
    from prism_nb.run import RunFolderError, project_root

    with _one_line_errors():
        if folder is not None and not (folder / "manifest.json").is_file():
            raise RunFolderError(f"{folder} holds no run; `prism-nb run PROFILE` makes one")
        runs = [folder] if folder else sorted(project_root().glob("runs/*/"))
        runs = [each for each in runs if (each / "manifest.json").is_file()]
        unreadable = False
        for each in runs:
            print(each)
            try:
                rows = states(each.resolve(), notebooks)
            except (ValueError, OSError) as error:
                if folder:
                    raise
                unreadable, rows = True, []
                print(f"  {'unreadable':<16}{error}")
            for row in rows:
                print(f"  {row['notebook']:<16}{row['state']:<12}{row['detail']}")
        if not runs:
            print("no runs yet: prism-nb run params/phantom.yaml makes one")
        raise typer.Exit(int(unreadable))


@app.command()
def params(
    notebook: Annotated[str, typer.Argument(help="Such as 02_finetune; or all.")] = "all",
) -> None:
    """List the parameters of a notebook: type, default, what is allowed, what it means."""
    from prism_nb.params import MODELS, describe, notebook_name

    with _one_line_errors():
        names = list(MODELS) if notebook == "all" else [notebook_name(notebook)]
        for name in names:
            print(name)
            for row in describe(name):
                given = f"{row['name']}: {row['type']} = {row['default']!r}"
                allowed = f"  [{row['allowed']}]" if row["allowed"] else ""
                print(f"  {given:<44}  {row['help']}{allowed}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Write the HTML report of a run again."""
    from prism_nb.report import write_report
    from prism_nb.run import RunFolderError

    with _one_line_errors():
        if not (folder / "manifest.json").is_file():
            raise RunFolderError(f"{folder} holds no run; `prism-nb run PROFILE` makes one")
        print(write_report(folder.resolve(), notebooks))


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="A film: PNG, JPEG or DICOM.")],
    source: Annotated[str, typer.Option("--from", help="T: what the film shows.")] = "",
    target: Annotated[str, typer.Option("--to", help="T': what it is to show.")] = "",
    name: Annotated[str, typer.Option("--edit", help="The paper's T and T' by name.")] = "",
    method: Annotated[str, typer.Option(help="Inversion; else the preset's.")] = "",
    preset: Annotated[str, typer.Option(help="How to edit: default, prism, ...")] = "default",
    model: Annotated[str, typer.Option(help="A run folder, or a base model.")] = "phantom",
    guidance: Annotated[float | None, typer.Option(help="w; else the preset's.")] = None,
    steps: Annotated[int, typer.Option(help="N, steps of DDIM.")] = 20,
    out: Annotated[Path | None, typer.Option(help=".png or .dcm; else IMAGE_edited.png.")] = None,
    bits: Annotated[int, typer.Option(help="Of the written film: 8 or 16.")] = 8,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say of each word whose attention map it takes.")
    ] = False,
) -> None:
    """Edit one film of your own: its counterfactual, its mask, a picture of what changed.

    T must name every finding that the film shows: one that it leaves out spoils the picture.
    """
    with _one_line_errors(ValueError):
        height, width = _film_size(image)  # what is wrong is said before the slow imports
        pair = _caption_pair(name, source, target)
        out = _new_film(out or _edited(image), image, bits)
        _check_dials(method, preset, steps, guidance)
        loaded, trained, fit = _load_for_edit(model)
        film = _own_film(loaded, image, fit)
        if (height, width) != film.shape:
            side = f"{len(film)} x {len(film)} px, the model's"
            print(f"  size          given {width} x {height} px, edited and written at {side}")
        odd = _explain(loaded, pair, trained, verbose)
        from prism_nb.edits import edit_film

        dials = {} if guidance is None else {"guidance_scale": guidance}
        how = {"method": method, "num_steps": steps, "preset": preset}
        edited, recipe = edit_film(loaded, film, *pair, **how, **dials)
        about = {"source": pair[0], "target": pair[1], "mask_area": float(edited.area[0])}
        about["s_clip"] = _score(loaded, film, edited.films[0], pair, odd)
        print(f"  mask          {edited.area[0]:.1%} of the film")
        for path in _write_edit(out, film, edited, about | recipe, image, bits):
            print(f"  wrote         {path}")


def _caption_pair(name: str, source: str, target: str) -> tuple[str, str]:
    from prism_nb.edits import PAPER_EDITS

    names = "; ".join(PAPER_EDITS)
    if not name and not (source and target):
        raise ValueError(f"say what to change: --from and --to, or --edit and one of: {names}")
    if not name:
        return source, target
    if source or target:
        raise ValueError("--edit stands for --from and --to: give either it or both of those")
    known = {each.lower(): pair for each, pair in PAPER_EDITS.items()}
    if name.lower() not in known:
        raise ValueError(f"--edit {name}: not one of the paper's edits; there are: {names}")
    return known[name.lower()]


def _film_size(image: Path) -> tuple[int, int]:
    from prism_nb.images import load_image

    return load_image(image).shape


def _edited(image: Path) -> Path:
    """What a film's edit is called; of a name that is a unique id, such as 1.2.840, all stays."""
    from prism_nb.dicom import suffix

    return Path(f"{image.stem if suffix(image) else image.name}_edited.png")


def _new_film(out: Path, image: Path, bits: int) -> Path:
    from prism_nb.dicom import need_pydicom

    kind = out.suffix.lower()
    if kind not in (".png", ".dcm"):
        raise ValueError(f"--out {out}: films are PNG or DICOM; let its name end in .png or .dcm")
    if bits not in (8, 16):
        raise ValueError(f"--bits {bits}: it must be 8 or 16")
    if kind == ".dcm":
        need_pydicom()
    for each in (out, *_beside(out)):
        if each.resolve() == image.resolve():
            raise ValueError(f"--out {out}: {each} is the film itself; give another name")
        if each.is_dir():
            raise ValueError(f"--out {out}: {each} is a folder; give the name of a file")
    parent = next(each for each in out.absolute().parents if each.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"--out {out}: no file can be written in {parent}; give another folder")
    return out


def _beside(out: Path) -> list[Path]:
    """Where the mask and the picture of what changed go."""
    return [out.with_name(f"{out.stem}_{what}.png") for what in ("mask", "difference")]


def _check_dials(method: str, preset: str, steps: int, guidance: float | None) -> None:
    """Refuse wrong names and numbers by what params.py knows, without torch."""
    from typing import get_args

    from prism_nb.params import Inversion, Preset

    for what, name, known in (("method", method, Inversion), ("preset", preset, Preset)):
        if name not in ("", *get_args(known)):
            raise ValueError(f"--{what} {name}: it must be one of {', '.join(get_args(known))}")
    if preset == "prism" and method not in ("", "null_text"):
        raise ValueError(
            f"--preset prism with --method {method}: it guides from the caption that null_text "
            "tunes; leave --method out"
        )
    for what, number, low, high in (("steps", steps, 1, 999), ("guidance", guidance, 0, 50)):
        if number is not None and not low <= number <= high:
            raise ValueError(f"--{what} {number}: it must be a number from {low} to {high}")


def _is_run(model: str) -> bool:
    """Whether a model is a run folder's; ValueError where it is neither that nor a base."""
    folder = Path(model)
    if not (folder / "cohort.json").is_file():
        if not (model == "phantom" or folder.is_dir() or "/" in model):
            raise ValueError(f"--model {model}: no such folder; give a run, phantom or owner/model")
        return False
    if not (folder / "model" / "base.json").is_file():
        raise ValueError(f"{folder} has no model yet: run 02_finetune in it, or give a base model")
    return True


def _load_for_edit(model: str) -> tuple:
    """The model of a run folder or a base, the captions it learned (or None), the film's fit."""
    own = _is_run(model)
    from transformers.utils import logging

    from prism_nb.captions import vocabulary
    from prism_nb.cohort import read_cohort
    from prism_nb.diffusion import load_model

    logging.disable_progress_bar()
    if not own:
        return load_model(model), vocabulary() if model == "phantom" else None, "pad"
    cohort = read_cohort(Path(model))
    train = cohort.table.loc[cohort.table["split"] == "train", "caption"]
    return load_model(f"{model}/model"), list(train), cohort.settings["fit"]


def _own_film(model: object, image: Path, fit: str) -> object:
    """The film (H, W) in [0, 1] at the size that the model was trained at."""
    from prism_nb.diffusion import film_side
    from prism_nb.images import load_film, uint8_to_unit

    size = film_side(model, model.unet.config.sample_size)
    return uint8_to_unit(load_film(image, size, fit))


def _explain(
    model: object, pair: tuple[str, str], trained: list[str] | None, verbose: bool
) -> list[str]:
    """Print what T and T' differ in, and warn of words that were never trained: those words."""
    from prism_nb.attention import explain_alignment
    from prism_nb.captions import untrained_words
    from prism_nb.edits import change_in_words

    odd = untrained_words(" ".join(pair), trained) if trained is not None else []
    if odd:
        print(f"prism-nb: never trained, so of no known effect: {', '.join(odd)}", file=sys.stderr)
    print(f"  words         {change_in_words(model.tokenizer, *pair)}")
    if verbose:
        print(explain_alignment(model.tokenizer, *pair))
    return odd


def _score(
    model: object, film: object, edited: object, pair: tuple[str, str], odd: list[str]
) -> float:
    from prism_nb.diffusion import ModelError
    from prism_nb.scoring import load_clip

    try:
        scorer = load_clip("base", model.base_model, model.device)
    except ModelError as error:
        print(f"  S_CLIP        not known: {error}")
        return float("nan")
    score = float(scorer.s_clip(film[None], edited[None], *([text] for text in pair))[0])
    doubt = f", but never trained: {', '.join(odd)}" if odd else ""
    against = f"{'passes' if score >= 0.1 else 'below'} the paper's 0.1"
    print(f"  S_CLIP        {score:.3f}, {against}{doubt}")
    return score


def _write_edit(
    out: Path, film: object, edited: object, about: dict, image: Path, bits: int
) -> list[Path]:
    import matplotlib

    matplotlib.use("agg")
    from prism_nb.dicom import is_dicom, save_secondary_capture
    from prism_nb.edits import save_edit, save_mask
    from prism_nb.figures import plot_edits
    from prism_nb.files import atomic_path
    from prism_nb.images import unit_to_uint8, unit_to_uint16
    from prism_nb.run import versions

    mask, difference = _beside(out)
    pixels = (unit_to_uint8 if bits == 8 else unit_to_uint16)(edited.films[0])
    made_by = {"versions": versions()}
    if out.suffix.lower() == ".dcm":
        source = image if is_dicom(image) else None
        save_secondary_capture(out, pixels, about | made_by, source=source)
    else:
        save_edit(out, pixels, about, made_by)
    save_mask(mask, edited.masks[0])
    figure = plot_edits(film[None], edited.films, ["SYNTHETIC"], edited.masks)[0, 0].figure
    with atomic_path(difference) as partial:
        note = {"Description": "SYNTHETIC counterfactual, made by prism_nb", "Software": None}
        figure.savefig(partial, dpi=150, bbox_inches="tight", metadata=note)
    return [out, mask, difference]


@app.command()
def benchmark(
    model: Annotated[str, typer.Option(help="A run folder, or a base model.")] = "phantom",
    num_films: Annotated[int, typer.Option(help="Films an edit, a patient each.")] = 64,
    edits: Annotated[str, typer.Option(help="Comma-separated; else the paper's four.")] = "",
    methods: Annotated[str, typer.Option(help="Comma-separated, or all; else the usual.")] = "",
    seed: Annotated[int, typer.Option(help="Of the methods' noise; the films stay.")] = 0,
    steps: Annotated[int, typer.Option(help="N, steps of DDIM.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder; what is finished there is kept.")] = Path(
        "runs/benchmark"
    ),
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Compare methods of editing on unseen phantom films, against the truth: a leaderboard."""
    import matplotlib

    with _one_line_errors(ValueError):
        matplotlib.use("agg")
        from prism_nb.leaderboard import benchmark
        from prism_nb.methods import choose

        names, wanted = _listed(methods), _listed(edits)
        choose(names)  # a wrong name is said before the slow part
        loaded, words = _load_for_benchmark(model, precision)
        benchmark(loaded, out, num_films, wanted, names, steps, seed, words)
        print((out / "leaderboard.md").read_text(encoding="utf-8"))
        print(f"  wrote         {out}: leaderboard.md, .csv, differences.csv, contact.png")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _load_for_benchmark(model: str, precision: str) -> tuple:
    """The model of a run folder or a base, and how its captions are worded."""
    own = _is_run(model)
    from transformers.utils import logging

    from prism_nb.cohort import read_cohort
    from prism_nb.diffusion import load_model

    logging.disable_progress_bar()
    if not own:
        return load_model(model, precision=precision), ()
    settings = read_cohort(Path(model)).settings
    words = settings["template"], settings["negatives"]
    return load_model(f"{model}/model", precision=precision), words


@app.command()
def edit_cohort(
    folder: Annotated[Path, typer.Argument(help="A run folder with a model.")],
    shards: Annotated[int, typer.Option(help="Processes that share the films.")] = 1,
    executor: Annotated[str, EXECUTOR] = "local",
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    edits: Annotated[str, typer.Option(help="Comma-separated; else the run's own.")] = "",
    preset: Annotated[str, typer.Option(help="How to edit; else the run's own.")] = "",
    steps: Annotated[int | None, typer.Option(help="N; else the run's own.")] = None,
    max_films: Annotated[int, typer.Option(help="At most so many films; 0: all.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Else counterfactuals/ in the run.")] = None,
    format: Annotated[str, typer.Option(help="png, png16, or dicom: beside the PNGs.")] = "png",
    slurm: Annotated[list[str] | None, SLURM] = None,
) -> None:
    """Make counterfactuals of a run's films, by the thousand; what is finished is kept."""
    with _one_line_errors(ValueError):
        options = _options(slurm)
        from transformers.utils import logging

        from prism_nb.shards import edit_cohort as make

        logging.disable_progress_bar()
        own = {"edits": _listed(edits), "preset": preset or None, "num_ddim_steps": steps}
        made = make(folder, out, split, max_films, shards, executor, options, format, **own)
        columns = {"films": ("kept", "size"), "kept": ("kept", "sum"), "s_clip": ("s_clip", "mean")}
        counts = made.groupby("edit").agg(**columns)
        print(counts.round(3).to_string())
        print(f"  wrote         {(out or folder / 'counterfactuals') / 'edits.parquet'}")


@app.command()
def sweep(
    profile: Annotated[Path, typer.Argument(help="A profile, such as params/phantom.yaml.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value,value,...; repeatable.")
    ] = None,
    executor: Annotated[str, EXECUTOR] = "local",
    slurm: Annotated[list[str] | None, SLURM] = None,
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Run the notebooks with every combination of some settings; one table of all metrics."""
    from prism_nb.jobs import JobsDied
    from prism_nb.sweep import sweep as run_all

    with _one_line_errors(ValueError):
        options = _options(slurm)
        table, path, failed = run_all(profile, settings or [], executor, options, notebooks)
        numbers = table.set_index("run").select_dtypes("number")
        differ = numbers.loc[:, numbers.nunique(dropna=False) > 1]
        print(differ.T.to_string(na_rep="", float_format="%.4g"))
        print(f"  wrote         {path}")
        if failed:
            raise JobsDied(failed)


def _options(texts: list[str] | None) -> dict:
    import yaml

    pairs = [text.partition("=") for text in texts or []]
    if wrong := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ValueError(f"--slurm {wrong[0]} has no value; write --slurm key=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="A profile, such as params/chexpert.yaml.")],
    gpus: Annotated[int, typer.Option(help="That train; 0: this machine's processors.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="GB of each.")] = 80,
    tflops: Annotated[float, typer.Option(help="Of each in bf16: A100 312, H100 989.")] = 312,
    films: Annotated[int, typer.Option(help="Of the cohort; 0: as its run or CSV says.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the profile; repeatable.")
    ] = None,
) -> None:
    """Say what a profile will need, memory, disk and hours, and what to change to fit."""
    with _one_line_errors(ValueError):
        from prism_nb.execute import prepare

        values = prepare(profile, settings=tuple(settings or ())).values
        from prism_nb.planner import REACHED, Plan, advice  # slow: a wrong profile is said before

        found = Plan(values, gpus, tflops, films)
        print(f"{found.num_films:,} films of {found.side} px, {gpus or 'no'} GPUs")
        device = "a GPU" if gpus else "main memory"
        print(f"\nMemory, GB ({device}; notebooks: main memory)")
        _print_amounts(found.memory(), 1e9)
        disk = found.disk()
        print("\nDisk, GB")
        _print_amounts(disk | {"together": sum(disk.values())}, 1e9)
        hours = found.hours()
        unit = ("Hours", 1) if sum(hours.values()) > 3 else ("Minutes", 1 / 60)
        speed = "within a factor of 2, on this machine when it does nothing else"
        if gpus:
            reached = f"{REACHED['unet']:.0%} of {tflops:g} TFLOP/s"
            speed = f"roughly, at {reached}, 02_finetune on all GPUs, else on one"
        print(f"\n{unit[0]} ({speed})")
        _print_amounts(hours | {"together": sum(hours.values())}, unit[1])
        print("  not counted: appendices, sweeps, downloads")
        if gpus:
            change = advice(values, gpus, gpu_memory * 1e9, films)
            wanted = " ".join(f"--set {key}={value}" for key, value in change.items())
            print(f"\nTo fit into {gpu_memory:g} GB: {wanted or 'nothing has to change'}")


def _print_amounts(amounts: dict, unit: float) -> None:
    for name, amount in amounts.items():
        print(f"  {name:<14}{amount / unit:>9.2f}")


@app.command()
def doctor() -> None:
    """Check this machine: Python, packages, device, memory, disk, kernel; how to fix what lacks."""
    from prism_nb.doctor import checks

    rows = list(checks())
    for row in rows:
        print(f"  {'ok' if row.good else 'MISSING':<9}{row.what:<16}{row.found}")
        if not row.good:
            print(f"  {'':<9}{'':<16}-> {row.fix}")
    raise typer.Exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    app()
