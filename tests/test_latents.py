"""The cache of latents: what it holds, when it is reused, continued, made anew or refused."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_nb import latents as module
from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort
from prism_nb.diffusion import embed_captions, posterior
from prism_nb.files import read_json, write_json
from prism_nb.images import load_films, save_png, uint8_to_unit
from prism_nb.latents import LatentError, encode_cohort, load_latents

SHARD = 4


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    cohort = load_cohort(phantom.write_cohort(tmp_path_factory.mktemp("films"), 14, 64, seed=1))
    cohort.table = cohort.table.iloc[:10].assign(caption=captions(cohort.table.iloc[:10]))
    return cohort


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", SHARD)


@pytest.fixture
def encode(model, cohort, tmp_path):
    """A function that encodes the cohort into tmp_path, and counts the films it had to encode.

    `read` names those that it read to learn whether they are still the same.
    """

    def run(table=cohort.table, size=64, folder=tmp_path / "latents", root=None, **options):
        run.encoded, whole = [], module._encode
        run.read, digest = [], module.sha256_file

        def counted(model, paths, *rest):
            run.encoded.append(len(paths))
            return whole(model, paths, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_encode", counted)
            patch.setattr(module, "sha256_file", lambda path: run.read.append(path) or digest(path))
            made = encode_cohort(
                model, table, root or cohort.image_root, size, "squash", folder, 3, **options
            )
        if options.get("num_verified", 1):
            run.encoded.pop()  # what verification encoded
        return made

    return run


def fresh(model, cohort, rows):
    paths = [cohort.image_root / path for path in cohort.table["path"].iloc[rows]]
    return posterior(model, uint8_to_unit(load_films(paths, 64)))


def test_cached_latents_equal_a_fresh_encode(model, cohort, encode):
    latents, rows = encode(), np.array([9, 0, 5, 5, 3])
    for stored, new in zip(latents.gather(rows), fresh(model, cohort, rows), strict=True):
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), new, rtol=1e-3, atol=1e-4)
    assert len(latents) == 10
    assert latents.shape == (10, model.vae.config.latent_channels, 8, 8)
    assert latents.film_ids == list(cohort.table["film_id"])
    assert (latents.gather(np.arange(10))[1] > 0).all()
    mean = latents.gather(np.arange(10))[0].float()
    assert latents.spread() == pytest.approx(mean.std().item(), rel=1e-5)
    torch.testing.assert_close(latents.mean([0, 2]), mean[[0, 2]].mean(0))
    torch.testing.assert_close(latents.mean(range(len(mean)), num_films=1), mean[0])


def test_float32_is_kept_to_the_bit(model, cohort, encode):
    latents = encode(dtype=torch.float32)
    mean, std = fresh(model, cohort, np.arange(3))  # the batch that was encoded together
    assert torch.equal(latents.gather(np.arange(3))[0], mean)
    assert torch.equal(latents.gather(np.arange(3))[1], std)


def test_each_film_keeps_its_own_caption(model, cohort, encode):
    latents = encode()
    for row, caption in enumerate(cohort.table["caption"]):
        assert latents.captions[latents.caption_index[row]] == caption
    rows = np.array([5, 2])
    new = embed_captions(model, list(cohort.table["caption"].iloc[rows]))
    torch.testing.assert_close(latents.cond(rows), new)
    assert latents.captions[-1] == ""
    assert len(set(latents.captions)) == len(latents.captions) == len(latents.text)
    torch.testing.assert_close(latents.text[-1:], embed_captions(model, [""]))


def test_films_are_read_from_the_disk_not_held_in_memory(encode, tmp_path):
    assert all(mean.dtype == std.dtype == torch.float16 for mean, std in encode().shards)
    path, process = tmp_path / "large.safetensors", psutil.Process()
    module._write(path, {"mean": torch.zeros(2**26, dtype=torch.uint8)}, "key")
    before = process.memory_info().rss
    tensors = module._open(path, "key")
    assert process.memory_info().rss - before < 2**22
    assert tensors["mean"].sum() == 0
    assert process.memory_info().rss - before > 2**25


def test_rows_are_found_and_unknown_ones_named(encode):
    latents = encode()
    ids = [latents.film_ids[row] for row in (7, 1)]
    assert latents.rows(ids).tolist() == [7, 1]
    assert latents.rows([]).dtype == np.int64
    with pytest.raises(LatentError, match=r"film nobody \(2 in all\) has no latents"):
        latents.rows([ids[0], "nobody", "none"])
    for rows in ([10], [-1, 0]):
        with pytest.raises(LatentError, match="of 10 were asked for"):
            latents.gather(np.array(rows))


def test_a_finished_cache_is_reused(encode, tmp_path):
    first, done = encode(), []
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = encode(progress=done.append)
    assert encode.encoded == []
    assert done == [4, 4, 2]
    assert len(times) == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.key == first.key


def test_other_pixels_under_the_same_names_are_encoded_anew(cohort, encode, tmp_path):
    root = shutil.copytree(cohort.image_root, tmp_path / "films")
    first, paths = encode(root=root, num_verified=0), cohort.table["path"]
    before = [part.clone() for part in first.gather(np.arange(10))]
    save_png(root / paths.iloc[6], np.zeros((64, 64), np.uint8))
    again = encode(root=root, num_verified=0)
    assert encode.encoded == [4]
    assert again.key != first.key
    for old, new in zip(before, again.gather(np.arange(10)), strict=True):
        assert [row for row in range(10) if not torch.equal(old[row], new[row])] == [6]
    names = [root / path for path in paths.iloc[[0, 1]]]
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, reversed(contents), strict=True):
        path.write_bytes(content)
    assert encode(root=root).key != again.key
    assert encode.encoded == [4]


def test_films_are_read_again_only_where_size_or_time_changed(cohort, encode, tmp_path):
    root = shutil.copytree(cohort.image_root, tmp_path / "films")
    first = encode(root=root)
    assert len(encode.read) == 10
    assert encode(root=root).key == first.key
    assert encode.read == []
    os.utime(root / cohort.table["path"].iloc[5], (1, 1))
    assert encode(root=root).key == first.key
    assert len(encode.read) == 4  # those of its shard
    assert encode(root=root).key == first.key
    assert encode.read == []
    (tmp_path / "latents" / module.STAMPS).unlink()
    assert encode(root=root).key == first.key
    assert len(encode.read) == 10
    moved = shutil.copytree(root, tmp_path / "moved")
    assert encode(root=moved).key == first.key
    assert encode.encoded == []


def test_a_cache_of_an_older_version_is_encoded_anew(encode, tmp_path):
    encode()
    folder = tmp_path / "latents"
    (folder / module.STAMPS).unlink()
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"key": "without the films' bytes"})
    encode()
    assert encode.encoded == [4, 4, 2]


def test_a_film_that_is_gone_is_named_though_its_latents_are_there(cohort, encode, tmp_path):
    root = shutil.copytree(cohort.image_root, tmp_path / "films")
    encode(root=root)
    (root / cohort.table["path"].iloc[6]).unlink()
    with pytest.raises(LatentError, match="Run 01_caption again") as error:
        encode(root=root, num_verified=0)
    assert cohort.table["path"].iloc[6] in str(error.value)
    assert "\n" not in str(error.value)


def test_new_captions_leave_the_films_alone(cohort, encode):
    first = encode()
    again = encode(cohort.table.assign(caption="chest x-ray"))
    assert encode.encoded == []
    assert again.captions == ["chest x-ray", ""]
    assert again.key != first.key
    swapped = encode(cohort.table.assign(caption=["chest x-ray", "edema"] * 5))
    other = encode(cohort.table.assign(caption=["edema", "chest x-ray"] * 5))
    assert swapped.key != other.key


def test_other_films_settings_or_weights_are_encoded_anew(model, cohort, encode, tmp_path):
    keys = {encode().key}
    keys.add(encode(cohort.table.iloc[::-1]).key)
    assert encode.encoded == [4, 4, 2]
    keys.add(encode(cohort.table.iloc[:7]).key)
    assert encode.encoded == [4, 3]
    assert not (tmp_path / "latents" / "000002.safetensors").exists()
    keys.add(encode(cohort.table.iloc[:8], dtype=torch.float32).key)
    keys.add(encode(cohort.table.iloc[:8], size=128).key)
    assert encode.encoded == [4, 4]
    with torch.no_grad():
        next(model.vae.parameters()).mul_(1.5)
    keys.add(encode(cohort.table.iloc[:8], size=128).key)
    assert encode.encoded == [4, 4]
    model.vae.register_to_config(scaling_factor=2.0)
    keys.add(encode(cohort.table.iloc[:8], size=128).key)
    assert encode.encoded == [4, 4]
    with torch.no_grad():
        next(model.text_encoder.parameters()).mul_(1.5)
    keys.add(encode(cohort.table.iloc[:8], size=128).key)
    assert encode.encoded == []
    assert len(keys) == 8


def test_an_interrupted_encoding_goes_on_where_it_stopped(encode, tmp_path):
    seen = []

    def stop(done):
        seen.append(done)
        if sum(seen) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(progress=stop)
    with pytest.raises(LatentError, match="no finished latents: run 02_finetune"):
        load_latents(tmp_path / "latents")
    encode()
    assert encode.encoded == [4, 2]
    assert len(encode.read) == 2  # of the shard that it had not come to


def test_a_killed_encoding_ends_as_an_uninterrupted_one(random_base, cohort, encode, tmp_path):
    cohort.table.to_parquet(tmp_path / "table.parquet")
    script = f"""
        import os, signal, pathlib, pandas
        from prism_nb import latents
        from prism_nb.diffusion import load_model
        latents.SHARD, films = {SHARD}, []
        def kill(done):
            films.append(done)
            if sum(films) >= 7:
                os.kill(os.getpid(), signal.SIGKILL)
        latents.encode_cohort(
            load_model({str(random_base)!r}, device="cpu"),
            pandas.read_parquet({str(tmp_path / "table.parquet")!r}),
            pathlib.Path({str(cohort.image_root)!r}), 64, "squash",
            pathlib.Path({str(tmp_path / "latents")!r}), 3, kill)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert (tmp_path / "latents" / "000000.safetensors").is_file()
    continued = encode()
    assert encode.encoded == [4, 2]
    whole = encode(folder=tmp_path / "whole")
    assert whole.key == continued.key
    for name in ("000000", "000001", "000002", "text"):
        files = [tmp_path / folder / f"{name}.safetensors" for folder in ("latents", "whole")]
        for key, value in load_file(files[0]).items():
            torch.testing.assert_close(value, load_file(files[1])[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["000001", "text"])
@pytest.mark.parametrize("damage", ["torn", "empty", "missing"])
def test_a_damaged_file_is_refused_and_made_anew(encode, tmp_path, name, damage):
    encode()
    path = tmp_path / "latents" / f"{name}.safetensors"
    path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-10])
    if damage == "missing":
        path.unlink()
    with pytest.raises(LatentError, match=f"{name}.safetensors is missing, damaged"):
        load_latents(tmp_path / "latents")
    encode()
    assert encode.encoded == ([4] if name == "000001" else [])


