"""Questions about pairs: what is asked, how strictly it is read, and what may leave the machine."""

import base64
import importlib.util
import io
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prism_nb.params import validate
from prism_nb.vqa import (
    CONDITIONS,
    AnthropicBackend,
    ClipBackend,
    VqaError,
    answer,
    ask_pairs,
    choose_pairs,
    load_backend,
    question,
    read_answer,
)

EFFUSION, DEVICES = "Pleural Effusion", "Support Devices"
SHOWING, BARE = np.full((2, 16, 16), [[[0.9]], [[0.2]]], np.float32)  # bright: the finding shows


@dataclass
class Says:
    """A back end that answers by a function of the films, and keeps what it was asked."""

    say: object
    asked: list = field(default_factory=list)

    def ask(self, films, finding):
        self.asked.append((films, finding))
        return self.say(films)


def looks(films):
    shown = [film.mean() > 0.5 for film in films] or [True, False]
    return "\n".join(f"{n}: {'yes' if s else 'no'}" for n, s in zip("AB", shown, strict=True)) + (
        "\nWhy: it is bright."
    )


@pytest.fixture
def plan():
    """Four removals and two additions, of four patients."""
    rows = [(f"f{n}", f"p{n % 4}", "remove Pleural Effusion", EFFUSION, False) for n in range(4)]
    rows += [(f"f{n}", f"p{n % 4}", "add Support Devices", DEVICES, True) for n in range(2)]
    return pd.DataFrame(rows, columns=["film_id", "patient_id", "edit", "finding", "present"])


@pytest.fixture
def films(plan):
    removed = ~plan["present"].to_numpy()[:, None, None]
    return np.where(removed, SHOWING, BARE), np.where(removed, BARE, SHOWING)


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("A: yes\nB: no\nWhy: fluid in A.", (True, False)),
        ("  a: No.\n\nB: YES\nwhy: a lead.\n", (False, True)),
        ("A: yes B: no Why: one line", None),
        ("A: yes\nB: no", None),
        ("A: yes\nB: no\nWhy:", None),
        ("A: yes, clearly\nB: no\nWhy: x", None),
        ("A: maybe\nB: no\nWhy: x", None),
        ("B: no\nA: yes\nWhy: x", None),
        ("Sure!\nA: yes\nB: no\nWhy: x", None),
        ("A: yes\nB: no\nWhy: x\nI hope this helps", None),
        ("", None),
    ],
)
def test_an_answer_keeps_the_form_or_is_none(text, shows):
    found = read_answer(text)
    assert found.shows == shows
    assert found.text == text
    assert bool(found.why) == (shows is not None)


def test_the_question_names_the_finding_and_nothing_else():
    assert "pleural effusion?" in question(EFFUSION)
    assert "pacemaker" in question(DEVICES)
    assert "counterfactual" not in question(DEVICES)


def test_who_looks_is_right_and_swaps_with_the_films(plan, films):
    found = ask_pairs(Says(looks), plan, *films)
    mean = found.groupby("condition")[["accuracy", "both_right", "answered", "consistent"]].mean()
    assert len(found) == len(CONDITIONS) * len(plan)
    assert (mean.loc[["shown", "swapped"], "accuracy"] == 1).all()
    assert mean.loc["swapped", "consistent"] == 1
    assert np.isnan(mean.loc["shown", "consistent"])
    # Blind it says A: with half of the pairs turned, that is right half the time.
    assert mean.loc["blind", "accuracy"] == 0.5


def test_who_prefers_a_letter_is_found_out(plan, films):
    found = ask_pairs(Says(lambda films: "A: yes\nB: no\nWhy: habit"), plan, *films)
    mean = found.groupby("condition")[["accuracy", "consistent"]].mean()
    assert (mean["accuracy"] == 0.5).all()
    assert mean.loc["swapped", "consistent"] == 0


def test_no_answer_is_wrong_and_counted(plan, films):
    found = ask_pairs(Says(lambda films: "I cannot tell."), plan, *films)
    assert (found[["accuracy", "both_right", "answered"]] == 0).all(axis=None)
    assert (found["said"] == "I cannot tell.").all()


