"""S_CLIP against its formula, and every kind of encoder it takes."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from prism_nb import scoring
from prism_nb.diffusion import ModelError
from prism_nb.scoring import ENCODERS, load_clip

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def films():
    return np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)


@pytest.fixture
def save_encoder(tmp_path, random_base):
    """A function that writes a tiny encoder beside the base's tokenizer, as on the hub."""

    def save(kind):
        tokenizer = AutoTokenizer.from_pretrained(random_base / "tokenizer")
        text = TINY | {"vocab_size": len(tokenizer), "projection_dim": 8}
        text |= {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
        text |= {"max_position_embeddings": 77 if kind == "clip" else 64}
        sight = TINY | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
        torch.manual_seed(0)
        if kind == "clip":
            text, sight = (
                c(**k).to_dict() for c, k in ((CLIPTextConfig, text), (CLIPVisionConfig, sight))
            )
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8))
        elif kind == "siglip":
            text = SiglipTextConfig(**text).to_dict()
            sight = SiglipVisionConfig(**sight).to_dict()
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=sight))
        else:
            model = CLIPTextModel(CLIPTextConfig(**text))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
        return str(tmp_path)

    return save


@pytest.mark.parametrize("kind", ["base", "clip", "siglip"])
def test_the_score_is_the_cosine_of_the_two_steps(kind, save_encoder, random_base, films):
    name = "base" if kind == "base" else save_encoder(kind)
    scorer = load_clip(name, str(random_base), "cpu")
    texts = ["Chest X-ray showing Edema", "Normal chest X-ray"]
    image, text = scorer.embed_films(films[:2]), scorer.embed_texts(texts)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))
    score = scorer.s_clip(films[:1], films[1:2], texts[:1], texts[1:])
    step_image, step_text = image[1] - image[0], text[1] - text[0]
    by_hand = step_image @ step_text / (step_image.norm() * step_text.norm())
    np.testing.assert_allclose(score, [by_hand.item()], atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_caption_scores_the_same_beside_a_longer_one(kind, save_encoder, random_base):
    scorer = load_clip(save_encoder(kind), str(random_base), "cpu")
    alone = scorer.embed_texts(["Chest X-ray showing Edema"])
    beside = scorer.embed_texts(["Chest X-ray showing Edema", "Chest X-ray showing " * 8])
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=0)


def test_what_is_no_encoder_is_said_in_one_line(save_encoder, random_base, tmp_path):
    with pytest.raises(ModelError, match="give a CLIP or SigLIP"):
        load_clip(save_encoder("text"), str(random_base), "cpu")
    with pytest.raises(ModelError, match="no such folder"):
        load_clip(str(tmp_path / "nowhere"), str(random_base), "cpu")


def test_half_precision_weights_are_scored_in_full(save_encoder, random_base, films):
    folder = save_encoder("clip")
    CLIPModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    scorer = load_clip(folder, str(random_base), "cpu")
    assert scorer.embed_films(films).dtype == torch.float32
    assert np.isfinite(scorer.s_clip(films[:1], films[1:2], ["Edema"], ["Normal"])).all()


def test_films_are_scaled_as_the_encoder_asks_wherever_it_lies(save_encoder, tmp_path, monkeypatch):
    folder = save_encoder("siglip")
    assert list(scoring._statistics(folder)[0]) == [0.5] * 3
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    assert scoring._statistics(folder)[0][0] == pytest.approx(0.4815, abs=1e-4)
    settings |= {"image_std": [0.25] * 3, "image_processor_type": "SiglipImageProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert [list(part) for part in scoring._statistics(folder)] == [[0.5] * 3, [0.25] * 3]
    asked = []
    monkeypatch.setattr(
        scoring.AutoImageProcessor, "from_pretrained", lambda name: asked.append(name) or found
    )
    found = scoring.AutoImageProcessor  # anything with a mean and a std
    monkeypatch.setattr(found, "image_mean", [0.1] * 3, raising=False)
    monkeypatch.setattr(found, "image_std", [0.2] * 3, raising=False)
    assert scoring._statistics(ENCODERS["medsiglip"]) == ([0.1] * 3, [0.2] * 3)
    assert asked == [ENCODERS["medsiglip"]], "a name on the hub is no path"


def test_encoders_have_short_names(random_base, monkeypatch):
    seen = []

    def refuse(folder, **_):
        seen.append(folder)
        raise OSError("not here")

    monkeypatch.setattr("prism_nb.scoring.AutoModel.from_pretrained", refuse)
    for name in ENCODERS:
        with pytest.raises(ModelError, match=f"cannot load CLIP {name}: not here"):
            load_clip(name, str(random_base), "cpu")
    assert seen == list(ENCODERS.values())
