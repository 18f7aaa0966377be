"""Images: pixel values of every mode, refusals before decoding, ranges that must be right."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from prism_nb import images
from prism_nb.images import ImageError, load_film, load_films, load_image, save_png


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claim_png(path, width, height):
    """Write a PNG of a hundred bytes whose header claims width x height."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


@pytest.fixture
def ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_eight_bit_modes_give_the_same_grey(tmp_path, ramp, mode):
    path = tmp_path / "film.png"
    Image.fromarray(ramp).convert(mode).save(path)
    assert Image.open(path).mode == mode
    unit = load_image(path)
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit, ramp.astype(np.float32) / 255)
    np.testing.assert_array_equal(load_film(path, 16), ramp)


def test_mode_one(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "film.png")
    assert Image.open(tmp_path / "film.png").mode == "1"
    np.testing.assert_array_equal(load_image(tmp_path / "film.png"), [[1, 0]])


def test_colour_is_weighed_as_luma(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)).save(tmp_path / "film.png")
    np.testing.assert_allclose(load_image(tmp_path / "film.png"), [[0.299, 0.587]], atol=0.003)


def test_alpha_is_laid_over_black(tmp_path):
    pixels = np.array([[[200, 255], [200, 0], [200, 51]]], np.uint8)
    Image.fromarray(pixels, mode=None).save(tmp_path / "film.png")
    expected = [[200 / 255, 0, 200 / 255 * 0.2]]
    np.testing.assert_allclose(load_image(tmp_path / "film.png"), expected, atol=1e-6)


@pytest.mark.parametrize(("bits", "scale"), [(16, 65535), (14, 16383), (12, 4095), (10, 1023)])
def test_sixteen_bit_files_are_not_clipped(tmp_path, bits, scale):
    ramp = np.linspace(0, 2**bits - 1, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(ramp).save(tmp_path / "film.png")
    assert Image.open(tmp_path / "film.png").mode == "I;16"
    unit = load_image(tmp_path / "film.png")
    np.testing.assert_allclose(unit, ramp / scale, atol=1e-6)
    film = load_film(tmp_path / "film.png", 20)
    np.testing.assert_array_equal(film, images.unit_to_uint8(unit))
    assert len(np.unique(film)) > 200  # clipped at 255, nearly all would be white


def test_jpeg(tmp_path, ramp):
    Image.fromarray(ramp).save(tmp_path / "film.jpg", quality=100, subsampling=0)
    np.testing.assert_allclose(load_image(tmp_path / "film.jpg"), ramp / 255, atol=3 / 255)


@pytest.mark.parametrize(("mode", "limit"), [("L", 2), ("RGB", 2)])
def test_reduced_decoding_of_a_large_jpeg_agrees_with_the_full_one(tmp_path, mode, limit):
    y, x = np.mgrid[0:1200, 0:1000]
    smooth = (127 + 90 * np.sin(x / 90) * np.cos(y / 120)).astype(np.uint8)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "film.jpg", quality=95)
    full = Image.fromarray(smooth).resize((64, 64), Image.Resampling.BOX)
    film = load_film(tmp_path / "film.jpg", 64).astype(int)
    assert np.abs(film - np.asarray(full).astype(int)).max() <= limit


def test_fits(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200  # the central square is bright, the sides are black
    Image.fromarray(wide).save(tmp_path / "film.png")
    squash, crop, pad = (load_film(tmp_path / "film.png", 10, fit) for fit in images.FITS)
    assert (crop == 200).all()
    assert (pad[:3] == 0).all()
    assert (pad[7:] == 0).all()
    assert pad[5, 5] > 190
    assert squash[:, 5].min() > 190
    assert squash[:, 0].max() < 10
    with pytest.raises(ImageError, match="fit is 'stretch'"):
        load_film(tmp_path / "film.png", 10, "stretch")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["grey.png", "grey.jpg", "colour.jpg", "palette.png", "deep.png"])
def test_films_stored_turned_are_upright(tmp_path, name, orientation):
    upright = np.zeros((64, 32), np.uint8)
    upright[:16, :16] = 240  # a corner: each of the eight ways shows another film
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    way = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(back)  # EXIF's number -> Pillow's
    stored = Image.fromarray(upright)
    stored = stored if way is None else stored.transpose(Image.Transpose(way))
    if name.startswith("deep"):
        stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    mode = {"colour.jpg": "RGB", "palette.png": "P"}.get(name)
    stored = stored.convert(mode) if mode else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif)
    np.testing.assert_allclose(load_image(tmp_path / name), upright / 255, atol=0.05)
    expected = np.asarray(Image.fromarray(upright).resize((16, 16), Image.Resampling.BOX))
    film = load_film(tmp_path / name, 16).astype(int)
    assert np.abs(film - expected).max() < 30


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_turns_nothing(tmp_path, ramp):
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (b"Exif\0\0nothing", exif.tobytes()[:-9], b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        Image.fromarray(ramp).save(tmp_path / "film.png", exif=data)
        images.check_image(tmp_path / "film.png")
        np.testing.assert_array_equal(load_film(tmp_path / "film.png", 16), ramp)


def test_extreme_shapes_do_not_vanish(tmp_path):
    Image.fromarray(np.full((1, 500), 99, np.uint8)).save(tmp_path / "film.png")
    for fit in images.FITS:
        assert load_film(tmp_path / "film.png", 16, fit).max() == 99


def test_many_films_keep_their_order(tmp_path):
    paths = [tmp_path / f"{value}.png" for value in (7, 200, 90)]
    for path in paths:
        save_png(path, np.full((8, 8), int(path.stem), np.uint8))
    films = load_films(paths, 4)
    assert films.shape == (3, 4, 4)
    assert films[:, 0, 0].tolist() == [7, 200, 90]
    assert load_films([], 4).shape == (0, 4, 4)


def test_a_400_megapixel_claim_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    claim_png(tmp_path / "bomb.png", 20000, 20000)
    with pytest.raises(ImageError, match="100,000,000 pixels"):
        load_image(tmp_path / "bomb.png")
    claim_png(tmp_path / "small.png", 300, 400)
    with pytest.raises(ImageError, match=r"300 x 400 is more than 100,000 pixels"):
        load_image(tmp_path / "small.png", max_pixels=100_000)


def test_damaged_files(tmp_path, ramp):
    big = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for name in ("film.png", "film.jpg"):
        Image.fromarray(big).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ImageError, match="truncated or damaged"):
            load_image(tmp_path / name)
        with pytest.raises(ImageError, match="truncated or damaged"):
            images.check_image(tmp_path / name, decode=False)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(ramp).save(tmp_path / "film.gif")
    Image.fromarray(ramp).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, reason in {
        "empty.png": "zero bytes",
        "text.png": "not a PNG or JPEG, nor DICOM",
        "film.gif": "not a PNG or JPEG, nor DICOM",
        "folder.png": "a folder",
        "none.png": "no such file",
        "cmyk.jpg": "mode CMYK",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
        assert name not in caught.value.reason


def test_every_cut_of_a_file_is_refused_or_read(tmp_path, ramp):
    """Whatever is cut off, the answer is an image or an ImageError, nothing else."""
    for name in ("film.png", "film.jpg"):
        Image.fromarray(ramp).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:length])
            with contextlib.suppress(ImageError):
                assert load_image(tmp_path / name).shape == (16, 16)