def test_the_order_is_blinded_balanced_and_of_the_seed(plan, films):
    backend = Says(looks)
    first = ask_pairs(backend, plan, *films, seed=1)
    again = ask_pairs(Says(looks), plan, *films, seed=1)
    pd.testing.assert_frame_equal(first, again)
    letters = first[first["condition"] == "shown"]["counterfactual_is"]
    assert letters.value_counts().to_dict() == {"A": 3, "B": 3}
    others = first[first["condition"] == "swapped"]["counterfactual_is"]
    assert (letters.to_numpy() != others.to_numpy()).all()
    orders = [ask_pairs(Says(looks), plan, *films, seed=s)["counterfactual_is"] for s in range(5)]
    assert len({"".join(order) for order in orders}) > 1
    asked = [films for films, _ in backend.asked]
    assert [len(films) for films in asked] == [2, 2, 0] * len(plan)
    np.testing.assert_array_equal(asked[0][0], asked[1][1])


def test_the_default_model_is_one_that_the_sdk_knows():
    known = pytest.importorskip("anthropic.types.model").Model
    names = {name for each in get_args(known) for name in get_args(each)}
    assert validate("A1_vqa", {}).anthropic_model in names


def test_pairs_are_drawn_evenly(plan):
    chosen = plan.loc[choose_pairs(plan, 4, seed=3)]
    assert chosen["edit"].value_counts().to_dict() == {
        "remove Pleural Effusion": 2,
        "add Support Devices": 2,
    }
    assert len(choose_pairs(plan, 99)) == len(plan)


def test_one_film_is_no_pair():
    with pytest.raises(VqaError, match="1 films are given: give two, or none"):
        answer(Says(looks), [SHOWING], EFFUSION)


# Back ends


def test_clip_answers_by_the_nearer_caption():
    asked = {}

    class Scorer:
        def margin(self, films, captions, others):
            asked.update(captions=captions, others=others)
            return films.mean(axis=(1, 2)) - 0.6

    found = answer(ClipBackend(Scorer()), [SHOWING, BARE], DEVICES)
    assert found.shows == (True, False)
    assert asked["captions"] == ["chest x-ray showing support devices"] * 2
    assert asked["others"] == ["chest x-ray"] * 2
    assert "+0.300 and -0.400" in found.why
    blind = answer(ClipBackend(Scorer()), [], DEVICES)
    assert blind.shows[0] == blind.shows[1], "without films, both letters are alike"


def test_the_clip_of_a_base_model_answers_in_form(random_base):
    backend = load_backend("clip", ("base", str(random_base)))
    for films in ([SHOWING, BARE], []):
        assert answer(backend, films, EFFUSION).shows is not None


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    """A folder with a LLaVA of random weights and its processor, as a real one is laid out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<pad>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=300)
    words.train_from_iterator([question(EFFUSION)], trainer)
    names = dict(zip(["unk_token", "pad_token", "eos_token"], special, strict=False))
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}\n{% endif %}"
        "{% endfor %}{% endfor %}ASSISTANT:"
    )
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    own = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    own |= {"num_additional_image_tokens": 1, "chat_template": template}
    processor = LlavaProcessor(images, tokens, **own)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sight = CLIPVisionConfig(**small, num_hidden_layers=2, image_size=28, patch_size=14)
    speech = LlamaConfig(**small, num_hidden_layers=2, vocab_size=len(tokens))
    parts = {"vision_config": sight, "text_config": speech}
    parts |= {"image_token_index": tokens.convert_tokens_to_ids("<image>")}
    model = LlavaForConditionalGeneration(LlavaConfig(**parts))
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_model_of_transformers_is_asked_with_both_films(tiny_llava):
    backend = load_backend(str(tiny_llava))
    seen = []
    tower = next(part for name, part in backend.model.named_modules() if "vision_tower" in name)
    tower.register_forward_pre_hook(
        lambda _, given, named: seen.append((*given, *named.values())[0].shape), with_kwargs=True
    )
    text = backend.ask([SHOWING, BARE], EFFUSION)
    assert isinstance(text, str)
    assert seen[0][:2] == (2, 3), "two films"
    assert "Does each" not in text, "the reply holds no part of the question"
    assert text == backend.ask([SHOWING, BARE], EFFUSION), "nothing is sampled"
    found = answer(backend, [], EFFUSION)  # random weights keep no form
    assert found.shows is None


def test_a_missing_or_mute_model_is_one_line(tmp_path, tiny_llava):
    import shutil

    with pytest.raises(VqaError, match="give clip, anthropic, a folder, or owner/model"):
        load_backend("llava")
    with pytest.raises(VqaError, match="cannot load") as error:
        load_backend(str(tmp_path))
    assert "\n" not in str(error.value)
    mute = shutil.copytree(tiny_llava, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(VqaError, match="has no chat template"):
        load_backend(str(mute))


class FakeClient:
    """Anthropic's client as far as it is used: keeps what it was sent."""

    def __init__(self, *blocks, error=None):
        self.sent, self.blocks, self.error = [], blocks, error
        self.messages = SimpleNamespace(create=self.create)

    def create(self, **given):
        self.sent.append(given)
        if self.error:
            raise self.error
        return SimpleNamespace(content=[SimpleNamespace(**block) for block in self.blocks])


