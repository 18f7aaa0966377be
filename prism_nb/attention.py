"""Prompt-to-prompt: a target film keeps the source film's attention (paper 2.3; Hertz 2022).

Where T and T' share a word, cross-attention takes the source's map of it: A' = w (A_source M +
A_target (1 - m)), M the alignment, w the word weights; self-attention takes the source's queries
and keys, so the source's map. Edits name rows of the batch, and rows that none names are left
alone. Shapes: maps (B, heads, S = h w, L); M (L, L), from source to target tokens. Used by 04.
"""

import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import partial
from math import isfinite
from typing import NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.nn.functional import interpolate

from prism_nb.captions import PromptError

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|(?:[^\w\s]|_)+")  # "x-ray" is one word, "," another


class Word(NamedTuple):
    """A word of a prompt, its token ids, and where they stand (the start token is 0)."""

    text: str
    ids: tuple
    tokens: slice


class Alignment(NamedTuple):
    """How the tokens of T' follow those of T."""

    mapper: torch.Tensor  # M (L, L) float; a column of zeros: the token keeps its own map
    weights: torch.Tensor  # w (L,) float, of the tokens of T'
    blend: torch.Tensor  # (2, L) bool, tokens of T and of T' that a local blend looks for


class Edit(NamedTuple):
    """A target row of the batch, the source row it follows, and how their words align."""

    target: int
    source: int
    alignment: Alignment


def split_words(tokenizer, prompt):
    """Cut a prompt into words of one or more tokens; PromptError names those that do not fit."""
    encoded, words = tokenizer(prompt, return_offsets_mapping=True, verbose=False), []
    for match in WORD.finditer(prompt):  # the start and end tokens cover no text
        spans = enumerate(encoded.offset_mapping)
        inside = [n for n, (a, b) in spans if match.start() <= a < min(b, match.end())]
        if inside:
            tokens = slice(inside[0], inside[-1] + 1)
            words.append(Word(match[0], tuple(encoded.input_ids[tokens]), tokens))
    given, limit = len(encoded.input_ids), tokenizer.model_max_length
    if given > limit:
        cut = " ".join(word.text for word in words if word.tokens.stop > limit - 1)
        raise PromptError(f"the prompt has {given} tokens of {limit}: shorten it, {cut!r} is cut")
    return words