def test_unit_to_sd_and_back():
    unit = np.random.default_rng(0).random((2, 5, 4)).astype(np.float32)
    sd = images.unit_to_sd(unit)
    assert sd.shape == (2, 3, 5, 4)
    assert sd.dtype == torch.float32
    np.testing.assert_allclose(sd[:, 1].numpy(), unit * 2 - 1, atol=1e-6)
    np.testing.assert_allclose(images.sd_to_unit(sd).numpy(), unit, atol=1e-6)
    assert torch.equal(images.unit_to_sd(torch.from_numpy(unit)), sd)


def test_sd_to_unit_clamps_and_averages():
    sd = torch.tensor([[-1.4, 1.3], [0.0, 0.5]])[None, None].repeat(1, 3, 1, 1)
    np.testing.assert_allclose(images.sd_to_unit(sd), [[[0, 1], [0.5, 0.75]]])
    mixed = torch.tensor([-1.0, 0.0, 0.4])[None, :, None, None]
    np.testing.assert_allclose(images.sd_to_unit(mixed).item(), 0.4, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        np.full((1, 2, 2), 255.0),
        np.full((1, 2, 2), -1.0),
        np.full((1, 2, 2), np.nan),
        np.zeros((1, 2, 2), np.uint8),
        np.zeros((2, 2)),
    ],
)
def test_unit_to_sd_refuses_other_ranges(wrong):
    with pytest.raises(ImageError, match=r"unit_to_sd|uint8_to_unit"):
        images.unit_to_sd(wrong)


@pytest.mark.parametrize("value", [255.0, -1024.0, float("nan"), float("inf")])
def test_sd_to_unit_refuses_other_ranges(value):
    with pytest.raises(ImageError, match=r"images span .* \[-1, 1\] is needed"):
        images.sd_to_unit(torch.full((1, 3, 2, 2), value))


def test_uint8_conversions():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(images.unit_to_uint8(images.uint8_to_unit(every)), every)
    halves = np.array([0.5 / 255, 1.5 / 255, -0.2, 1.2])
    assert images.unit_to_uint8(halves).tolist() == [1, 2, 0, 255]
    assert images.unit_to_uint8(torch.tensor([1.0], requires_grad=True)).tolist() == [255]
    for wrong in (every, np.array([np.nan])):
        with pytest.raises(ImageError):
            images.unit_to_uint8(wrong)
    with pytest.raises(ImageError):
        images.uint8_to_unit(np.array([0.5]))


def test_save_png(tmp_path, ramp):
    path = tmp_path / "new" / "film.png"
    save_png(path, ramp / 255, text={"prompt": "chest x-ray", "step": 3})
    assert Image.open(path).text == {"prompt": "chest x-ray", "step": "3"}
    np.testing.assert_array_equal(load_film(path, 16), ramp)
    for wrong in (np.full((2, 2), 9.0), np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2), int)):
        with pytest.raises(ImageError):
            save_png(path, wrong)
    with pytest.raises(ImageError):
        save_png(path, np.zeros((2, 2, 3), np.uint16))
    assert [file.name for file in path.parent.iterdir()] == ["film.png"]


def test_save_png_in_16_bits(tmp_path):
    dark = np.random.default_rng(0).random((16, 16)) / 40  # the bits used are no measure of it
    path = tmp_path / "film.png"
    save_png(path, images.unit_to_uint16(dark), {"Description": "SYNTHETIC"})
    stored = Image.open(path)
    assert (stored.mode, stored.text["Description"]) == ("I;16", "SYNTHETIC")
    np.testing.assert_allclose(load_image(path), dark, atol=0.5 / 65535 + 1e-7)
    assert images.unit_to_uint16(np.array([0.0, 0.5, 1.2])).tolist() == [0, 32768, 65535]
    every = np.arange(256, dtype=np.uint8)  # what an edit leaves alone is the same in 16 bits
    wide = images.unit_to_uint16(images.uint8_to_unit(every))
    np.testing.assert_array_equal(wide, every.astype(np.uint16) * 257)
