"""The classifier itself: a network over grey films, made, asked, saved and loaded (section 3.2).

A timm network (the paper takes EfficientNet with four heads) or torchvision's AlexNet over one
grey channel, with normalisation and temperature inside. N films, uint8 (N, H, W) with H = W;
K heads; logits and probabilities (N, K). On disk: a folder with the network's safetensors and
card.json, which says what the heads are. `classifiers` trains and scores it.
Used by notebooks 05 and 06.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prism_nb.files import atomic_path, read_json, sha256_file, write_json
from prism_nb.findings import nearest

MEAN, STD = 0.449, 0.226  # ImageNet's, averaged over the colours: what pretrained weights expect
WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"


class ClassifierError(ValueError):
    """A classifier, its weights or its data cannot be used."""


class Classifier(nn.Module):
    """A network from grey films to logits, with resizing, normalisation and temperature inside."""

    def __init__(self, network, architecture, num_heads, sees=0):
        super().__init__()
        self.network, self.architecture, self.num_heads = network, architecture, num_heads
        self.sees = sees  # pixels a side that the network sees of a larger film; 0: all
        self.temperature = 1.0  # set by fit_temperature
        self.image_size = 0  # set by fit; 0: any

    def forward(self, films):
        """Films (B, H, W), uint8 or float in [0, 1], to logits (B, K); differentiable in floats."""
        films = films.float() / 255 if films.dtype == torch.uint8 else films
        pixels = ((films - MEAN) / STD).unsqueeze(1)  # (B, 1, H, W)
        if 0 < self.sees < pixels.shape[-1]:
            shape = (self.sees, self.sees)
            pixels = nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True)
        return self.network(pixels) / self.temperature


def build_classifier(name, num_heads, weights="", seed=0, sees=0):
    """Make an untrained classifier.

    name: a timm architecture or "alexnet". sees: larger films are shrunk to so many pixels a side;
    0: none is. weights: "" (drawn from seed), "imagenet", or a path to safetensors of the same
    architecture, whose last layer is not used. Raises ClassifierError for an unknown name (naming
    the nearest), for weights that cannot be had, and for those of a judge.
    """
    import timm

    known = [*timm.list_models(), "alexnet"]
    if name not in known:
        raise ClassifierError(
            f"classifier {name!r} is not known; the nearest is {nearest(name, known)!r}. "
            "Take a timm architecture or alexnet."
        )
    if num_heads < 1:
        raise ClassifierError(f"num_heads is {num_heads}; at least 1 is needed.")
    file = weights_file(weights)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(seed)
        try:
            make = _alexnet if name == "alexnet" else _timm
            network = make(name, num_heads, weights == "imagenet", file)
        except _bad_weights() as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ClassifierError(
                f"weights {weights!r} of {name} cannot be had ({reason}); give a path to their "
                'safetensors, or "" to train from scratch.'
            ) from None
    model = Classifier(network, name, num_heads, sees).eval()
    return model.to(memory_format=torch.channels_last)  # 1.4 times faster on a CPU


def weights_file(weights):
    """The file of start weights: named, or in a folder that is; None for "" and "imagenet"."""
    if weights in ("", "imagenet"):
        return None
    file = Path(weights) / WEIGHTS_FILE if Path(weights).is_dir() else Path(weights)
    if file.suffix != ".safetensors" or not file.is_file():
        raise ClassifierError(
            f'weights {str(weights)!r} is no file; "", "imagenet" or the path of a .safetensors '
            "file is needed."
        )
    card = file.parent / CARD_FILE
    if card.is_file() and read_json(card).get("role") == "judge":
        raise ClassifierError(
            f"weights {str(weights)!r} are a judge's; what it is to judge must not start from it."
        )
    return file


def _bad_weights():
    from safetensors import SafetensorError

    return OSError, RuntimeError, ValueError, SafetensorError  # no network, no or other weights


def _timm(name, num_heads, imagenet, file):
    import timm

    overlay = {"file": str(file)} if file else None  # timm sums colours and drops the last layer
    return timm.create_model(
        name,
        pretrained=imagenet or file is not None,
        pretrained_cfg_overlay=overlay,
        in_chans=1,
        num_classes=num_heads,
    )


def _alexnet(_, num_heads, imagenet, file):
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    network = alexnet(weights="IMAGENET1K_V1" if imagenet else None)
    state = load_file(file) if file else network.state_dict()
    first, last = network.features[0], network.classifier[-1]
    network.features[0] = nn.Conv2d(1, first.out_channels, 11, stride=4, padding=2)
    network.classifier[-1] = nn.Linear(last.in_features, num_heads)
    state["features.0.weight"] = state["features.0.weight"].sum(1, keepdim=True)
    state |= {k: v for k, v in network.state_dict().items() if k.startswith("classifier.6.")}
    network.load_state_dict(state)
    return network


def logits_of(model, images, batch_size=64):
    """What the classifier says of films (N, H, W), before the sigmoid: float32 (N, K)."""
    images = check_films(images, model)
    if model.image_size and len(images) and images.shape[1] != model.image_size:
        raise ClassifierError(
            f"films have {images.shape[1]} pixels and the classifier was trained at "
            f"{model.image_size}; load them at that size."
        )
    model.eval()
    device = next(model.parameters()).device
    logits = [np.empty((0, model.num_heads), dtype=np.float32)]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            films = torch.tensor(images[start : start + batch_size], device=device)
            logits.append(model(films).float().cpu().numpy())
    return np.concatenate(logits)


def features_of(model, images, batch_size=64):
    """What the last layer is given of films (N, H, W): float32 (N, D), for metrics.kid."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    found = [torch.empty(0, last.in_features)]
    hook = last.register_forward_pre_hook(lambda _, given: found.append(given[0].float().cpu()))
    try:
        logits_of(model, images, batch_size)
    finally:
        hook.remove()
    return torch.cat(found).numpy()