def phrase_tokens(tokenizer, phrase, *prompts):
    """Mark a phrase wherever prompts hold it: (P, L) bool; if none does, PromptError says so."""
    wanted, nearby = [word.ids for word in split_words(tokenizer, phrase)], []
    marked = torch.zeros(len(prompts), tokenizer.model_max_length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        words = split_words(tokenizer, prompt)
        for first in range(max(1, len(words) - len(wanted) + 1)):
            run = words[first : first + len(wanted)]
            nearby.append(" ".join(word.text.lower() for word in run))
            if wanted and [word.ids for word in run] == wanted:
                marked[row, run[0].tokens.start : run[-1].tokens.stop] = True
    if not marked.any():
        nearest = get_close_matches(phrase.lower(), nearby, n=1, cutoff=0)[0]
        held = " or ".join(repr(prompt) for prompt in prompts)
        raise PromptError(f"{phrase!r} is not in {held}; the nearest there is {nearest!r}")
    return marked


def align(tokenizer, source, target, kind="refine", weights=None, blend=()):
    """Align T and T': which map each token of T' takes from T.

    kind: "replace" pairs the words one by one; "refine" pairs equal words in order, and new words
    keep their own maps. weights: phrase of T' -> factor. blend: phrases of T or T' for the local
    blend. PromptError for a phrase that is not there, a prompt too long, words without partners.
    """
    before, after = split_words(tokenizer, source), split_words(tokenizer, target)
    mapper = _mapper(before, after, _pairs(before, after, kind), tokenizer.model_max_length)
    factors = torch.ones(len(mapper))
    for phrase, weight in (weights or {}).items():
        if not isfinite(weight):
            raise ValueError(f"the weight of {phrase!r} is {weight}; it must be a finite number")
        factors[phrase_tokens(tokenizer, phrase, target)[0]] = weight
    marked = torch.zeros(2, len(mapper), dtype=torch.bool)
    for phrase in blend:
        marked |= phrase_tokens(tokenizer, phrase, source, target)
    return Alignment(mapper, factors, marked)


def _pairs(before, after, kind):
    if kind not in ("refine", "replace"):
        raise ValueError(f"kind is {kind!r}; it must be refine or replace")
    if kind == "refine":
        ids = [[word.ids for word in words] for words in (before, after)]
        blocks = SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks()
        return [(before[b.a + n], after[b.b + n]) for b in blocks for n in range(b.size)]
    if len(before) != len(after):
        raise PromptError(f"replace pairs words, not {len(before)} with {len(after)}: use refine")
    return list(zip(before, after, strict=True))


def _mapper(before, after, pairs, length):
    """M (L, L); a word of another number of tokens gives them equal shares of its attention."""
    mapper = torch.zeros(length, length)
    for old, new in pairs:
        equal = len(old.ids) == len(new.ids)
        mapper[old.tokens, new.tokens] = torch.eye(len(old.ids)) if equal else 1 / len(new.ids)
    ends = [words[-1].tokens.stop if words else 1 for words in (before, after)]
    mapper[0, 0] = mapper[ends[0], ends[1]] = 1  # the start and the end token
    mapper.diagonal()[max(ends) + 1 :] = 1  # a pad that faces a word of T keeps its own map
    return mapper


def explain_alignment(tokenizer, source, target, **options):
    """Say word by word which map each word of T' takes: lines of text; options as for align.

    A word of several tokens, as one that was never trained, is one line and says how many.
    """
    mapper, weights, blend = align(tokenizer, source, target, **options)
    before, after = (
        _named(tokenizer, prompt, marked)
        for prompt, marked in zip((source, target), blend, strict=True)
    )
    lines = [f"{'target word':<23} takes the map of"]
    for name, tokens in after:
        taken, weight = mapper[:, tokens], float(weights[tokens][0])
        came = " + ".join(old for old, rows in before if taken[rows].any())
        share = "" if taken.max() in (0, 1) else f", {taken.max():.3g} of it"
        times = "" if weight == 1 else f", times {weight:g}"
        lines.append(f"{name:<23} {came or 'none: keeps its own'}{share}{times}")
    lines += [f"{'(gone)':<23} {old}" for old, rows in before if not mapper[rows].any()]
    return "\n".join(lines)


def _named(tokenizer, prompt, marked):
    """The start, each word and the end of a prompt: what to call it, and its tokens."""
    named = [(tokenizer.bos_token, slice(0, 1))]
    for word in split_words(tokenizer, prompt):
        pieces = f" ({len(word.ids)} tokens)" * (len(word.ids) > 1)
        blended = " (blend)" * bool(marked[word.tokens].any())
        named.append((word.text.lower() + pieces + blended, word.tokens))
    end = named[-1][1].stop
    return [*named, (tokenizer.eos_token, slice(end, end + 1))]


def layout(alignments, films, source_start, target_start):
    """Name the rows of a batch: edit i follows film films[i], counted from the two starts.

    n films, m edits: [source (n), target (m)] is (0, n); [source, target uncond, target] is (0,
    n + m); [source uncond, target uncond, source, target] is (n + m, 2 n + m).
    """
    pairs = enumerate(zip(films, alignments, strict=True))
    return [Edit(target_start + n, source_start + film, plan) for n, (film, plan) in pairs]


@dataclass
class Controller:
    """What prompt-to-prompt does at each step of a walk; the sampling loop sets `step`."""

    edits: list
    num_steps: int
    cross_replace: float = 0.8  # share of the steps, from the first on, with the source's maps
    self_replace: float = 0.5  # the same for self-attention
    store: bool = False  # keep cross-attention maps; phrases to blend keep them anyway
    blend_threshold: float = 0.3  # of a map's maximum
    blend_start: float = 0.2  # share of the steps before the first blend
    self_side: int = 32  # pixels; larger self-attention is left alone
    store_side: int = 16  # pixels; larger maps are not kept
    step: int | None = None  # 0 is the noisiest

    def __post_init__(self):
        for name in ("cross_replace", "self_replace", "blend_threshold", "blend_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        led, followed = [edit.target for edit in self.edits], [edit.source for edit in self.edits]
        if len(set(led)) < len(led) or {*led} & {*followed} or min([0, *led, *followed]) < 0:
            raise ValueError(f"target rows {led} and sources {followed} must all be different rows")
        self.num_rows = max([*led, *followed], default=-1) + 1  # a batch needs at least
        self.num_cross, self.num_self, self.num_unblended = (
            int(share * self.num_steps + 1e-6) if self.edits else 0  # rounded down
            for share in (self.cross_replace, self.self_replace, self.blend_start)
        )
        self.targets, self.sources = torch.tensor([led, followed], dtype=torch.long)  # (E,) each
        self.mapper = self.own = self.blended = torch.zeros(0)
        self.hooked, self._ran, self._kept, self._last = set(), set(), {}, 0
        if self.edits:
            self._stack([edit.alignment for edit in self.edits])

    def _stack(self, plans):
        """Alignments as tensors, the word weights within: A' = A_source mapper + A_target own."""
        mapper, weights, blend = (torch.stack(part) for part in zip(*plans, strict=True))
        self.mapper = (mapper * weights[:, None])[:, None]  # (E, 1, L, L)
        self.own = ((mapper.sum(1) == 0) * weights)[:, None, None]  # (E, 1, 1, L)
        self.phrases, self.blended = blend.transpose(0, 1), blend.any(2).any(1)  # (2, E, L), (E,)
        self.store = self.store or bool(self.blended.any())

    def begin(self, _, args, kwargs):
        """Before the U-Net runs: check the step and the batch, and go to its device."""
        sample = args[0] if args else kwargs["sample"]  # (B, C, h, w)
        if self.step is None or not 0 <= self.step < self.num_steps:
            raise ValueError(f"controller.step is {self.step}; set 0 to {self.num_steps - 1} first")
        if len(sample) < self.num_rows:
            raise ValueError(f"the batch has {len(sample)} rows, the edits need {self.num_rows}")
        for name in ("targets", "sources", "mapper", "own"):
            setattr(self, name, getattr(self, name).to(sample.device))
        self.rows = torch.arange(len(sample), device=sample.device)  # whose queries a row uses
        self.rows[self.targets] = self.sources
        if self.step < self._last:
            self._kept = {}  # a step back begins another walk
        self._last, self._ran = self.step, set()

    def finish(self, *_):
        """After the U-Net ran: raise RuntimeError if a hooked layer did not pass through here."""
        if self._ran != self.hooked:
            ran = f"{len(self._ran)} of {len(self.hooked)} hooked attention layers ran"
            raise RuntimeError(f"{ran}: use a U-Net that is not compiled and skips no layer")

    def keeps(self, num_pixels):
        """Whether cross-attention maps of this size are kept."""
        return self.store and num_pixels <= self.store_side**2

    def scores(self, attn, query, key, mask=None):
        """Attention maps (B * heads, S, L), the target rows edited; all maths in float32."""
        with torch.autocast(query.device.type, enabled=False):
            mask = None if mask is None else mask.float()
            maps = attn.get_attention_scores(query.float(), key.float(), mask)
            maps = maps.unflatten(0, (-1, attn.heads))  # (B, heads, S, L)
            if self.step < self.num_cross:
                edited = maps[self.sources] @ self.mapper + maps[self.targets] * self.own
                maps = maps.index_copy(0, self.targets, edited)
            if self.keeps(size := maps.shape[2]):
                self._kept[size] = self._kept.get(size, 0) + maps.detach().mean(1)  # (B, S, L)
        return maps.flatten(0, 1).to(query.dtype)

    def maps(self, rows, tokens, size):
        """Mean cross-attention of rows (R,) to tokens (R, L): (R, h, w) of that size, maximum 1."""
        if not self._kept:
            raise ValueError("no attention maps are kept: use store=True, or a larger store_side")
        total = 0
        for num_pixels, kept in self._kept.items():
            height = round((num_pixels * size[0] / size[1]) ** 0.5)
            paid = (kept[rows] * tokens.to(kept)[:, None]).sum(2).view(len(rows), 1, height, -1)
            total = total + interpolate(paid, size, mode="bilinear")[:, 0]
        return total / total.amax((1, 2), keepdim=True).clamp_min(1e-12)

    def blend_mask(self, size):
        """Where each edit may act, (E, 1, h, w) bool: near its phrases, in source or in target."""
        rows, tokens = torch.cat([self.sources, self.targets]), self.phrases.flatten(0, 1)
        near = (self.maps(rows, tokens, size) >= self.blend_threshold).unflatten(0, (2, -1)).any(0)
        anywhere = ~self.blended.to(near.device)  # edits without phrases
        return (near | anywhere[:, None, None])[:, None]

    def blend(self, z_source, z_target):
        """Local blend after a step, both (E, C, h, w): target inside the mask, source outside."""
        if not self.blended.any() or self.step < self.num_unblended:
            return z_target
        return torch.where(self.blend_mask(z_target.shape[-2:]), z_target, z_source)


def attention_maps(controller, tokenizer, rows, prompts, phrases, size):
    """Where rows (R,) looked for phrases of their prompts, a list a row: (R, h, w) in [0, 1]."""
    tokens = [
        torch.cat([phrase_tokens(tokenizer, phrase, prompt) for phrase in chosen]).any(0)
        for prompt, chosen in zip(prompts, phrases, strict=True)
    ]
    return controller.maps(rows, torch.stack(tokens), size)


class _View:
    """An attention layer as diffusers' processors see it, with some of its parts exchanged."""

    def __init__(self, attn, **parts):
        self.__dict__.update(parts, attn=attn)

    def __getattr__(self, name):
        return getattr(self.attn, name)


@dataclass
class ControlledAttention:
    """A processor that asks the controller, and leaves to `inner` all that it does not touch."""

    name: str
    inner: AttnProcessor | AttnProcessor2_0
    controller: Controller

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """One layer's attention over hidden_states (B, S, C), as in diffusers' own processors."""
        plan, inner, num_pixels = self.controller, self.inner, hidden_states.shape[1]
        plan._ran.add(self.name)
        edited = plan.step < plan.num_cross or plan.keeps(num_pixels)
        moved = plan.step < plan.num_self and num_pixels <= plan.self_side**2
        if encoder_hidden_states is not None and edited:
            inner = AttnProcessor()  # the one that writes its maps out
            attn = _View(attn, get_attention_scores=partial(plan.scores, attn))
        elif encoder_hidden_states is None and moved:
            to_q, to_k, rows = attn.to_q, attn.to_k, plan.rows
            attn = _View(attn, to_q=lambda z: to_q(z)[rows], to_k=lambda z: to_k(z)[rows])
        return inner(attn, hidden_states, encoder_hidden_states, attention_mask)


@contextmanager
def control(unet, controller):
    """Put a controller between a U-Net and its attention; the old processors return on exit.

    Raises ValueError for a U-Net under control already, or with other attention than Stable
    Diffusion's; then RuntimeError in each call of the U-Net where a hooked layer does not run.
    """
    before = unet.attn_processors
    if any(isinstance(inner, ControlledAttention) for inner in before.values()):
        raise ValueError("this U-Net is under control already: leave that `with` block first")
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    expected = sum(attn is not None for block in blocks for attn in (block.attn1, block.attn2))
    usual = {n: p for n, p in before.items() if type(p) in (AttnProcessor, AttnProcessor2_0)}
    hooked = {n for n in usual if n.endswith((".attn1.processor", ".attn2.processor"))}
    if not hooked or len(hooked) != expected:
        raise ValueError(
            f"{len(hooked)} of {expected or len(before)} attention layers can be controlled: use a "
            "U-Net of Stable Diffusion, with unet.set_attn_processor(AttnProcessor2_0())"
        )
    controller.hooked = hooked
    controlled = {name: ControlledAttention(name, before[name], controller) for name in hooked}
    with ExitStack() as exits:
        exits.callback(unet.set_attn_processor, dict(before))
        unet.set_attn_processor(before | controlled)
        exits.callback(unet.register_forward_pre_hook(controller.begin, with_kwargs=True).remove)
        exits.callback(unet.register_forward_hook(controller.finish).remove)
        yield controller
