"""Questions to a model that sees: does it find what an edit should have changed? (paper App. E)

A film and its counterfactual are shown as A and B, in an order drawn from the seed: does each show
the finding? Answers have a fixed form and are read strictly; what does not fit is no answer, and
wrong. Two controls tell looking from guessing: the same pair `swapped`, and the question `blind`,
without films, where any steady guess is right half the time. A film leaves this machine only where
allow_upload says so. Films (H, W) in [0, 1]. Used by notebook A1.
"""

import base64
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from prism_nb.captions import PLAIN_FILM, caption
from prism_nb.files import one_line
from prism_nb.findings import finding_from
from prism_nb.images import unit_to_uint8
from prism_nb.scoring import load_clip

QUESTION = """\
A and B are two frontal chest radiographs of one patient. Does each of them show {sign}?
Answer in exactly three lines:
A: yes or no
B: yes or no
Why: one sentence that names what you see."""
SIGNS = {"Support Devices": "any support device (a line, tube, lead, pacemaker or other hardware)"}
FORM = re.compile(r"A: *(yes|no)\.?\s*\n\s*B: *(yes|no)\.?\s*\n\s*Why: *(\S.*)", re.IGNORECASE)
CONDITIONS = ("shown", "swapped", "blind")
MEASURES = ("accuracy", "both_right", "answered", "consistent")


class VqaError(ValueError):
    """A back end is missing, cannot be used, or may not be sent a film."""


@dataclass(frozen=True)
class Answer:
    """What was said, and what it says of A and of B."""

    text: str
    shows: tuple | None  # (bool, bool); None where the form was not kept
    why: str


def question(finding):
    """What is asked of a pair: one question about both films, and the form of the answer."""
    return QUESTION.format(sign=SIGNS.get(finding, finding.lower()))


def read_answer(text):
    """Read an answer strictly: three lines, "A: yes", "B: no", "Why: ...", and nothing else."""
    found = FORM.fullmatch(text.strip())
    if not found:
        return Answer(text, None, "")
    a, b, why = found.groups()
    return Answer(text, (a.lower() == "yes", b.lower() == "yes"), why)


def answer(backend, films, finding):
    """Ask a back end whether films [A, B] show a finding, or ask it blind, of no film: Answer."""
    if len(films) not in (0, 2):
        raise VqaError(f"{len(films)} films are given: give two, or none for a blind question")
    return read_answer(backend.ask(films, finding_from(finding)))


# Back ends: each has ask(films, finding) -> str


@dataclass(frozen=True)
class ClipBackend:
    """Zero-shot: is a film nearer to the caption with the finding than to the bare one?"""

    scorer: object

    def ask(self, films, finding):
        """The answer in its form; blind, it looks at two even grey films."""
        films = np.stack(films) if len(films) else np.full((2, 64, 64), 0.5, np.float32)
        shown = caption({finding: 1.0})
        a, b = self.scorer.margin(films, [shown] * 2, [PLAIN_FILM] * 2)
        lines = [f"{letter}: {'yes' if m > 0 else 'no'}" for letter, m in (("A", a), ("B", b))]
        return "\n".join([*lines, f'Why: nearer to "{shown}" by {a:+.3f} and {b:+.3f}.'])


