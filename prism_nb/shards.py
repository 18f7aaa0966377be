"""Counterfactuals of a whole cohort with a run's model, shared out over processes.

An item is a film under an edit, its id FILM/EDIT. Films stand in the order of a hash of their ids
and are cut into batches; every N-th batch is a shard's. A batch is always computed together and
draws from (seed, film) alone: neither the number of shards nor a kill changes a bit of it (on equal
machines and threads). RUN/counterfactuals holds plan.parquet, parts/ (a folder a batch, whole or
not at all, named by digests of all that it was made from), and edits.parquet, merged, which
reads as notebook 04's; on request the PNGs have 16 bits, or DICOM lies beside them. Films
(B, H, W) in [0, 1]. Used by `prism-nb edit-cohort`.
"""

import ast
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from prism_nb.cohort import read_cohort
from prism_nb.dicom import need_pydicom, save_secondary_capture
from prism_nb.diffusion import ModelError, encode_films, load_model, locate, pick_device
from prism_nb.editing import PRESETS, edit
from prism_nb.edits import filter_edits, given_dials, parse_edit, plan_edits, recipe, save_edits
from prism_nb.files import (
    atomic_folder,
    atomic_path,
    locked,
    one_line,
    read_json,
    sha256_file,
    temporary_path,
    write_json,
)
from prism_nb.findings import slug
from prism_nb.images import ImageError, load_films, uint8_to_unit, unit_to_uint8, unit_to_uint16
from prism_nb.inversion import invert
from prism_nb.jobs import JobsDied, check_executor, run_jobs
from prism_nb.manifest import leftovers, reached_modules
from prism_nb.params import check_profile, for_notebook, validate
from prism_nb.run import project_root, record_path, resolve_path, versions
from prism_nb.scoring import ENCODERS, load_clip

SPLITS = ("train", "val", "test", "all")
FORMATS = ("png", "png16", "dicom")  # dicom: beside the PNGs, for the notebooks read those
TUNED = ("unet", "text_encoder")  # of a run's model
FROZEN = ("vae", "text_encoder", "tokenizer")  # of a base model
FILMS = ("image_size", "fit", "template", "negatives")  # of a cohort: how it is read, and worded
WRITTEN = ("edits.parquet", "rejected.csv", "plan.parquet", "parts")  # besides request.json
REJECTED = ["film_id", "reason"]
FILM_DIGITS = 8  # at the end of a part's name: what its films' files hold
SOURCES = ("model", "frozen", "cohort", "code")  # of a request: what is no setting of a call
PRIVATE = ["film_id", "patient_id", "split", "path", "mask_path"]  # what a film does not tell


def edit_cohort(
    run,
    out=None,
    split="test",
    max_films=0,
    shards=1,
    executor="local",
    options=None,
    format="png",
    **settings,
):
    """Make the counterfactuals of a cohort's films that are not there yet: edits.parquet's table.

    run: a run folder with a model. out: by default RUN/counterfactuals. max_films: 0 is all; more
    later continue fewer now. settings: over the run's own, as notebooks 03 and 04 name them
    (edits, preset, num_ddim_steps, ...). options: submitit's, for slurm. format: one of FORMATS.
    Raises JobsDied where a shard died: the same call goes on. ValueError, one line, on what cannot
    be done. A film that cannot be read is set aside in rejected.csv and tried again by the next
    call.
    """
    run = Path(run).resolve()
    out = Path(out).resolve() if out else run / "counterfactuals"
    if shards < 1 or max_films < 0:
        raise ValueError(f"shards is {shards}, max_films {max_films}; give 1 and 0, or more")
    if (shards, executor) != (1, "local"):
        check_executor(executor)
    request = read_request(run, split, settings, format)
    plan = plan_batches(run, request, max_films)
    theirs = [name for name in WRITTEN if (out / name).exists()]
    if theirs and not (out / "request.json").is_file():  # of a notebook, or of anyone
        raise ValueError(f"{out} has a {theirs[0]} of something else: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock") as free:
        if not free:
            raise ValueError(f"{out} is in use by another edit-cohort: wait for its end")
        _refuse_running(out)
        leftovers(out, alone=True)
        shutil.rmtree(out / ".jobs", ignore_errors=True)  # what waits in a queue may not start
        (out / "edits.parquet").unlink(missing_ok=True)  # with it, the folder counts as finished
        write_json(out / "request.json", request)
        _write(plan, out / "plan.parquet")
        for part in (out / "parts" / key for key in plan["batch"].unique()):
            if part.is_dir() and len(_rejected(part)):  # what could not be read, perhaps now can be
                _remove(part)
        _make(run, out, plan, shards, executor, options)
        made = merge(out, plan)
        _tidy(out / "parts", set(plan["batch"]), _made_from(request))
        return made


