"""What the workloads are measured on: phantom films, a base model, how many of each; and `time`.

On a CPU the bundled small base at 256 px; on a GPU Stable Diffusion v1.5's own settings at 512 px
with random weights, which take as long and draw nothing. Films (N, S, S) uint8.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.paired import Row, added_memory, ceilings, count_flops, paired, seconds
from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort
from prism_nb.counting import TEXT, UNET, VAE
from prism_nb.diffusion import PHANTOM_BASE, SCHEDULER, Model, load_model, pick_device
from prism_nb.latents import encode_cohort
from prism_nb.methods import draw_cases
from prism_nb.scoring import ClipScorer, load_clip

SIGHT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
SIGHT |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}  # CLIP ViT-L/14's


@dataclass(frozen=True)
class Scale:
    """How large the workloads are."""

    size: int = 256  # pixels a side
    films: int = 48  # on disk
    batch: int = 16  # films a training step
    many: int = 16  # films inverted at once
    edited: int = 8  # films edited at once
    steps: int = 10  # of DDIM
    classifier: str = "efficientnet_b0"
    gan: int = 128  # pixels a side
    pairs: int = 7
    repeats: int = 10  # of what takes milliseconds, a timing
    brief: bool = False  # no rows beside the main one


_QUICK = {"many": 4, "edited": 4, "steps": 2, "classifier": "test_efficientnet", "gan": 64}
SCALES = {"cpu": Scale(), "cuda": Scale(size=512, films=128, batch=32)}
SCALES["quick"] = Scale(films=32, batch=4, repeats=3, brief=True, **_QUICK)


class Case:
    """A device, films and a base model, each made once and shared by all workloads."""

    def __init__(self, folder, device="cpu", scale=None, base="phantom", parts=None, pairs=0):
        """parts: settings of U-Net, VAE and text encoder, for random weights in place of a base."""
        self.folder, self.device, self.base = folder, pick_device(device), base
        self.gpu = self.device.type == "cuda"
        self.parts = parts or ((UNET, VAE, TEXT) if self.gpu else None)
        torch.backends.cuda.matmul.allow_tf32 = self.gpu  # as the released code has it
        self.scale = scale or SCALES[self.device.type]
        self.pairs, self.brief = pairs or self.scale.pairs, self.gpu or self.scale.brief

    def time(self, workload, what, ours, name, peer, gate, target, unit, per=(1, 1), **options):
        """The Row of a workload whose gate is passed: two warm-ups, for memory and FLOPs, pairs.

        target: of peer / ours, (on a CPU, on a GPU). per: units in a call of ours, of the peer's.
        pairs: fewer than usual, where one takes long. bf16: ours computes in it, so that this is
        its ceiling. share=False: torch miscounts its FLOPs. warm=False: the gate has warmed up.
        slow: one warm-up, for memory, is enough for the peer.
        """
        row, flops = Row(workload, what, name, target[self.gpu], unit, gate), 0
        if options.get("warm", True):
            row.memory = tuple(added_memory(self.device, work) for work in (peer, ours))[::-1]
            if not options.get("slow"):
                peer()
            flops = count_flops(ours) / per[0]
        most = options.get("pairs", self.pairs)
        row.timed = paired(ours, peer, min(self.pairs, most), per)
        ceiling = f"matmul {'bf16' if options.get('bf16') else 'fp32'}, GFLOP/s"
        ceiling = np.median(row.timed["ours"]) * self.ceilings[ceiling] * 1e9
        row.share = flops / ceiling if flops and options.get("share", True) else None
        return row

    def compiled(self, unet, work):
        """Compile a U-Net in place for `work`, on a GPU; how long that took, in words."""
        if not self.gpu:
            return ""
        unet.compile()
        return f", compiled in {seconds(work)[0]:.0f} s"

    @cached_property
    def ceilings(self):
        """What this machine can do at most."""
        return ceilings(self.device)

    @cached_property
    def table(self):
        """Films on disk, with captions and their paths."""
        folder, scale = self.folder / "films", self.scale
        cohort = load_cohort(phantom.write_cohort(folder, scale.films, scale.size, seed=5))
        paths = [str(cohort.image_root / path) for path in cohort.table["path"]]
        return cohort.table.assign(caption=captions(cohort.table), path=paths)

    @cached_property
    def cases(self):
        """Films in memory whose true counterfactuals are known."""
        return draw_cases(["remove Support Devices"], self.scale.edited, self.scale.size)[0]

    def load(self, frozen=torch.float32):
        """A model of its own; each has the same weights. frozen: what VAE and CLIP are held in."""
        if self.parts:
            return random_model(self.parts, self.device, frozen)
        return load_model(str(self.base), device=self.device.type, precision="fp32")

    @cached_property
    def model(self):
        """The model that computes in float32, for all that leave weights alone."""
        return self.load()

    @cached_property
    def half(self):
        """The same weights, computed with in bfloat16; so are the frozen parts on a GPU."""
        model = self.load(torch.bfloat16) if self.gpu else self.model
        return replace(model, unet=self.model.unet, dtype=torch.bfloat16)

    def latents(self, model, name="latents", count=None):
        """The latents and captions of the first films, encoded by the package."""
        about = {"size": self.scale.size, "fit": "squash", "num_verified": 0}
        return encode_cohort(model, self.table[:count], "/", folder=self.folder / name, **about)

    def scorer(self):
        """The base's CLIP; with random weights one of OpenAI's large size."""
        if not self.parts:
            return load_clip("base", str(self.base), self.device)
        sides = {"text_config": self.parts[2], "vision_config": SIGHT}
        with self.device:
            clip = CLIPModel(CLIPConfig(**sides, projection_dim=768))
        return ClipScorer(clip, self.model.tokenizer, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28])


def random_model(parts, device, frozen, seed=0):
    """Stable Diffusion with settings `parts` and random weights: right in time, wrong in all else.

    Words are those of the bundled tokenizer, whose ids a larger vocabulary has as well.
    """
    unet, vae, text = parts
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        unet, vae = UNet2DConditionModel(**unet), AutoencoderKL(**vae).to(frozen)
        text = CLIPTextModel(CLIPTextConfig(**text)).to(frozen)
    tokenizer = CLIPTokenizer.from_pretrained(PHANTOM_BASE / "tokenizer")
    unet, vae, text = (part.eval().requires_grad_(False) for part in (unet, vae, text))
    scheduler, about = DDIMScheduler(**SCHEDULER), ("random weights", "", device)
    return Model(vae, text, tokenizer, unet, scheduler, *about)