@dataclass(frozen=True)
class ChatBackend:
    """An image-text-to-text model of transformers, on this machine, without sampling."""

    model: object
    processor: object
    max_tokens: int = 128

    def ask(self, films, finding):
        """What it generates after its own chat template."""
        images = [{"type": "image", "image": _picture(film)} for film in films]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        how |= {"return_tensors": "pt"}
        given = self.processor.apply_chat_template(_messages(images, finding), **how)
        given = given.to(self.model.device, self.model.dtype)
        made = self.model.generate(**given, max_new_tokens=self.max_tokens, do_sample=False)
        new = made[0, given["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True)


class AnthropicBackend:
    """Anthropic's models through their SDK: films leave this machine, if they may."""

    def __init__(self, model, allow_upload=False, client=None):
        if not allow_upload:
            raise VqaError(
                "the back end anthropic sends films to another company's servers: set allow_upload "
                "to true only if the films' licence and consent permit that"
            )
        self.model, self.client = model, client or _client()

    def ask(self, films, finding):
        """The text of the reply; VqaError, in one line, where the service refuses."""
        images = [{"type": "image", "source": _source(film)} for film in films]
        given = {"model": self.model, "max_tokens": 1024, "messages": _messages(images, finding)}
        try:
            reply = self.client.messages.create(**given)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise VqaError(f"{self.model} gave no answer: {reason[0][:200]}") from error
        return "".join(block.text for block in reply.content if block.type == "text")


def _client():
    try:
        from anthropic import Anthropic
    except ImportError:
        raise VqaError("the back end anthropic needs its SDK: pip install prism_nb[vqa]") from None
    if not os.environ.get("ANTHROPIC_API_KEY"):
        raise VqaError("ANTHROPIC_API_KEY is not set: the back end anthropic takes its key from it")
    return Anthropic()


def _messages(images, finding):
    """One turn: each film under its letter, then the question."""
    content = []
    for letter, image in zip("AB", images, strict=False):
        content += [{"type": "text", "text": f"{letter}:"}, image]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question(finding)}]}]


def _picture(film):
    return Image.fromarray(unit_to_uint8(film)).convert("RGB")


def _source(film):
    """A film as base64 PNG: its pixels, and no text about where they come from."""
    _picture(film).save(file := io.BytesIO(), format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "base64", "media_type": "image/png", "data": data}


def load_backend(name, clip=("base", "phantom"), model="", allow_upload=False, device="cpu"):
    """Load "clip", "anthropic", or a model of transformers by its folder or name on the hub.

    clip: clip_model and base_model of load_clip; model: Anthropic's. Raises VqaError in one line.
    """
    if name == "clip":
        return ClipBackend(load_clip(*clip, device))
    return AnthropicBackend(model, allow_upload) if name == "anthropic" else _local(name, device)


def _local(name, device):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise VqaError(f"vqa_backend {name!r}: give clip, anthropic, a folder, or owner/model")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise VqaError(f"cannot load {name}: {one_line(error)}") from None
    if not getattr(processor, "chat_template", None):
        raise VqaError(f"{name} has no chat template: give a model that was trained to converse")
    return ChatBackend(model.eval().to(device), processor)


def choose_pairs(plan, count, seed=0):
    """At most `count` edits of a plan, as many of each kind, drawn from the seed: positions."""
    drawn = plan.sample(frac=1, random_state=seed)
    turn = drawn.groupby("edit").cumcount()
    return drawn.index[np.lexsort((drawn["edit"], turn))][:count].to_list()


def ask_pairs(backend, plan, factual, counterfactual, seed=0):
    """Ask about every pair under each of CONDITIONS: a row a pair and condition.

    plan: R edits (film_id, patient_id, edit, finding, present); films (R, H, W). Half the pairs,
    drawn from the seed, have the counterfactual as A. Columns: about, MEASURES, said, why.
    """
    swap, rows = np.random.default_rng(seed).permutation(len(plan)) % 2, []
    for k, row in enumerate(tqdm(plan.itertuples(), "asking", len(plan))):
        pair, truth, seen = (factual[k], counterfactual[k]), (not row.present, row.present), {}
        for condition in CONDITIONS:
            turn = int(swap[k] != (condition == "swapped"))  # 1: the counterfactual is A
            films = [pair[turn], pair[1 - turn]] if condition != "blind" else []
            said = answer(backend, films, row.finding)
            seen[condition] = said.shows and said.shows[:: -1 if turn else 1]
            about = (row.film_id, row.patient_id, row.edit, condition, "BA"[turn])
            rows.append((*about, *_score(seen, condition, truth), said.text, said.why))
    about = ("film_id", "patient_id", "edit", "condition", "counterfactual_is")
    return pd.DataFrame(rows, columns=[*about, *MEASURES, "said", "why"])


def _score(seen, condition, truth):
    """MEASURES of an answer: share of films right, both right, answered, the same as before."""
    said, before = seen[condition], seen[CONDITIONS[0]]
    right = [bool(said) and said[k] == truth[k] for k in (0, 1)]
    same = float(bool(said) and said == before) if condition == "swapped" else np.nan
    return float(np.mean(right)), float(all(right)), float(bool(said)), same
