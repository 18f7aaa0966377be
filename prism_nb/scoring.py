"""The editing score S_CLIP and the filter on it (paper 2.3, Eq. 1).

    S_CLIP = cos(E_I(X') - E_I(X), E_T(T') - E_T(T)), embeddings of unit length

A filter is a selection, not evidence: results are reported before and after it. Films (B, H, W)
in [0, 1]. Used by notebook 04.
"""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from prism_nb.diffusion import ModelError, locate
from prism_nb.files import one_line

# Encoders by a short name: the paper's, and one trained on medical images, chest films among them
# (gated: its terms are accepted on the hub). Any CLIP or SigLIP of transformers does as well.
ENCODERS = {"openai": "openai/clip-vit-large-patch14", "medsiglip": "google/medsiglip-448"}


class ClipScorer:
    """A CLIP with its image and text sides, and the score of Eq. 1."""

    def __init__(self, clip, tokenizer, mean, std):
        self.clip, self.tokenizer = clip.eval().requires_grad_(False), tokenizer
        self.mean = torch.tensor(mean).view(1, 3, 1, 1).to(clip.device)
        self.std = torch.tensor(std).view(1, 3, 1, 1).to(clip.device)

    @torch.no_grad()
    def embed_films(self, films, batch_size=32):
        """Unit embeddings (B, D) of films (B, H, W) in [0, 1]."""
        size = self.clip.config.vision_config.image_size
        parts = []
        for part in torch.as_tensor(films, dtype=torch.float32).split(batch_size):
            x = part[:, None].to(self.clip.device)
            x = (
                F.interpolate(x, (size, size), mode="bicubic", antialias=True)
                .clamp(0, 1)
                .expand(-1, 3, -1, -1)
            )
            parts.append(
                _pooled(self.clip.get_image_features(pixel_values=(x - self.mean) / self.std))
            )
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts):
        """Unit embeddings (B, D) of captions."""
        config, how = self.clip.config, {"truncation": True, "return_tensors": "pt"}
        if config.model_type.startswith("siglip"):  # reads its last place, padding included
            how |= {
                "padding": "max_length",
                "max_length": config.text_config.max_position_embeddings,
            }
            given = {"input_ids": self.tokenizer(list(texts), **how).input_ids}
        else:
            tokens = self.tokenizer(list(texts), padding=True, **how)
            given = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        given = {name: value.to(self.clip.device) for name, value in given.items()}
        return F.normalize(_pooled(self.clip.get_text_features(**given)), dim=-1)

    def s_clip(self, factual, counterfactual, source, target):
        """S_CLIP (B,) in [-1, 1] of edits: films X and X', captions T and T'."""
        image_step = self.embed_films(counterfactual) - self.embed_films(factual)
        text_step = self.embed_texts(target) - self.embed_texts(source)
        return F.cosine_similarity(image_step, text_step, dim=-1).cpu().numpy()

    def margin(self, films, captions, others):
        """How much nearer films (B, H, W) are to their own captions than to others: (B,).

        A difference of cosines, in [-2, 2]: above zero where the film shows what its caption says.
        """
        step = self.embed_texts(captions) - self.embed_texts(others)
        return (self.embed_films(films) * step).sum(-1).cpu().numpy()


def _pooled(features):
    """The projected embedding, whether transformers returns it bare or in an output object."""
    return features if torch.is_tensor(features) else features.pooler_output


def load_clip(clip_model, base_model, device):
    """Load CLIP from "base" (the base model's clip/ folder), ENCODERS, a folder, or the hub.

    Raises ModelError, in one line, for what is missing or is no model of image and text.
    """
    folder = locate(base_model if clip_model == "base" else ENCODERS.get(clip_model, clip_model))
    if clip_model == "base":
        if not (Path(folder) / "clip").is_dir():
            raise ModelError(
                f"base model {base_model} has no clip/: give clip_model a folder or a hub name"
            )
        tokens, folder = Path(folder) / "tokenizer", Path(folder) / "clip"
    else:
        tokens = folder
    try:
        # Of half-precision embeddings, two that are alike differ by rounding alone.
        clip = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tokens)
        clip.get_text_features, clip.get_image_features  # noqa: B018
    except AttributeError:
        raise ModelError(
            f"{clip_model} is a {type(clip).__name__}: give a CLIP or SigLIP"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load CLIP {clip_model}: {one_line(error)}") from error
    return ClipScorer(clip.to(device), tokenizer, *_statistics(folder))


def _statistics(folder):
    """Mean and std of the image processor of a folder or hub name; CLIP's own where it has none."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError):
        return [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return processor.image_mean, processor.image_std
