"""Prompt-to-prompt: alignments by hand, maps against diffusers' own scores, identities, errors."""

from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTokenizer

from prism_nb.attention import (
    ControlledAttention,
    Controller,
    Edit,
    align,
    attention_maps,
    control,
    explain_alignment,
    layout,
    phrase_tokens,
    split_words,
)
from prism_nb.captions import PromptError

SOURCE = "chest x-ray showing edema, support devices, pleural effusion"
TARGET = "chest x-ray showing edema, pleural effusion"
SWAPPED = "chest x-ray showing edema, support devices, pleural zebra"
# positions of SOURCE: start chest x - ray showing edema , support devices , pleural effusion end
#                          0     1 2 3   4       5     6 7       8       9 10     11       12  13


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return CLIPTokenizer.from_pretrained(random_base / "tokenizer", local_files_only=True)


def small_unet(**options):
    """A U-Net of random weights with 8 attention layers, other heads a layer, sharp maps."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": (1, 2),
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**(settings | options)).eval().requires_grad_(False)
    for name, weight in unet.named_parameters():
        if "attn" in name and ("to_q" in name or "to_k" in name):
            weight.mul_(6)
    return unet


@pytest.fixture(scope="module")
def unet():
    return small_unet()


def batch(num_rows, seed=1, size=16, width=24):
    """Latents (B, 4, h, w) and token embeddings (B, 77, D), another for each row."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(num_rows, 4, size, size, generator=random)
    return z, torch.randn(num_rows, 77, width, generator=random)


@torch.no_grad()
def predict(unet, z, cond):
    return unet(z, 500, encoder_hidden_states=cond).sample


def controlled(unet, controller, z, cond, step=0):
    with control(unet, controller):
        controller.step = step
        return predict(unet, z, cond)


def one_edit(tokenizer, source=SOURCE, target=TARGET, **options):
    return [Edit(1, 0, align(tokenizer, source, target, **options))]


# Words and alignments


def test_words_are_words_however_many_tokens_they_take(tokenizer):
    words = split_words(tokenizer, "Chest x-ray: zebra_s, support devices")
    rest = [",", "support", "devices"]
    assert [w.text for w in words] == ["Chest", "x-ray", ":", "zebra", "_", "s", *rest]
    assert [len(w.ids) for w in words] == [1, 3, 1, 5, 1, 1, 1, 1, 1]
    assert words[0].tokens.start == 1
    assert all(a.tokens.stop == b.tokens.start for a, b in pairwise(words))
    assert split_words(tokenizer, "") == []


def test_refine_by_hand_when_a_phrase_goes(tokenizer):
    mapper = align(tokenizer, SOURCE, TARGET).mapper
    pairs = {(row, column) for row, column in mapper[:15, :11].nonzero().tolist()}
    same = {(n, n) for n in range(7)}  # start ... edema
    comma = pairs & {(7, 7), (10, 7)}  # one of the two commas of the source
    assert len(comma) == 1
    assert pairs == same | comma | {(11, 8), (12, 9), (13, 10)}
    assert (mapper[:, 11:14] == 0).all()  # pads that face words of the source keep their own
    assert torch.equal(mapper[14:, 14:], torch.eye(63))


def test_refine_by_hand_when_a_word_of_many_tokens_comes(tokenizer):
    plan = align(tokenizer, "chest x-ray showing edema", "chest x-ray showing zebra edema")
    assert (plan.mapper[:, 6:11] == 0).all()  # z e b r a keep their own maps
    assert plan.mapper[6, 11] == 1  # edema
    assert plan.mapper[7, 12] == 1  # the end token
    assert torch.equal(plan.mapper[13:, 13:], torch.eye(64))


def test_replace_gives_the_tokens_of_a_word_equal_shares(tokenizer):
    mapper = align(tokenizer, "chest edema", "chest zebra", kind="replace").mapper
    assert torch.allclose(mapper[2, 2:7], torch.full((5,), 0.2))
    back = align(tokenizer, "chest zebra", "chest edema", kind="replace").mapper
    assert torch.equal(back[2:7, 2], torch.ones(5))
    assert mapper[3, 7] == back[7, 3] == 1  # the end tokens


def test_the_same_prompt_aligns_with_itself(tokenizer):
    for kind in ("refine", "replace"):
        plan = align(tokenizer, SOURCE, SOURCE.upper(), kind=kind)
        assert torch.equal(plan.mapper, torch.eye(77))
    for prompt in ("", "edema " * 75):  # none, and as many as there is room for
        assert torch.equal(align(tokenizer, prompt, prompt).mapper, torch.eye(77))


