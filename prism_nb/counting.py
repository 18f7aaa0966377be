"""FLOPs and bytes of the networks, counted without their weights.

A Sketch holds a base model's U-Net and VAE as fake tensors: all shapes, no memory. What it is asked
to do runs as it would, and torch's counter adds up the FLOPs (a multiply-add is two) while Alive
follows the bytes of all tensors that exist at one time. Shapes: z (B, C, h, w); cond (B, L, D).
Used by planner.py, behind `prism-nb plan`.
"""

import math
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel

from prism_nb.diffusion import locate, predict_noise
from prism_nb.files import read_json
from prism_nb.finetune import LORA_LAYERS

# Stable Diffusion v1, as published: what a base model on the hub is counted as.
UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # no scaling_factor: diffusers' default is the 0.18215 of these weights
TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}


def _attention(query, key, value, *_, out_shape=None, **__):
    return sdpa_flop_count(query, key, value)


def _attention_backward(_, query, key, value, *__, out_shape=None, **___):
    return 2 * sdpa_flop_count(query, key, value)  # without what a fused kernel computes again


ATTENTION = {  # torch counts those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def configs(base_model):
    """Settings of U-Net, VAE and text encoder: a folder's, else those of Stable Diffusion v1."""
    folder = Path(locate(base_model))
    if not folder.is_dir():
        return UNET, VAE, TEXT
    if (folder / "base.json").is_file():  # a tuned U-Net beside a pointer to the rest
        return configs(read_json(folder / "base.json")["base_model"])
    parts = ("unet", "vae", "text_encoder")
    return tuple(read_json(folder / part / "config.json") for part in parts)


class Alive(TorchDispatchMode):
    """The bytes of tensors made by what runs inside and still alive: `now`, and `peak`."""

    def __init__(self, *modules):
        """What the modules hold is not counted."""
        super().__init__()
        self.now = self.peak = 0
        weights = [w for module in modules for w in module.state_dict().values()]
        self.known = {w.untyped_storage()._cdata for w in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an op, and follow each storage that it makes until it is gone."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


class AsOnGpu(TorchFunctionMode):
    """Norms in float32 under autocast, as a GPU has them and a CPU has not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a function, its input turned to float32 where it is a norm."""
        if func in (F.group_norm, F.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class Sketch:
    """A base model without weights, for films of some pixels a side."""

    def __init__(self, base_model, side, gpu=True, bf16=False, lora_rank=0):
        """gpu: count what a GPU would hold; with bf16 the frozen parts are held in bf16 there."""
        self.gpu, self.mode = gpu, FakeTensorMode()
        unet, vae, text = configs(base_model)
        with self.mode:
            self.unet = UNet2DConditionModel.from_config(unet).eval()
            torch.set_default_dtype(torch.bfloat16 if gpu and bf16 else torch.float32)
            try:
                self.vae = AutoencoderKL.from_config(vae).eval().requires_grad_(False)
                self.text = CLIPTextModel(CLIPTextConfig(**text)).requires_grad_(False)
            finally:
                torch.set_default_dtype(torch.float32)
            parts = (self.unet, self.vae, self.text)
            weights = [w for part in parts for w in part.parameters()]
            self.num_bytes = sum(w.numel() * w.element_size() for w in weights)  # on the device
            self.num_unet, _, self.num_text = (sum(map(torch.numel, p.parameters())) for p in parts)
            self.trained = self._lora(lora_rank) if lora_rank else list(self.unet.parameters())
        self.num_trained = sum(map(torch.numel, self.trained))
        small = side // 2 ** (len(vae["block_out_channels"]) - 1)
        self.image, self.latent = (3, side, side), (unet["in_channels"], small, small)
        self.caption = (text["max_position_embeddings"], unet["cross_attention_dim"])
        self.latent_size, self.caption_size = math.prod(self.latent), math.prod(self.caption)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = SimpleNamespace(unet=self.unet, dtype=dtype, device=torch.device("cpu"))

    def _lora(self, rank):
        """Put low-rank matrices beside the layers that add_lora picks: the weights to train."""
        self.unet.requires_grad_(False)
        trained = []
        for name, layer in self.unet.named_modules():
            if name.endswith(tuple(LORA_LAYERS)):
                down = torch.nn.Linear(layer.in_features, rank, bias=False)
                up = torch.nn.Linear(rank, layer.out_features, bias=False)
                layer.register_forward_hook(lambda _, x, y, up=up, down=down: y + up(down(x[0])))
                trained += [down.weight, up.weight]
        return trained

    def count(self, work):
        """FLOPs of a function without arguments, and peak bytes beyond the model's weights."""
        flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        alive = Alive(self.unet, self.vae)
        with self.mode, AsOnGpu() if self.gpu else nullcontext(), flops, alive:
            work()
        return flops.get_total_flops(), alive.peak

    def _noise(self, rows, tuned=False):
        cond = torch.randn(rows, *self.caption, requires_grad=tuned)
        return predict_noise(self.model, torch.randn(rows, *self.latent), 500, cond)

    def train(self, rows, batches=1):
        """Forward and backward of some batches of a training step; the gradients stay."""
        batches = min(batches, 2)  # from the second on, what is alive is always the same

        def work():
            for _ in range(batches):
                self._noise(rows).square().mean().backward()

        flops, peak = self.count(work)
        self.unet.zero_grad()
        return flops // batches, peak

    def tune(self, rows):
        """A step of null-text: forward, and backward to the captions alone."""
        for weight in self.trained:
            weight.requires_grad_(False)
        found = self.count(lambda: self._noise(rows, tuned=True).square().mean().backward())
        for weight in self.trained:
            weight.requires_grad_(True)
        return found

    @torch.no_grad()
    def predict(self, rows):
        """One call of the U-Net."""
        return self.count(lambda: self._noise(rows))

    @torch.no_grad()
    def encode(self, films):
        """The VAE's encoder."""
        shape, dtype = (films, *self.image), self.vae.dtype
        return self.count(lambda: self.vae.encode(torch.randn(shape, dtype=dtype)))

    @torch.no_grad()
    def decode(self, films):
        """The VAE's decoder."""
        shape, dtype = (films, *self.latent), self.vae.dtype
        return self.count(lambda: self.vae.decode(torch.randn(shape, dtype=dtype)))


def classifier_flops(name, side):
    """FLOPs of a classifier's forward pass over one grey film of some pixels a side."""
    from prism_nb.networks import build_classifier

    flops = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), flops:
        build_classifier(name, 1)(torch.zeros(1, side, side))
    return flops.get_total_flops()


def measured_rate(bf16=False, rows=4, repeats=3):
    """FLOPs a second of one thread of this machine, by the bundled U-Net with random weights.

    The thread's own time counts, not the clock's: what else runs here now hardly changes it.
    """
    sketch, seconds, threads = Sketch("phantom", 256, gpu=False), [], torch.get_num_threads()
    unet = UNet2DConditionModel.from_config(configs("phantom")[0]).eval()
    z, cond = torch.randn(rows, *sketch.latent), torch.randn(rows, *sketch.caption)
    torch.set_num_threads(1)
    for _ in range(repeats):
        began = time.process_time()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            unet(z, 500, encoder_hidden_states=cond)
        seconds.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return sketch.predict(rows)[0] / min(seconds)
