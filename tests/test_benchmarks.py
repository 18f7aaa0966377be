"""The benchmarks: each workload runs on tiny inputs, and its gate refuses what is not the same."""

import numpy as np
import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import case as cases
from benchmarks import data, editing, evidence, paired, road
from benchmarks.peers import lance
from benchmarks.peers.ganterfactual import Port
from prism_nb.counting import TEXT, UNET, VAE
from prism_nb.files import read_json, write_json

TARGETS = {"W1": [10, 4, 3], "W2": [50, None], "W3": [1.5], "W4": [2, None], "W5": [None]}
TARGETS |= {"W6": [1.6, None], "W7": [10], "W7b": [1.4], "W8": [2.8, 2.8], "W9": [2.5]}
TARGETS |= {"W10": [2, None, 1.35], "W11": [1.5]}  # on two cores
TINY = {"size": 64, "films": 8, "batch": 2, "many": 2, "edited": 2, "steps": 2, "gan": 64}
TINY = cases.Scale(**TINY, classifier="test_resnet", pairs=1, repeats=1)
SMALL = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32}
SMALL |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2}
SMALL |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "sample_size": 8}
NARROW = {"block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 16}
WORDS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
WORDS |= {"num_attention_heads": 2, "vocab_size": 1000}
PARTS = UNET | SMALL, VAE | NARROW | {"sample_size": 64}, TEXT | WORDS


SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}
SIGHT |= {"num_attention_heads": 2, "patch_size": 16}


def tiny_case(folder, **options):
    found = cases.Case(folder, scale=TINY, **options)
    found.ceilings = dict.fromkeys(paired.ceilings(), 1.0)
    return found