def test_weights_and_blend_take_phrases(tokenizer):
    options = {"weights": {"Pleural Effusion": 2.0}, "blend": ["support devices", "edema"]}
    plan = align(tokenizer, SOURCE, TARGET, **options)
    assert plan.weights.nonzero().numel() == 77
    assert (plan.weights == 2).nonzero()[:, 0].tolist() == [8, 9]
    assert [row.nonzero()[:, 0].tolist() for row in plan.blend] == [[6, 8, 9], [6]]
    twice = phrase_tokens(tokenizer, "edema", "edema, edema")[0]
    assert twice.nonzero()[:, 0].tolist() == [1, 3]


def test_an_alignment_is_explained_word_by_word(tokenizer):
    weights = {"edema": 2.0}
    text = explain_alignment(
        tokenizer, "chest edema support devices", "chest zebra edema", weights=weights
    )
    lines = [line.split(maxsplit=1) for line in text.splitlines()[1:]]
    assert ["chest", "chest"] in lines
    assert ["zebra", "(5 tokens)        none: keeps its own"] in lines
    assert ["edema", "edema, times 2"] in lines
    assert len(lines) == 7  # the start, three words, the end, two that are gone
    assert lines[-2:] == [["(gone)", "support"], ["(gone)", "devices"]]
    shared = explain_alignment(tokenizer, "chest edema", "chest zebra", kind="replace")
    assert shared.count("edema, 0.2 of it") == 1
    same = explain_alignment(tokenizer, SOURCE, SOURCE, blend=["edema"])
    assert "x-ray (3 tokens)        x-ray (3 tokens)" in same.splitlines()
    assert "edema (blend)           edema (blend)" in same.splitlines()
    assert "(gone)" not in same


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: phrase_tokens(t, "suport device", SOURCE), "nearest there is 'support devices'"),
        (lambda t: align(t, SOURCE, TARGET, weights={"support devices": 2}), "is not in 'chest"),
        (lambda t: align(t, SOURCE, TARGET, blend=["fracture"]), "'fracture' is not in .* or "),
        (lambda t: phrase_tokens(t, "", SOURCE), "'' is not in"),
        (lambda t: phrase_tokens(t, "edema", ""), "'edema' is not in ''"),
        (lambda t: align(t, SOURCE, "edema " * 74 + "lung opacity"), "78 tokens of 77.*'opacity'"),
        (
            lambda t: align(t, SOURCE, TARGET, kind="replace"),
            "not 10 with 7: use refine",
        ),
        (lambda t: align(t, SOURCE, TARGET, kind="swap"), "it must be refine or replace"),
        (lambda t: align(t, SOURCE, SOURCE, weights={"edema": float("nan")}), "finite number"),
    ],
)
def test_bad_prompts_and_phrases_are_one_line(tokenizer, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PromptError) or "must be" in message or "finite" in message


# Hooks


def test_all_attention_layers_are_hooked_and_put_back(model):
    before = model.unet.attn_processors
    controller = Controller([], 4, store=True)
    with pytest.raises(KeyError), control(model.unet, controller):  # noqa: PT012
        now = model.unet.attn_processors
        assert all(isinstance(processor, ControlledAttention) for processor in now.values())
        assert len(controller.hooked) == len(before) == 14  # 7 of self-, 7 of cross-attention
        raise KeyError
    assert model.unet.attn_processors == before
    assert not model.unet._forward_hooks
    assert not model.unet._forward_pre_hooks


def test_nested_control_is_refused_and_leaves_the_outer_one(unet):
    with control(unet, Controller([], 4)):
        with pytest.raises(ValueError, match="under control already"):
            control(unet, Controller([], 4)).__enter__()
        assert isinstance(next(iter(unet.attn_processors.values())), ControlledAttention)
    assert isinstance(next(iter(unet.attn_processors.values())), AttnProcessor2_0)


def test_a_unet_without_layers_to_hook_is_refused():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain = small_unet(**blocks, mid_block_type=None)
    with pytest.raises(ValueError, match="0 of 0 attention layers"):
        control(plain, Controller([], 4)).__enter__()
    odd = small_unet()
    odd.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"0 of 8 attention layers .* U-Net of Stable Diffusion"):
        control(odd, Controller([], 4)).__enter__()


