"""Every film and every caption of a cohort, encoded once: training never touches VAE or CLIP again.

The VAE's posterior is kept as mean and standard deviation, so that each step can draw its own
sample, as Algorithm 1's `vae.encode` does. Equal captions share one row of text embeddings. The
folder holds shards of SHARD films, 000000.safetensors and so on, text.safetensors and, written
last, index.json; each names the key of all that it was made from, the bytes of the films included,
so that a killed encoding goes on where it stopped, and none is ever used for other films, settings
or weights. Films are read to compare them only where a size or a time of change is another than
when they were last read. Shapes: mean, std (N, C, h, w), already scaled; text (U, L, D);
caption_index (N,). Used by notebooks 02 and 06.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prism_nb.diffusion import VAE_BATCH, embed_captions, posterior, weights_hash
from prism_nb.files import atomic_path, read_json, sha256_file, write_json
from prism_nb.images import ImageError, load_films, uint8_to_unit

SHARD = 1024  # films a file: what a killed encoding loses at most
STAMPS = ".films.json"  # hidden, so that no time of change counts as a result
PREPROCESSING = 3  # raise it when images.load_films gives other pixels for the same file
# Error of a stored row, relative to a fresh one: beyond rounding, below any change that matters.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05}  # by what the VAE computes in


class LatentError(ValueError):
    """Latents are missing, damaged or of other films; the message says what to do."""


@dataclass
class Latents:
    """A cohort in latent space, row by row in the order of `film_ids`, memory-mapped."""

    film_ids: list
    captions: list  # different ones only; the last is the empty one, which dropout uses
    caption_index: np.ndarray
    text: torch.Tensor
    key: str  # of all that the latents were made from
    shards: list  # of (mean, std), tensors of shard_size rows each
    shard_size: int

    def __len__(self):
        return len(self.film_ids)

    @property
    def shape(self):
        """Shape (N, C, h, w) of all means together."""
        return (len(self), *self.shards[0][0].shape[1:])

    def spread(self, num_films=1024):
        """Standard deviation of the means of some films: near 1 where the VAE's scale is right."""
        return float(self.gather(_some(np.arange(len(self)), num_films))[0].float().std())

    def mean(self, rows, num_films=1024):
        """Mean film (C, h, w) of some rows, at most num_films of them: see generate_films."""
        return self.gather(_some(rows, num_films))[0].float().mean(0)

    def rows(self, film_ids):
        """Row numbers of some films."""
        place = {film: row for row, film in enumerate(self.film_ids)}
        unknown = [film for film in film_ids if film not in place]
        if unknown:
            raise LatentError(
                f"film {unknown[0]} ({len(unknown)} in all) has no latents: it is not of the "
                "cohort that was encoded; run 02_finetune again"
            )
        return np.array([place[film] for film in film_ids], dtype=np.int64)

    def gather(self, rows):
        """Posterior mean and std, each (B, C, h, w) of the stored dtype, of some rows."""
        rows = np.asarray(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise LatentError(f"rows {rows.min()} to {rows.max()} of {len(self)} were asked for")
        shards, at = np.divmod(rows, self.shard_size)
        # Copied by numpy, since a second thread takes longer to wake than this takes.
        if len(rows) and (shards == shards[0]).all():
            return tuple(torch.from_numpy(part.numpy()[at]) for part in self.shards[shards[0]])
        shape, dtype = (len(rows), *self.shape[1:]), self.shards[0][0].dtype
        both = [torch.empty(shape, dtype=dtype) for _ in "ms"]
        for row, (number, place) in enumerate(zip(shards, at, strict=True)):
            for part, out in zip(self.shards[number], both, strict=True):
                out.numpy()[row] = part.numpy()[place]
        return tuple(both)

    def cond(self, rows):
        """Caption embeddings (B, L, D) of some rows."""
        return self.text[self.caption_index[rows]]


def encode_cohort(
    model,
    table,
    image_root,
    size,
    fit,
    folder,
    batch_size=VAE_BATCH,
    progress=None,
    dtype=torch.float16,
    num_verified=64,
):
    """Encode a cohort's films and captions into `folder`, keeping what is there, and return them.

    progress: called with the number of films done since the last call, as tqdm's update is. dtype:
    of the stored films, float16 or float32. Raises LatentError, which names the file, for a film
    that cannot be read, and where num_verified rows taken at random differ from a fresh encode.
    """
    folder, progress = Path(folder), progress or (lambda done: None)
    if not len(table) or (table["caption"].fillna("") == "").any():
        raise LatentError("no film, or one without caption, to encode: run 01_caption again")
    paths = [Path(image_root) / path for path in table["path"]]
    index = _plan(model, table, size, fit, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)  # with it, the folder counts as finished
    for number, start in enumerate(range(0, len(paths), SHARD)):
        films, part = (some[start : start + SHARD] for some in (index["film_ids"], paths))
        content, path = _content(folder, number, part), _shard(folder, number)
        index["shards"].append(key := _key(index["settings"], films, content))
        if _open(path, key):
            progress(len(part))
            continue
        mean, std = _encode(model, part, size, fit, batch_size, dtype, progress)
        _write(path, {"mean": mean, "std": std}, key)
    if not _open(folder / "text.safetensors", index["text"]):
        text = embed_captions(model, index["captions"]).cpu()
        _write(folder / "text.safetensors", {"text": text}, index["text"])
    for path in folder.glob("[0-9]" * 6 + ".safetensors"):
        if int(path.stem) >= len(index["shards"]):  # left behind by a larger cohort
            path.unlink()
    index["key"] = _key(index["shards"], index["text"], index["caption_index"])
    write_json(folder / "index.json", index)
    latents = load_latents(folder)
    if num_verified:
        verify(model, latents, paths, size, fit, folder, batch_size, num_verified)
    return latents


def _some(rows, most):
    """At most so many of the rows, evenly spread over them."""
    return np.asarray(rows)[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def _plan(model, table, size, fit, dtype):
    """What index.json says, but for what the bytes of the films decide: `shards` and `key`."""
    captions, caption_index = np.unique(table["caption"].to_numpy(dtype=str), return_inverse=True)
    captions, films = [*captions.tolist(), ""], table["film_id"].tolist()
    about = {
        "vae": weights_hash(model.vae),
        "scaling_factor": model.vae.config.scaling_factor,
        "size": size,
        "fit": fit,
        "preprocessing": PREPROCESSING,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tokenizer = [sorted(model.tokenizer.get_vocab().items()), model.tokenizer.model_max_length]
    text = _key(weights_hash(model.text_encoder), tokenizer, captions)
    return {
        "film_ids": films,
        "captions": captions,
        "caption_index": caption_index.tolist(),
        "settings": about,
        "shard_size": SHARD,
        "shards": [],
        "text": text,
    }


def _content(folder, number, paths):
    """Digest of the bytes of a shard's films; unchanged sizes and times spare reading them."""
    known = read_json(folder / STAMPS) if (folder / STAMPS).is_file() else {}
    try:
        stamp = _key(*map(_stamp, paths))
        if known.get(str(number), [""])[0] == stamp:
            return known[str(number)][1]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
            content = _key(*readers.map(sha256_file, paths))
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}."
        raise LatentError(f"{what} Run 01_caption again: it sets such films aside.") from None
    write_json(folder / STAMPS, known | {str(number): [stamp, content]})
    return content


def _stamp(path):
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _key(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode(model, paths, size, fit, batch_size, dtype, progress):
    """Mean and std, each (B, C, h, w) on the CPU, of some films; the next are read meanwhile."""
    parts = [paths[k : k + batch_size] for k in range(0, len(paths), batch_size)]
    means, stds = [], []
    with ThreadPoolExecutor(1) as reader:
        try:
            for films in reader.map(lambda part: load_films(part, size, fit), parts):
                mean, std = posterior(model, uint8_to_unit(films))
                means.append(mean.cpu().to(dtype))
                stds.append(std.cpu().to(dtype))
                progress(len(films))
        except ImageError as error:
            raise LatentError(f"{error} Run 01_caption again: it sets such films aside.") from None
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


def verify(model, latents, paths, size, fit, folder, batch_size=VAE_BATCH, num_rows=64):
    """Compare rows taken at random with a fresh encode; raises LatentError where they differ."""
    rng = np.random.default_rng(int(latents.key[:16], 16))
    rows = rng.permutation(len(latents))[:num_rows]
    chosen = [paths[row] for row in rows]
    fresh = _encode(model, chosen, size, fit, batch_size, torch.float32, lambda done: None)
    used = np.unique(latents.caption_index[rows])
    text = embed_captions(model, [latents.captions[i] for i in used], warn=False).cpu()
    stored = (*(part.float() for part in latents.gather(rows)), latents.text[used])
    for name, old, new in zip(
        ("means", "spreads", "captions"), stored, (*fresh, text), strict=True
    ):
        off = ((old - new).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)).max().item()
        if not off <= TOLERANCE[model.vae.dtype]:  # NaN is refused as well
            raise LatentError(
                f"{folder}: stored {name} differ by up to {off:.1%} from a fresh encode of "
                f"{len(rows)} films: delete this folder and run 02_finetune again"
            )


def _shard(folder, number):
    return folder / f"{number:06d}.safetensors"


def _write(path, tensors, key):
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"key": key})


def _open(path, key):
    """A file's tensors, memory-mapped; {} unless it is whole and bears that key."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass
    return {}


def load_latents(folder):
    """Open what encode_cohort wrote; raises LatentError where it is missing or damaged."""
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise LatentError(f"{folder} holds no finished latents: run 02_finetune")
    index = read_json(folder / "index.json")
    wanted = {_shard(folder, number): key for number, key in enumerate(index["shards"])}
    wanted[folder / "text.safetensors"] = index["text"]
    opened = {path: _open(path, key) for path, key in wanted.items()}
    for path, tensors in opened.items():
        if not tensors:
            raise LatentError(f"{path} is missing, damaged or another's: run 02_finetune again")
    *films, text = opened.values()
    return Latents(
        film_ids=index["film_ids"],
        captions=index["captions"],
        caption_index=np.array(index["caption_index"], dtype=np.int64),
        text=text["text"],
        key=index["key"],
        shards=[(part["mean"], part["std"]) for part in films],
        shard_size=index["shard_size"],
    )
