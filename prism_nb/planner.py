"""What a profile will need before it is run: memory, disk and hours, and what to change to fit.

FLOPs and bytes are counted (counting.py) at the profile's own sizes; hours are FLOPs over the speed
of a GPU times the share of it that is reached, or over this machine's own speed, measured, as it is
when nothing else runs. Appendices, sweeps and downloads do not count. What the data decide is taken
as said: half of the films can take an edit, null-text takes all its inner
steps. N steps of DDIM; bytes and FLOPs are plain numbers. Used by `prism-nb plan`.
"""

import os
from functools import cached_property, lru_cache
from pathlib import Path

import pandas as pd
import torch

from prism_nb.columns import read_table
from prism_nb.counting import Sketch, classifier_flops, measured_rate
from prism_nb.editing import PRESETS, choose
from prism_nb.edits import given_dials
from prism_nb.inversion import METHODS
from prism_nb.params import MODELS, for_notebook, validate
from prism_nb.run import project_root, resolve_path

# Share of a GPU's bf16 that is reached. U-Net: MosaicML's training of Stable Diffusion 2, 36 films
# a second on an A100. Classifier: timm's EfficientNet-B0, 1,750 a second. Float32: a quarter.
REACHED = {"unet": 0.28, "train": 0.28, "vae": 0.28, "classifier": 0.013, "fp32": 0.25}
# Of what the U-Net alone reaches on one thread, times the threads: by a run on two quiet cores.
ON_CPU = {"unet": 0.87, "train": 0.65, "vae": 0.37, "classifier": 0.45}
SLACK, LIBRARIES = 1.1, 1e9  # what allocators keep besides; bytes
CLIP = 1.7e9  # bytes of a CLIP ViT-L/14, where S_CLIP is not the base model's own
PNG = 0.75  # bytes a pixel
READ, RENDER, START = 0.02, 0.06, 10  # seconds: a film and processor; a notebook
ABLE = 0.5  # share of films that can take an edit
GAN = 0.7e12 / 512**2  # FLOPs a pixel of a step of GANterfactual


_sketch, _cpu_rate = lru_cache(maxsize=4)(Sketch), lru_cache(maxsize=2)(measured_rate)