def test_a_hooked_layer_that_does_not_run_is_an_error(unet):
    controller = Controller([], 4)
    with control(unet, controller):
        controller.step = 0
        controller.hooked = controller.hooked | {"another"}
        with pytest.raises(RuntimeError, match="8 of 9 hooked attention layers ran"):
            predict(unet, *batch(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_replace": 1.5}, "cross_replace is 1.5"),
        ({"self_replace": -0.1}, "self_replace is -0.1"),
        ({"blend_threshold": 2}, "blend_threshold is 2"),
    ],
)
def test_shares_lie_between_0_and_1(options, message):
    with pytest.raises(ValueError, match=message):
        Controller([], 4, **options)


def test_rows_and_steps_that_cannot_be_are_errors(tokenizer, unet):
    plan = align(tokenizer, SOURCE, TARGET)
    for edits in ([Edit(1, 0, plan), Edit(1, 0, plan)], [Edit(0, 0, plan)], [Edit(1, -1, plan)]):
        with pytest.raises(ValueError, match="must all be different rows"):
            Controller(edits, 4)
    controller = Controller([Edit(2, 0, plan)], 4)
    with control(unet, controller):
        with pytest.raises(ValueError, match="step is None; set 0 to 3 first"):
            predict(unet, *batch(3))
        controller.step = 4
        with pytest.raises(ValueError, match="step is 4"):
            predict(unet, *batch(3))
        controller.step = 0
        with pytest.raises(ValueError, match="the batch has 2 rows, the edits need 3"):
            predict(unet, *batch(2))
    with pytest.raises(ValueError, match="no attention maps are kept"):
        controller.maps([0], torch.ones(1, 77), (8, 8))


# Maps and edits


def reference_maps(unet, z, cond):
    """Each cross-attention layer's maps (B, S, L), mean of heads, from get_attention_scores."""
    seen = []

    class Spy(AttnProcessor):
        def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None):
            if encoder_hidden_states is None:
                return AttnProcessor2_0()(attn, hidden)
            query = attn.head_to_batch_dim(attn.to_q(hidden))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            maps = attn.get_attention_scores(query, key)
            seen.append(maps.view(len(hidden), attn.heads, *maps.shape[1:]).mean(1))
            return super().__call__(attn, hidden, encoder_hidden_states, attention_mask)

    before = unet.attn_processors
    unet.set_attn_processor(Spy())
    predict(unet, z, cond)
    unet.set_attn_processor(before)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"upcast_attention": True, "use_linear_projection": True}, {"attention_head_dim": 4}],
)
def test_the_store_holds_the_sum_of_softmax_of_qk(options):
    unet = small_unet(**options)
    z, cond = batch(3)
    controller = Controller([], 2, store=True)
    plain = predict(unet, z, cond)
    assert torch.allclose(controlled(unet, controller, z, cond), plain, atol=1e-5)
    wanted = sum(reference_maps(unet, z, cond))  # all of one size here
    assert list(controller._kept) == [64]
    assert torch.allclose(controller._kept[64], wanted, atol=1e-5)
    tokens = torch.zeros(1, 77)
    tokens[0, 3:5] = 1
    seen = controller.maps([1], tokens, (8, 8))[0]
    direct = wanted[1, :, 3:5].sum(1).view(8, 8)
    assert torch.allclose(seen, direct / direct.max(), atol=1e-5)


def test_maps_of_films_that_are_not_square(unet):
    z, cond = torch.randn(1, 4, 8, 16), batch(1)[1]
    controller = Controller([], 1, store=True)
    controlled(unet, controller, z, cond)
    wanted = sum(reference_maps(unet, z, cond))[0, :, 5].view(4, 8)
    tokens = torch.nn.functional.one_hot(torch.tensor([5]), 77)
    assert torch.allclose(controller.maps([0], tokens, (4, 8))[0], wanted / wanted.max(), atol=1e-5)


def test_attention_maps_are_between_0_and_1(tokenizer, unet):
    controller = Controller([], 1, store=True)
    controlled(unet, controller, *batch(2))
    phrases = [["support devices", "edema"], ["edema"]]
    maps = attention_maps(controller, tokenizer, [0, 1], [SOURCE, TARGET], phrases, (16, 16))
    assert maps.shape == (2, 16, 16)
    assert maps.min() >= 0
    assert torch.allclose(maps.amax((1, 2)), torch.ones(2))