SAID = {"type": "text", "text": "A: yes\nB: no\nWhy: blunted angle."}


def test_nothing_is_sent_unless_it_is_allowed():
    client = FakeClient(SAID)
    with pytest.raises(VqaError, match="set allow_upload to true") as error:
        AnthropicBackend("some-model", client=client)
    assert "\n" not in str(error.value)
    assert client.sent == []
    with pytest.raises(VqaError, match="allow_upload"):
        load_backend("anthropic", model="some-model")


def test_what_is_sent_is_pixels_letters_and_the_question():
    client = FakeClient({"type": "thinking", "thinking": "hm"}, SAID)
    backend = AnthropicBackend("some-model", allow_upload=True, client=client)
    assert answer(backend, [SHOWING, BARE], EFFUSION).shows == (True, False)
    (sent,) = client.sent
    assert sent["model"] == "some-model"
    (turn,) = sent["messages"]
    kinds = [part["type"] for part in turn["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert [part.get("text") for part in turn["content"]][::2] == ["A:", "B:", question(EFFUSION)]
    film = turn["content"][1]["source"]
    assert film["media_type"] == "image/png"
    image = Image.open(io.BytesIO(base64.b64decode(film["data"])))
    assert image.info == {}, "no text about the film goes with it"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.full((16, 16), 230))
    answer(backend, [], EFFUSION)
    assert [part["type"] for part in client.sent[1]["messages"][0]["content"]] == ["text"]


def test_a_service_that_fails_is_one_line():
    client = FakeClient(error=RuntimeError("429 too many requests\nrequest id 1"))
    backend = AnthropicBackend("some-model", True, client)
    with pytest.raises(VqaError, match="some-model gave no answer: 429 too many requests") as error:
        answer(backend, [SHOWING, BARE], EFFUSION)
    assert "\n" not in str(error.value)


def test_without_key_or_sdk_it_says_so(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    installed = importlib.util.find_spec("anthropic")
    match = "ANTHROPIC_API_KEY is not set" if installed else r"pip install prism_nb\[vqa\]"
    with pytest.raises(VqaError, match=match):
        load_backend("anthropic", allow_upload=True)


def test_the_real_sdk_takes_what_is_sent(monkeypatch):
    anthropic = pytest.importorskip("anthropic")
    http = pytest.importorskip("httpx2")
    sent = []

    def reply(request):
        sent.append(request)
        about = {"id": "m", "type": "message", "role": "assistant", "model": "some-model"}
        usage = {"input_tokens": 1, "output_tokens": 1}
        body = about | {"content": [SAID], "stop_reason": "end_turn", "usage": usage}
        return http.Response(200, json=body)

    transport = http.Client(transport=http.MockTransport(reply))
    client = anthropic.Anthropic(api_key="none", http_client=transport)
    backend = AnthropicBackend("some-model", True, client)
    assert answer(backend, [SHOWING, BARE], EFFUSION).shows == (True, False)
    assert len(sent) == 1
    assert sent[0].url.path == "/v1/messages"