class Plan:
    """Memory, disk and hours of a profile's checked values."""

    def __init__(self, values, gpus=1, tflops=312.0, num_films=0):
        """gpus: 0 is this machine's processors. tflops: of one GPU in bf16, dense.

        num_films: of the cohort; 0: as its run folder or CSV tells. Raises ValueError.
        """
        for name, number in {"gpus": gpus, "films": num_films}.items():
            if number < 0:
                raise ValueError(f"{name} is {number}; give 0 or more")
        if tflops <= 0:
            raise ValueError(f"tflops is {tflops}; give more than 0")
        self.gpus, self.tflops = gpus, tflops
        p = [validate(name, for_notebook(values, name)) for name in list(MODELS)[:6]]
        self.cohort, self.tune, self.invert, self.edit, self.judge, self.augment = p
        if gpus and self.tune.train_batch_size % gpus:
            given = f"train_batch_size is {self.tune.train_batch_size} for {gpus} GPUs"
            raise ValueError(f"{given}: give a multiple of {gpus}")
        self.num_films, self.num_captions = count_films(self.cohort, num_films)
        share = (1 - self.cohort.test_share) * (1 - self.cohort.val_share)
        self.num_train, self.side = int(self.num_films * share), self.cohort.image_size
        chosen = self.invert.num_test_films + self.invert.num_train_films
        self.num_edited = min(chosen, self.num_films)
        self.dials = choose(self.edit.preset, given_dials(self.edit))

    def sketch(self, precision="fp32"):
        """The base model without weights."""
        base = resolve_path("base_model", self.tune.base_model, project_root())
        return _sketch(base, self.side, self.gpus > 0, precision == "bf16", self.tune.lora_rank)

    def memory(self):
        """Bytes on the device for training and for editing, and beside it for the notebooks."""
        films, edited = self.num_films * self.side**2, self.num_edited * self.side**2
        inverted = 2 * self.num_edited * self.inversion_bytes()  # the parts, and all in one
        beside = max(2 * films, inverted + 16 * edited) + LIBRARIES
        return {"training": self.training(), "editing": self.editing(), "notebooks": beside}

    def training(self):
        """Bytes of a training step on each device: weights, AdamW, EMA, gradients, activations."""
        tune, sketch = self.tune, self.sketch(self.tune.precision)
        _, alive = sketch.train(tune.train_batch_size // max(self.gpus, 1), tune.accumulation)
        trained = sketch.num_trained + sketch.num_text * tune.train_text_encoder
        states = 8 + 4 * (tune.ema_decay > 0) + 4 * (self.gpus > 1)  # the last: DDP's buckets
        return SLACK * (sketch.num_bytes + states * trained + alive) + LIBRARIES

    def editing(self):
        """Bytes of inverting and editing a batch: weights and the largest step."""
        sketch, batch = self.sketch(self.edit.precision), self.edit.edit_batch_size
        rows = batch * max(2, step_rows(self.dials))
        peaks = [sketch.predict(rows)[1], sketch.decode(min(batch, 16))[1]]
        if self.invert.inversion == "null_text":
            peaks.append(sketch.tune(batch)[1])
        clip = CLIP * (self.edit.clip_model != "base")
        most = max(peaks) if self.gpus else sum(peaks)  # malloc keeps what the others had
        return SLACK * (sketch.num_bytes + clip + most) + LIBRARIES

    def disk(self):
        """Bytes of what the notebooks write."""
        sketch = self.sketch()
        made = self.num_films * (self.cohort.csv == "phantom")
        edits = self.num_edited * (len(self.edit.edits) * ABLE + 3)  # 3: its floors
        kept = 3 * (3 + (self.tune.ema_decay > 0))  # two checkpoints, and one in the making
        return {
            "films": made * self.side**2 * PNG,
            "latents": latent_bytes(sketch, self.num_films, self.num_captions),
            "checkpoints": 4 * kept * sketch.num_trained,
            "model": 4 * sketch.num_unet,
            "inversions": self.num_edited * self.inversion_bytes(),
            "edits": edits * self.side**2 * PNG,
        }

    def inversion_bytes(self):
        """Bytes of a film's inversion: its latents at all levels, and what the method adds."""
        steps, sketch = self.invert.num_ddim_steps, self.sketch()
        latents = 1 + steps * (1 + (self.invert.inversion in ("direct", "ddpm")))
        tuned = steps * (self.invert.inversion == "null_text")
        return 4 * (latents * sketch.latent_size + tuned * sketch.caption_size)

    def hours(self):
        """Hours of each notebook of the road."""
        parts = self._caption, self._finetune, self._invert, self._edit, self._judge, self._augment
        return {name: (START + part()) / 3600 for name, part in zip(MODELS, parts, strict=False)}

    @cached_property
    def flops(self):
        """FLOPs of a film's way through each network: forward, or back as well (train, tune)."""
        sketch = self.sketch()
        ways = ("predict", "encode", "decode", "tune", "train")
        return {name: getattr(sketch, name)(1)[0] for name in ways}

    def seconds(self, flops, kind="unet", precision="bf16", threads=0):
        """Seconds of some FLOPs on one GPU, or on some threads; 0: all of this machine's."""
        bf16 = precision == "bf16"
        if self.gpus:
            rate = self.tflops * 1e12 * REACHED[kind] * (1 if bf16 else REACHED["fp32"])
        else:  # only the U-Net is ever in bf16
            rate = _cpu_rate(bf16 and kind in ("unet", "train")) * ON_CPU[kind]
            rate *= threads or torch.get_num_threads()
        return flops / rate

    def _used(self, precision, calls, encoded, decoded):
        """Seconds of the U-Net's calls, and of the VAE's on so many films."""
        f = self.flops
        films = encoded * f["encode"] + decoded * f["decode"]
        unet = self.seconds(calls * f["predict"], "unet", precision)
        return unet + self.seconds(films, "vae", precision)

    def _read(self):
        return self.num_films * READ / os.cpu_count()

    def _caption(self):
        return self._read() * (RENDER / READ if self.cohort.csv == "phantom" else 1)

    def _finetune(self):
        tune, f = self.tune, self.flops
        updates = tune.num_train_steps * tune.train_batch_size * tune.accumulation * f["train"]
        looks = 8 * (128 + 16 * (tune.num_train_steps // tune.validate_every))
        samples = 24 * tune.num_prompts
        trained = self.seconds(updates / max(self.gpus, 1), "train", tune.precision)
        used = self._used(tune.precision, looks + 20 * samples, self.num_films, samples)
        return trained + used + self._read()

    def _invert(self):
        p, f, calls, films = self.invert, self.flops, 0, 0
        ways = [(p.inversion, p.num_ddim_steps, self.num_edited)]
        ways += [(method, p.num_compared_steps, p.num_compared) for method in METHODS]
        for method, steps, number in ways:
            rows = inversion_rows(method, steps, f["tune"] / f["predict"])
            rows += steps * (2 if method == "null_text" else 1)  # and back
            calls, films = calls + number * rows, films + number
        return self._used(p.precision, calls, films, 2 * films)

    def _edit(self):
        p, steps = self.edit, self.invert.num_ddim_steps
        edits = self.num_edited * (len(p.edits) * ABLE + 1)  # 1: the sham edit
        tested = min(self.invert.num_test_films, self.num_edited) * len(p.edits) * ABLE
        peers = [edit_rows(PRESETS[name].dials, steps) for name in p.peers if name != p.preset]
        rows = edits * edit_rows(self.dials, steps) + tested * sum(peers)
        films = edits + tested * len(peers) + self.num_edited
        return self._used(p.precision, rows, 0, films)

    def _judge(self):
        p, flops, rendered = self.judge, 0, 0
        if not Path(p.judge).is_dir():
            rendered = p.judge_films * (self.cohort.csv == "phantom")
            films = 3 * (rendered or self.num_train) * p.judge_epochs + self.num_films
            flops = films * classifier_flops(p.judge, p.classifier_size or self.side)
        gan = (p.baseline == "train") * p.baseline_steps * GAN * p.baseline_size**2
        made = rendered * RENDER / os.cpu_count()
        judged = self.seconds(flops, "classifier") + self.seconds(gan) + made + self._read()
        return judged + self._cycles()

    def _cycles(self):
        """Seconds of null edits, and of edits there and back, once and five times over."""
        steps, turns = self.invert.num_ddim_steps, 3 * (1 + 5) * self.judge.num_cycle_films
        dear = self.flops["tune"] / self.flops["predict"]
        rows = inversion_rows(self.invert.inversion, steps, dear) + edit_rows(self.dials, steps)
        return self._used("fp32" if not self.gpus else "bf16", turns * rows, turns, 2 * turns)

    def _augment(self):
        p = self.augment
        films = self.num_train + self.invert.num_train_films * len(self.edit.edits) * ABLE
        each = classifier_flops(p.classifier, p.classifier_size or self.side)
        flops = 3 * films * p.classifier_epochs * len(p.arms) * p.num_augment_seeds * each
        threads = min(max(1, p.augment_workers), os.cpu_count())  # one a training
        return self.seconds(flops, "classifier", threads=threads) + self._read()


def advice(values, gpus, limit, num_films=0):
    """Settings with which training and editing fit into `limit` bytes, what costs least first.

    {} where all fits as it is. Raises ValueError where nothing helps.
    """
    changed, needs = {}, {"training": _lighter_training, "editing": _lighter_editing}
    for name, lighter in needs.items():
        while getattr(plan := Plan(values | changed, gpus, num_films=num_films), name)() > limit:
            if not (more := lighter(plan)):
                least = f"{getattr(plan, name)() / 1e9:.0f} GB"
                raise ValueError(f"{name} needs {least} at least, more than {limit / 1e9:.0f} GB")
            changed |= more
    return changed


def _lighter_training(plan):
    tune, least = plan.tune, max(plan.gpus, 1)
    if tune.precision == "fp32" and plan.gpus:
        return {"precision": "bf16"}
    if (size := tune.train_batch_size) > least:  # as many films an update, in smaller batches
        half = size // 2 if size % (2 * least) == 0 else least
        return {"train_batch_size": half, "accumulation": tune.accumulation * size // half}
    return {} if tune.lora_rank else {"lora_rank": 16}


def _lighter_editing(plan):
    if plan.edit.precision == "fp32" and plan.gpus:
        return {"precision": "bf16"}
    size = plan.edit.edit_batch_size
    return {"edit_batch_size": size // 2} if size > 1 else {}


# Calls of the U-Net, as rows of its batch


def inversion_rows(method, num_steps, tune=2.08):
    """Calls that an inversion takes a film; tune: what one with a backward pass counts as."""
    dear = {"fixed_point": 5, "direct": 2, "null_text": 3 + 10 * tune}
    return num_steps * dear.get(method, 1)


def step_rows(dials):
    """Calls that a step down takes an edit, with those that the edits of a film may share."""
    guided, steered = dials.guidance_scale != 1, dials.control != "plain"
    known = guided and dials.guidance_from == "source"
    watched = dials.automatic and dials.method != "diffedit" and not known
    return 1 + guided + (steered and dials.method == "inversion") + watched


def edit_rows(dials, num_steps):
    """Calls that an edit takes."""
    steps = round(dials.strength * num_steps)
    if dials.method == "ledits++":
        return 4 * steps  # up; then the caption, words that go, words that come
    return steps * step_rows(dials) + 20 * (dials.method == "diffedit")


def latent_bytes(sketch, num_films, num_captions):
    """Bytes of the tensors that encode_cohort writes: two a film in float16, one a caption."""
    return 2 * 2 * num_films * sketch.latent_size + 4 * num_captions * sketch.caption_size


def count_films(cohort, num_films=0):
    """Films of a cohort and their captions, the empty one too: the run's own, else the CSV's rows.

    Raises ValueError where neither is there and no number is given.
    """
    root = project_root()
    table = root / cohort.run_dir / "cohort.parquet"
    if table.is_file() and not num_films:
        captions = pd.read_parquet(table, columns=["caption"])["caption"]
        return len(captions), captions.nunique() + 1
    csv = Path(resolve_path("csv", cohort.csv, root))
    if cohort.csv == "phantom":
        num_films = num_films or cohort.phantom_patients
    elif not num_films and not csv.exists():
        raise ValueError(f"{csv} is not there: give --films, how many it has")
    elif not num_films and csv.is_dir():  # of DICOM
        num_films = max(1, sum(each.is_file() for each in csv.rglob("*")))
    elif not num_films:
        num_films = len(read_table(csv, "labels CSV"))
    num_films = min(num_films, cohort.max_films or num_films)
    return num_films, min(num_films // 2, 5000) + 1