def test_a_step_back_begins_another_store(unet):
    controller, (z, cond) = Controller([], 2, store=True), batch(1)
    for step in (0, 1):
        controlled(unet, controller, z, cond, step)
    both = controller._kept[64]
    controlled(unet, controller, z, cond, step=0)
    assert torch.allclose(2 * controller._kept[64], both, atol=1e-6)


def test_an_idle_controller_changes_nothing_at_all(tokenizer, model):
    z = torch.randn(2, model.unet.config.in_channels, 8, 8)
    cond = torch.randn(2, 77, model.unet.config.cross_attention_dim)
    plain = predict(model.unet, z, cond)
    off = Controller(one_edit(tokenizer), 10, cross_replace=0, self_replace=0)
    assert torch.equal(controlled(model.unet, off, z, cond), plain)
    late = Controller(one_edit(tokenizer, weights={"edema": 5.0}), 10)  # .8 and .5 of 10 steps
    assert torch.equal(controlled(model.unet, late, z, cond, step=8), plain)
    assert not torch.equal(controlled(model.unet, late, z, cond, step=7), plain)


def test_windows_end_where_they_say(tokenizer):
    controller = Controller(one_edit(tokenizer), 100, cross_replace=0.55, self_replace=0.29)
    assert (controller.num_cross, controller.num_self) == (55, 29)  # 0.29 * 100 is 28.99...
    assert Controller(one_edit(tokenizer), 4).num_cross == 3


def test_the_same_caption_returns_the_sources_noise(tokenizer, unet):
    z, cond = batch(1)
    controller = Controller(one_edit(tokenizer, target=SOURCE), 4, 1.0, 1.0)
    eps = controlled(unet, controller, z.expand(2, -1, -1, -1), cond.expand(2, -1, -1))
    assert torch.allclose(eps[0], eps[1], atol=1e-5)


def test_full_replacement_puts_the_sources_maps_into_the_target(tokenizer, unet):
    z, cond = batch(2)
    edits = one_edit(tokenizer, target=SWAPPED.replace("zebra", "edema"), kind="replace")
    controller = Controller(edits, 4, store=True)
    eps = controlled(unet, controller, z, cond)
    kept = controller._kept[64]
    assert torch.allclose(kept[0], kept[1], atol=1e-5)
    assert torch.allclose(eps[0], predict(unet, z, cond)[0], atol=1e-5)  # the source is left alone
    assert (eps[1] - predict(unet, z, cond)[1]).abs().max() > 1e-3


class WrittenOut(AttnProcessor):
    """Self-attention whose maps of row 1 are exchanged for row 0's, the slow way."""

    def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None):
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden, encoder_hidden_states, attention_mask)
        query, key, value = (
            attn.head_to_batch_dim(part(hidden)) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        maps = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads)).clone()
        maps[1] = maps[0]
        return attn.to_out[0](attn.batch_to_head_dim(maps.flatten(0, 1) @ value))


def test_self_attention_of_the_target_is_the_sources_map(tokenizer):
    unet, (z, cond) = small_unet(), batch(2)
    controller = Controller(one_edit(tokenizer), 4, cross_replace=0, self_replace=1)
    eps = controlled(unet, controller, z, cond)
    small = Controller(one_edit(tokenizer), 4, cross_replace=0, self_replace=1, self_side=4)
    assert torch.equal(controlled(unet, small, z, cond), predict(unet, z, cond))
    unet.set_attn_processor(WrittenOut())
    wanted = predict(unet, z, cond)
    assert torch.allclose(eps, wanted, atol=1e-5)
    unet.set_attn_processor(AttnProcessor())
    assert (wanted - predict(unet, z, cond))[1].abs().max() > 1e-3


def test_refined_and_reweighted_maps_follow_the_equation(tokenizer, unet):
    z, cond = batch(2)
    weights = {"effusion": 2.0, "support devices": 3.0}  # an old word and new ones
    plan = align(tokenizer, TARGET, SOURCE, weights=weights)
    controller = Controller([Edit(1, 0, plan)], 4, self_replace=0)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    query, key = torch.randn(2 * layer.heads, 9, 16), torch.randn(2 * layer.heads, 77, 16)
    controller.step = 0
    source, target = layer.get_attention_scores(query, key).chunk(2)
    own = (plan.mapper.sum(0) == 0).float()
    wanted = (source @ plan.mapper + target * own) * plan.weights
    edited = controller.scores(layer, query, key)
    assert torch.allclose(edited.chunk(2)[1], wanted, atol=1e-6)
    assert torch.equal(edited.chunk(2)[0], source)
    assert (controlled(unet, controller, z, cond) - predict(unet, z, cond))[1].abs().max() > 1e-3