def predict(model, images, batch_size=64):
    """Probability of every finding: films uint8 (N, H, W) to float32 (N, K) in [0, 1]."""
    return torch.from_numpy(logits_of(model, images, batch_size)).sigmoid().numpy()


def refresh_norms(model, images, seed=0, num_films=256):
    """Measure batch-norm statistics anew with the present weights.

    Running averages lag behind the weights; after some 30 steps that costs 0.2 of AUROC.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        return
    device = next(model.parameters()).device
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # plain average
    order = np.random.default_rng(seed).permutation(len(images))[:num_films]
    model.train()
    with torch.no_grad():
        for index in np.array_split(order, -(-len(order) // 64)):
            model(torch.from_numpy(images[np.sort(index)]).to(device))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


def check_films(images, model):
    """Films as an array, once they are uint8 (N, size, size) and large enough for the network."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ClassifierError(
            f"films are {images.dtype} of shape {images.shape}; uint8 (N, size, size) is needed. "
            "Use images.load_films, or images.unit_to_uint8."
        )
    smallest = 63 if model.architecture == "alexnet" else 32  # the others halve five times
    seen = min(images.shape[1], model.sees or images.shape[1])
    if len(images) and seen < smallest:
        raise ClassifierError(
            f"films are seen at {seen} pixels; {model.architecture} needs {smallest} or more."
        )
    return images


def save_classifier(folder, model, heads, card=None):
    """Write the network and its card (heads, size, temperature, and what `card` adds)."""
    from safetensors.torch import save_file

    if len(heads) != model.num_heads:
        raise ClassifierError(f"{len(heads)} heads named, the classifier has {model.num_heads}.")
    folder = Path(folder)
    state = {k: v.cpu().contiguous() for k, v in model.network.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as partial:
        save_file(state, partial)
    known = {
        "architecture": model.architecture,
        "heads": list(heads),
        "image_size": model.image_size,
        "sees": model.sees,
        "temperature": model.temperature,
        "sha256": sha256_file(folder / WEIGHTS_FILE),  # a kill between the two files is noticed
    }
    write_json(folder / CARD_FILE, (card or {}) | known)
    return folder


def film_keys(film_ids, source=""):
    """A digest of each film's id, for a card's `trained_on`; source: whose ids they are."""
    return [hashlib.sha256(f"{source}/{film}".encode()).hexdigest()[:16] for film in film_ids]


def check_judge(card, keys):
    """Refuse as a judge what is none, or was trained on films it would judge (their film_keys)."""
    if card.get("role") != "judge" or "trained_on" not in card:
        raise ClassifierError(
            f"this classifier's card gives its role as {card.get('role')!r}; only a judge, whose "
            "card says which films it was trained on, may judge."
        )
    if seen := set(keys).intersection(card["trained_on"]):
        raise ClassifierError(
            f"the judge was trained on {len(seen)} of the {len(set(keys))} films that it is to "
            "judge; train one without them."
        )


def load_classifier(folder):
    """Read a saved classifier: (model, card); card["heads"] names its outputs.

    Raises ClassifierError if there is none, or if weights and card do not belong together.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / CARD_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ClassifierError(f"no classifier in {folder}; run 05_evaluate to train one.")
    try:
        card = read_json(folder / CARD_FILE)
        if sha256_file(folder / WEIGHTS_FILE) != card["sha256"]:
            raise ValueError("the weights are not those of its card")
        model = build_classifier(card["architecture"], len(card["heads"]))
        model.network.load_state_dict(load_file(folder / WEIGHTS_FILE))
        model.temperature, model.image_size = card["temperature"], card["image_size"]
        model.sees = card["sees"]
    except (KeyError, TypeError, *_bad_weights()) as error:
        reason = str(error).splitlines()[0]
        raise ClassifierError(
            f"classifier in {folder} is damaged ({reason}); delete the folder, run 05_evaluate."
        ) from None
    return model, card