@pytest.fixture(scope="module", autouse=True)
def small():
    """CLIP is small, sweeps and null-text are short, and nothing is compiled."""
    make = evidence.build_classifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance, "INNER", 2)
        patch.setattr(editing, "SHARES", (0.4, 0.8))
        patch.setattr(editing, "NUM_TARGETS", 2)
        patch.setattr(evidence, "build_classifier", lambda _, heads: make("test_resnet", heads))
        patch.setattr(cases, "SIGHT", SIGHT)
        patch.setattr(torch.nn.Module, "compile", lambda self: None)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Films of 64 px, and a Stable Diffusion of small settings with random weights."""
    return tiny_case(tmp_path_factory.mktemp("bench"), parts=PARTS)


@pytest.fixture
def as_on_gpu(tmp_path):
    """What `--device cuda` does, on the CPU."""
    found = tiny_case(tmp_path, parts=PARTS)
    found.gpu = found.brief = True
    return found


def everything_is_there(row):
    ratio, memory = row.timed["ratio"], np.array(row.memory)
    assert len(ratio) == 1
    assert (ratio > 0).all()
    assert len(row.gate) >= 1
    assert ((memory >= 0) | np.isnan(memory)).all()
    assert row.unit.split()[0] in ("a", "an")
    assert len(suite.cells(row)) == suite.HEAD.count("|") + 1


@pytest.mark.parametrize("name", TARGETS)
def test_every_workload_passes_its_gate_and_is_timed(case, name):
    rows = list(suite.WORKLOADS[name](case))
    assert [row.target for row in rows] == TARGETS[name]
    assert {row.workload.rstrip("b") for row in rows} == {name.rstrip("b")}
    for row in rows:
        everything_is_there(row)


@pytest.mark.parametrize("name", ["W3", "W4", "W6", "W7"])
def test_the_full_size_road_runs_with_small_settings(as_on_gpu, name):
    rows = list(suite.WORKLOADS[name](as_on_gpu))
    for row in rows:
        everything_is_there(row)
    if name == "W4":
        assert [row.target for row in rows] == [None] * 6 + [2.5, 3.0]
        batches = [row.what.partition(" of ")[2].partition(",")[0] for row in rows[::2]]
        assert batches == ["1", "2", "4", "2"]
        assert ["compiled in" in row.what for row in rows] == [False] * 6 + [True] * 2


def test_a_batch_that_does_not_fit_is_a_row_as_well(case, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(case, "time", full)
    rows = list(suite.WORKLOADS["W4"](case))
    assert [row.refused for row in rows] == ["more memory than this GPU has"] * len(rows)
    assert rows


def test_a_base_from_a_folder_is_measured_as_well(random_base, tmp_path):
    case = tiny_case(tmp_path, base=random_base)
    for name in ("W2", "W9"):
        for row in suite.WORKLOADS[name](case):
            everything_is_there(row)


WRONG = {
    "W1": (data, "load_film", lambda path, size: np.zeros((size, size), np.uint8)),
    "W2": (data, "read_files", lambda folder, rows: [torch.zeros(len(rows), 4, 8, 8)] * 2),
    "W3": (data, "read_files", lambda folder, rows: [torch.zeros(len(rows), 4, 8, 8)] * 2),
    "W6": (editing, "ddim_invert", lambda model, z0, cond, steps: torch.stack([z0 * 0] * 3)),
    "W7b": (editing, "invert_null_text", lambda model, z, cond, *_: {"uncond": cond[None] * 0}),
    "W9": (lance, "s_clip", lambda *_: 2.0),
    "W10": (evidence, "logits_of", lambda model, films: np.ones((len(films), 4))),
    "W11": (Port, "step", lambda self, x, y: [0.0] * 4),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_output_gets_no_number(case, monkeypatch, name):
    monkeypatch.setattr(*WRONG[name])
    row = next(suite.rows_of(case, [name]))
    assert row.refused
    assert row.timed == {}
    assert row.met is None
    assert "REFUSED" in suite.cells(row)


def test_latents_of_other_films_are_refused(case):
    model = case.load()
    latents = case.latents(model)
    loop = data.Loop(model, case.table[::-1], TINY.size, 2)
    with pytest.raises(paired.GateError, match="captions, relative"):
        data.same_latents(case, loop, latents)


def test_a_loss_that_is_not_the_same_is_refused(case, monkeypatch):
    losses = iter([1.0, 1.1])
    monkeypatch.setattr("benchmarks.training.loss_of", lambda *_: next(losses))
    row = next(suite.rows_of(case, ["W4"]))
    assert row.refused == "loss in bf16, relative is 0.1, it must be <= 0.03"


def test_an_edit_no_better_than_the_peers_is_refused():
    films, rng = np.full((2, 8, 8), 0.5, np.float32), np.random.default_rng(0)
    truth = films + 0.2
    near, far = (films + size * rng.normal(size=films.shape) for size in (0.001, 0.1))
    assert len(editing.no_worse(films, truth, (near, far), (truth, films))) == 2
    with pytest.raises(paired.GateError, match="PSNR rebuilt"):
        editing.no_worse(films, truth, (far, near), (truth, films))
    with pytest.raises(paired.GateError, match="error to the truth"):
        editing.no_worse(films, truth, (near, far), (films, truth))


def test_a_sweep_must_match_edits_made_one_by_one(case, monkeypatch):
    edit = editing.edit

    def shuffled(model, inversion, films, rows, texts, **dials):
        made = edit(model, inversion, films, rows, texts, **dials)
        made.films = made.films if len(rows) == 1 else 1 - made.films
        return made

    monkeypatch.setattr(editing, "edit", shuffled)
    row = next(suite.rows_of(case, ["W8"]))
    assert row.refused.startswith("PSNR, fp32, to one by one")


def write_metrics(value):
    """A stand-in for a program: leaves metrics in the run folder that it was given."""

    def call(name, *given):
        last = str(given[-1]).split("=")[-1] if name == "prism-nb" else given[4]
        found = {"01_caption": 1, "06_augment": value if name == "papermill" else 2}
        write_json(last / "metrics.json" if name == "papermill" else f"{last}/metrics.json", found)

    return call


@pytest.mark.parametrize(("value", "refused"), [(2, ""), (3, "the metrics of 06_augment differ")])
def test_both_roads_must_end_with_the_same_numbers(case, monkeypatch, value, refused):
    monkeypatch.setattr(road, "call", write_metrics(value))
    case_rows = list(suite.rows_of(case, ["W12"]))
    assert len(case_rows) == 1
    assert case_rows[0].refused.startswith(refused)
    assert bool(case_rows[0].timed) == (not refused)


def test_a_program_that_fails_says_so_in_one_line():
    with pytest.raises(paired.GateError, match=r"^python failed: .*no_such_module") as caught:
        road.call("python", "-m", "no_such_module")
    assert "\n" not in str(caught.value)


def test_a_peer_that_stops_early_says_when(case):
    model, text = case.model, cases.captions(case.table)[:1]
    z0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = editing.embed_captions(model, list(text))
    trajectory, tuned, enough = lance.null_text(model, z0, cond, 2)
    assert trajectory.shape == (3, 1, 4, 8, 8)
    assert tuned.shape == (2, *cond.shape)
    assert 1 <= enough <= lance.INNER
    assert not any(
        weight.requires_grad or weight.grad is not None for weight in model.unet.parameters()
    )


def test_a_check_names_value_and_limit_and_refuses_what_is_no_number():
    assert paired.check("error", 0.5, 1) == "error 0.5 (<= 1)"
    assert paired.check("PSNR", 40, 35, least=True) == "PSNR 40 (>= 35)"
    with pytest.raises(paired.GateError, match="error is nan, it must be <= 1"):
        paired.check("error", float("nan"), 1)


def test_pairs_are_of_the_same_unit_and_the_target_is_of_their_median():
    timed = paired.paired(lambda: None, lambda: None, 3, per=(2, 4))
    assert [len(timed[name]) for name in ("ours", "peer", "ratio", "processor_ratio")] == [3] * 4
    np.testing.assert_allclose(timed["ratio"], timed["peer"] / timed["ours"])
    row = paired.Row("W1", "", target=2, timed={"ratio": np.array([1, 2.5, 9])})
    assert row.met is True
    row.target = 3
    assert row.met is False


def test_flops_are_counted_forward_and_backward():
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4)
    assert paired.count_flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 8 * 16 * 4)


def test_memory_that_a_call_adds_is_seen():
    block = paired.added_memory(torch.device("cpu"), lambda: torch.ones(2**25))
    assert np.isnan(block) or 0.12 < block < 0.2


def test_the_table_and_the_json_say_what_was_measured(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(suite.WHY, "W1", "because")
    monkeypatch.setattr(data, "SOURCES", (("512 px", (512, 512), 1e9),))
    assert suite.report(case, ["W0", "W1"], tmp_path / "found.json") == 0  # missed, not wrong
    said = capsys.readouterr().out
    assert "| W1 | decode a JPEG, 512 px | PRISM's transforms | 1e+09: MISSED |" in said
    assert "W1: because" in said
    found = read_json(tmp_path / "found.json")
    assert {"commit", "date", "machine", "versions", "device", "ceilings"} <= set(found)
    row = found["rows"][0]
    assert row["why"] == "because"
    assert row["met"] is False
    assert len(row["timed"]["ours"]) == 1


def test_an_unknown_workload_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        suite.main(["--only", "W4,W99"])
    assert str(stopped.value).startswith("benchmarks: no workload 'W99'; there are W0, W1, W2")
    assert suite.chosen("W4, W0", False) == ["W4", "W0"]
    assert "W12" not in suite.chosen("", True)
    assert suite.chosen("", False)[-1] == "W12"


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks: device is cuda but torch sees no GPU"):
        suite.main(["--device", "cuda", "--only", "W1"])