def test_weight_1_is_no_reweighting(tokenizer, unet):
    z, cond = batch(2)
    one, none, two = (
        controlled(unet, Controller(one_edit(tokenizer, weights=weights), 4), z, cond)
        for weights in ({"edema": 1.0}, None, {"edema": 2.0})
    )
    assert torch.equal(one, none)
    assert (two - none)[1].abs().max() > 1e-3


def test_many_films_and_edits_in_a_batch_equal_singles(tokenizer, unet):
    """Layout [source uncond (2), target uncond (3), source (2), target (3)], films 0, 1, 1."""
    plans = [
        align(tokenizer, SOURCE, TARGET, weights={"effusion": 2.0}),
        align(tokenizer, TARGET, SOURCE),
        align(tokenizer, SOURCE, SWAPPED, kind="replace"),
    ]
    edits = layout(plans, [0, 1, 1], source_start=5, target_start=7)
    assert [(edit.target, edit.source) for edit in edits] == [(7, 5), (8, 6), (9, 6)]
    z, cond = batch(10)
    together = controlled(unet, Controller(edits, 4), z, cond)
    for edit in edits:
        rows = [edit.source, edit.target]
        alone = Controller([Edit(1, 0, edit.alignment)], 4)
        single = controlled(unet, alone, z[rows], cond[rows])
        assert torch.allclose(together[rows], single, atol=2e-5)
    assert torch.allclose(together[:7], predict(unet, z, cond)[:7], atol=2e-5)  # not edited


def test_maps_are_float32_under_autocast(tokenizer, unet):
    z, cond = batch(2)
    edits = one_edit(tokenizer, blend=["support devices"])
    exact = controlled(unet, Controller(edits, 4), z, cond)
    controller = Controller(edits, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eps = controlled(unet, controller, z, cond)
    assert controller._kept[64].dtype == torch.float32
    assert torch.allclose(controller._kept[64].sum(2)[0], torch.full((64,), 4.0), atol=1e-5)
    assert (eps.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


# Local blend


def blending(tokenizer, unet, **options):
    edits = one_edit(tokenizer, blend=["support devices", "effusion"])
    controller = Controller(edits, 4, **options)
    controlled(unet, controller, *batch(2), step=1)
    return controller, batch(1, seed=5)[0], batch(1, seed=6)[0]


def test_local_blend_keeps_the_source_outside_the_mask(tokenizer, unet):
    controller, z_source, z_target = blending(tokenizer, unet)
    mask = controller.blend_mask((16, 16))
    assert mask.shape == (1, 1, 16, 16)
    assert 0 < mask.float().mean() < 1
    blended = controller.blend(z_source, z_target)
    inside = mask.expand_as(blended)
    assert torch.equal(blended[inside], z_target[inside])
    assert torch.equal(blended[~inside], z_source[~inside])
    source, target = (
        attention_maps(controller, tokenizer, [row], [prompt], [phrases], (16, 16))
        for row, prompt, phrases in [
            (0, SOURCE, ["support devices", "effusion"]),
            (1, TARGET, ["effusion"]),
        ]
    )
    assert torch.equal(mask[0], (source >= 0.3) | (target >= 0.3))


def test_local_blend_with_a_full_mask_is_off(tokenizer, unet):
    controller, z_source, z_target = blending(tokenizer, unet, blend_threshold=0)
    assert torch.equal(controller.blend(z_source, z_target), z_target)


def test_local_blend_waits_and_needs_phrases(tokenizer, unet):
    controller, z_source, z_target = blending(tokenizer, unet, blend_start=0.5)
    assert controller.blend(z_source, z_target) is z_target
    plain = Controller(one_edit(tokenizer), 4, step=3)
    assert not plain.store
    assert plain.blend(z_source, z_target) is z_target
    plans = [align(tokenizer, SOURCE, TARGET, blend=b) for b in (["support devices"], [])]
    mixed = Controller(layout(plans, [0, 0], 0, 1), 4)
    controlled(unet, mixed, *batch(3), step=1)
    mask = mixed.blend_mask((16, 16))
    assert not mask[0].all()
    assert mask[1].all()