@pytest.mark.parametrize("tensor", ["mean", "std", "text"])
def test_stored_rows_that_differ_from_a_fresh_encode_are_refused(encode, tmp_path, tensor):
    latents = encode()
    name = "text" if tensor == "text" else "000001"
    path = tmp_path / "latents" / f"{name}.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors[tensor][1] *= 1.1
    index = read_json(tmp_path / "latents" / "index.json")
    key = index["text"] if tensor == "text" else index["shards"][1]
    save_file(tensors, path, metadata={"key": key})
    with pytest.raises(LatentError, match="from a fresh encode of 10 films: delete this folder"):
        encode()
    assert encode(num_verified=0).key == latents.key
    shutil.rmtree(tmp_path / "latents")
    assert encode().key == latents.key


def test_a_film_that_is_no_number_is_refused(model, encode):
    with torch.no_grad():
        model.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(LatentError, match="differ by up to nan"):
        encode()


def test_a_film_that_cannot_be_read_is_named(model, cohort, tmp_path):
    root = shutil.copytree(cohort.image_root, tmp_path / "films")
    broken = cohort.table["path"].iloc[6]
    (root / broken).write_bytes((root / broken).read_bytes()[:200])
    with pytest.raises(LatentError) as error:
        encode_cohort(model, cohort.table, root, 64, "squash", tmp_path / "latents", 3)
    assert broken in str(error.value)
    assert "Run 01_caption again" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_film_and_no_caption_are_one_line(cohort, encode):
    for table in (
        cohort.table.iloc[:0],
        cohort.table.assign(caption=None),
        cohort.table.assign(caption=""),
    ):
        with pytest.raises(LatentError, match="run 01_caption again"):
            encode(table)


def test_a_folder_without_an_index_or_with_a_torn_one_is_one_line(encode, tmp_path):
    with pytest.raises(LatentError, match="no finished latents"):
        load_latents(tmp_path)
    encode()
    index = tmp_path / "latents" / "index.json"
    whole = index.read_text()
    index.write_text(whole[:100])
    with pytest.raises(ValueError, match="no readable JSON"):
        load_latents(tmp_path / "latents")
    write_json(index, json.loads(whole) | {"shards": ["other"] * 3})
    with pytest.raises(LatentError, match="missing, damaged or another's"):
        load_latents(tmp_path / "latents")


def test_over_long_captions_are_warned_of_once(cohort, encode, caplog):
    long = "edema " * 90
    encode(cohort.table.assign(caption=[long + str(row) for row in range(10)]))
    lines = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("10 of 11 captions have more than 77 tokens")