def _tidy(parts, keys, made_from):
    """Remove parts that no call makes any more, and say what stays beside a plan's own."""
    others = {file.parent for file in parts.glob("[!.]*/rejected.csv")}
    others = [part for part in others if part.name not in keys]
    films = {key[:-FILM_DIGITS] for key in keys}  # which have changed, where the rest is equal
    old = [part for part in others if not part.name.startswith(made_from)]
    old += [part for part in others if part.name[:-FILM_DIGITS] in films]
    for part in old:
        _remove(part)
    if old:
        print(f"  removed       {len(old)} batches made with another model, cohort or code")
    if stay := len(others) - len(old):
        print(f"  kept          {stay} batches of other settings, for a call with those")


def _remove(part):
    """Remove a part whole: what a kill leaves of it is cleared by the next call."""
    shutil.rmtree(part.replace(temporary_path(part)))


def _refuse_running(out):
    """ValueError where shards still run whose command was killed: they are writing."""
    for lock in out.glob(".lock-*"):
        with locked(lock) as free:
            if not free:
                still = "in use: shards of an edit-cohort that ended still run"
                raise ValueError(f"{out} is {still}; wait for them")


def read_request(run, split="test", settings=None, format="png"):
    """All that decides what is made: the run's own settings, some replaced, and its model."""
    for name, value, allowed in (("split", split, SPLITS), ("format", format, FORMATS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if format == "dicom":
        need_pydicom()
    if not (run / "model" / "base.json").is_file():
        raise ValueError(f"{run} has no model yet: run 02_finetune in it")
    given = {key: value for key, value in (settings or {}).items() if value not in (None, [])}
    values = _own_settings(run) | given
    if "preset" in given and given["preset"] in PRESETS:
        values["inversion"] = PRESETS[given["preset"]].inversion["method"]
    values = check_profile(values, where="edit-cohort")
    how = validate("03_invert", for_notebook(values, "03_invert"))
    p = validate("04_edit", for_notebook(values, "04_edit"))
    names = ("edits", "preset", "s_clip_min", "clip_model")
    names += ("edit_batch_size", "precision", "device")
    base, clip = read_json(run / "model" / "base.json"), resolve_clip(p.clip_model)
    films = read_json(run / "cohort.json")["settings"]
    code = {Path(__file__), *reached_modules("from prism_nb import edits, scoring")}
    return {name: getattr(p, name) for name in names} | {
        "inversion": {"method": how.inversion, "num_steps": how.num_ddim_steps, "seed": p.seed},
        "dials": given_dials(p),
        "split": split,
        "format": format,
        "model": _weights(run / "model", TUNED),
        "frozen": _weights(base["base_model"], (*FROZEN, "clip"), base["revision"]),
        "judge": None if clip == "base" else _weights(ENCODERS.get(clip, clip)),
        "cohort": [sha256_file(run / "cohort.parquet"), *(films[name] for name in FILMS)],
        "code": _digest([ast.dump(ast.parse(path.read_text("utf-8"))) for path in sorted(code)]),
    }


def resolve_clip(name):
    """The judge of S_CLIP as load_clip takes it."""
    return resolve_path("clip_model", name, project_root())


def _weights(name, parts=("",), revision=""):
    """What tells a model's weights apart: its files' digests, or its commit on the hub."""
    folder = Path(locate(str(name)))
    if folder.is_dir():
        files = {path for part in parts for path in (folder / part).rglob("[!.]*")}
        return [sha256_file(path) for path in sorted(files) if path.is_file()]
    config = Path(parts[0], "config.json")
    try:  # of what is there already, where the machine is offline
        found = hf_hub_download(str(folder), config.as_posix(), revision=revision or None)
    except OSError as error:
        raise ModelError(f"cannot look up {folder}: {one_line(error)}") from None
    return Path(found).parents[len(config.parts) - 1].name


def _own_settings(run):
    """Of a run by `prism-nb run` its profile's, else those of the notebooks that were run."""
    if (run / "manifest.json").is_file():
        return read_json(run / "manifest.json").get("parameters", {})
    records = [record_path(run, name) for name in ("03_invert", "04_edit")]
    known = [read_json(path)["parameters"] for path in records if path.is_file()]
    return {key: value for values in known for key, value in values.items()}


def plan_batches(run, request, max_films=0):
    """Which films get which edits, batch by batch: plan_edits' table with an id and a batch."""
    cohort = read_cohort(run)
    table, words = cohort.table, (cohort.settings["template"], cohort.settings["negatives"])
    if request["split"] != "all":
        table = table[table["split"] == request["split"]]
    if table.empty:
        raise ValueError(f"the cohort of {run} has no film in the split {request['split']}")
    plan = plan_edits(table, [parse_edit(text) for text in request["edits"]], *words)
    films = sorted(plan["film_id"].unique(), key=lambda film: _digest([film]))
    place = {film: number for number, film in enumerate(films[: max_films or None])}
    plan = plan[plan["film_id"].isin(place.keys())].copy()
    plan["place"] = plan["film_id"].map(place)
    plan = plan.sort_values("place", kind="stable", ignore_index=True)
    plan["id"] = plan["film_id"] + "/" + plan["edit"].map(slug)
    number = plan.pop("place") // request["edit_batch_size"]
    made, content = _made_from(request), _contents(cohort, place)

    def name(part):
        films = _digest([content[film] for film in part["film_id"].unique()])
        return made + _digest([request, *part["id"]])[:16] + films[:FILM_DIGITS]

    keys = {n: name(part) for n, part in plan.groupby(number)}
    return plan.assign(batch=number.map(keys)).drop(columns="row")


def _contents(cohort, films):
    """Digest of each film's file, None where there is none to be read."""
    paths = cohort.table.set_index("film_id").loc[list(films), "path"]

    def digest(path):
        with suppress(OSError):
            return sha256_file(cohort.image_root / path)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        return dict(zip(films, readers.map(digest, paths), strict=True))


def _made_from(request):
    """How the names of a request's parts begin: what weights, films and code they come from."""
    return _digest([request[name] for name in SOURCES])[:8] + "-"


def make_shard(run, out, shard=0, num_shards=1, threads=0):
    """Make the batches of one shard that are not there yet; one that fails does not stop the rest.

    threads: of this process, 0 leaves them. Raises RuntimeError, one line, if batches failed.
    """
    if threads:
        torch.set_num_threads(threads)
    run, out = Path(run), Path(out)
    plan = pd.read_parquet(out / "plan.parquet")
    own = list(plan["batch"].unique())[shard::num_shards]
    missing, failed = [key for key in own if not (out / "parts" / key).is_dir()], []
    with locked(out / f".lock-{shard}") as free:
        if not free:
            raise RuntimeError(f"another process makes shard {shard + 1}")
        tools = load_tools(run, read_json(out / "request.json"), shard)
        for key in tqdm(missing, "batches", len(own), initial=len(own) - len(missing)):
            try:
                make_batch(*tools, plan[plan["batch"] == key], out / "parts" / key)
            except ValueError as error:  # a film that cannot be edited
                failed.append(error)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(own)} batches failed, the first: {failed[0]}")


def load_tools(run, request, shard=0):
    """Cohort, model and judge of S_CLIP, as make_batch takes them; shards take GPUs in turn."""
    device = request["device"]
    if pick_device(device).type == "cuda":
        device = f"cuda:{shard % torch.cuda.device_count()}"
    model = load_model(str(run / "model"), device=device, precision=request["precision"])
    clip = load_clip(resolve_clip(request["clip_model"]), model.base_model, model.device)
    if _weights(run / "model", TUNED) != request["model"]:  # a job may have waited for days
        raise ModelError(f"the model in {run} was replaced meanwhile: give the command again")
    return request, read_cohort(run), model, clip


def make_batch(request, cohort, model, scorer, plan, folder):
    """Invert a batch's films once, make all their edits, and write them as one folder.

    A film that cannot be read is set aside, with its reason, in rejected.csv.
    """
    chosen = cohort.table.set_index("film_id", drop=False).loc[plan["film_id"].unique()]
    films, rejected = _read(cohort, chosen)
    if not films:
        with atomic_folder(folder) as partial:
            rejected.to_csv(partial / "rejected.csv", index=False)
        return
    chosen, plan = (part[~part["film_id"].isin(rejected["film_id"])] for part in (chosen, plan))
    films, ids = uint8_to_unit(np.concatenate(films)), list(chosen["film_id"])
    z0 = encode_films(model, films)
    found = invert(model, z0, ids, list(chosen["caption"]), **request["inversion"])
    row = plan["film_id"].map({film: number for number, film in enumerate(ids)})
    how, size = {"preset": request["preset"]} | request["dials"], request["edit_batch_size"]
    made = edit(model, found, films, row, plan["target"], batch_size=size, **how)
    s_clip = scorer.s_clip(films[row], made.films, list(plan["source"]), list(plan["target"]))
    # A PNG tells how it was made and not of whom: no id of ours goes further than the tables.
    plan = plan.drop(columns=["id", "batch"]).assign(row=row)
    judged = filter_edits(plan, s_clip, made.area, request["s_clip_min"])
    judged, about = judged.assign(**recipe(found, **how)), {"versions": versions()}
    if request["format"] == "png16":
        made = replace(made, films=unit_to_uint16(made.films))
    with atomic_folder(folder) as partial:
        rejected.to_csv(partial / "rejected.csv", index=False)
        table = save_edits(partial, judged, made, chosen, {}, about)
        if request["format"] == "dicom":
            _save_dicom(partial, table, made.films, about)


def _read(cohort, chosen):
    """A list of the films that can be read, and film_id and reason of those that cannot."""
    size, fit, films, rejected = cohort.settings["image_size"], cohort.settings["fit"], [], []
    for film, path in zip(chosen["film_id"], chosen["path"], strict=True):
        try:
            films.append(load_films([cohort.image_root / path], size, fit))
        except ImageError as error:
            rejected.append((film, str(error)))
    return films, pd.DataFrame(rejected, columns=REJECTED)


def _save_dicom(folder, table, films, about):
    """Write each film as DICOM too, under the name of its PNG with the suffix .dcm."""
    recipes = table.drop(columns=PRIVATE).to_dict("records")
    for path, film, row in zip(table["path"], unit_to_uint8(films), recipes, strict=True):
        save_secondary_capture((folder / path).with_suffix(".dcm"), film, row | about)


def merge(out, plan):
    """Write edits.parquet, one row an id in the plan's order, from the parts; returns it.

    Films that were set aside are in rejected.csv instead.
    """
    parts = [out / "parts" / key for key in plan["batch"].unique()]
    rejected = pd.concat([_rejected(part) for part in parts], ignore_index=True)
    with atomic_path(out / "rejected.csv") as temporary:
        rejected.to_csv(temporary, index=False)
    parts = [part for part in parts if (part / "edits.parquet").exists()]
    if not parts:
        raise ValueError(f"no film could be read, see {out / 'rejected.csv'}: {rejected.reason[0]}")
    made = [pd.read_parquet(part / "edits.parquet") for part in parts]
    for part, frame in zip(parts, made, strict=True):
        for column in ("path", "mask_path"):
            frame[column] = f"parts/{part.name}/" + frame[column]
    made = pd.concat(made, ignore_index=True)
    ids = made["film_id"] + "/" + made["edit"].map(slug)
    if ids.to_list() != plan.loc[~plan["film_id"].isin(rejected["film_id"]), "id"].to_list():
        raise ValueError(f"the parts in {out} are not those of its plan: delete {out / 'parts'}")
    made.insert(0, "id", ids)
    _write(made, out / "edits.parquet")
    return made


def _rejected(part):
    return pd.read_csv(part / "rejected.csv", dtype=str)


def _make(run, out, plan, shards, executor, options):
    """Run the shards that have work; JobsDied, one line, names those that died."""
    keys = list(plan["batch"].unique())

    def missing():
        with suppress(FileNotFoundError):
            return set(keys).difference(os.listdir(out / "parts"))  # one look, however many
        return set(keys)

    todo = missing()
    busy = sorted({number % shards for number, key in enumerate(keys) if key in todo})
    threads = max(1, torch.get_num_threads() // shards) if executor == "local" else 0
    calls = [(str(run), str(out), shard, shards, threads) for shard in busy]
    where = "here" if (shards, executor) == (1, "local") else executor
    with tqdm(desc="batches", total=len(keys), disable=where == "here") as bar:

        def watch():
            if new := len(keys) - len(missing()) - bar.n:
                bar.update(new)

        died = run_jobs(make_shard, calls, out / ".jobs", where, options, watch) if busy else {}
    if died:
        left = plan["batch"].isin(missing()).sum()
        names, why = ", ".join(str(busy[n] + 1) for n in died), next(iter(died.values()))
        raise JobsDied(
            f"shard {names} of {shards} died: {why}; {left} of {len(plan)} counterfactuals are "
            "missing: the same command goes on with them"
        )


def _digest(parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(frame, path):
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
