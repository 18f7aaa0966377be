"""Radiographs in and out of files, and the ranges they are held in.

Section 3.1 of the paper works at 512 x 512. Three ranges exist and every function names its own:
  uint8  (H, W) in [0, 255]      on disk and in memory
  unit   (H, W) in [0, 1]        float32, one grey channel: metrics, figures
  sd     (B, 3, H, W) in [-1, 1] what Stable Diffusion's VAE takes and gives
B batch, H = W = image size. PNG, JPEG and DICOM are opened, never more than max_pixels of them.
Used by notebooks 01 to 06.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from prism_nb import dicom
from prism_nb.files import atomic_path

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG")
MODES_16 = ("I;16", "I;16B", "I;16L", "I")  # "I" is how older Pillow opens a 16-bit PNG
MODES_8 = ("L", "RGB", "RGBA", "LA", "La", "P", "PA", "1")
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
FITS = ("squash", "crop", "pad")
FULL_SCALE = "Full scale"  # a text chunk: the brightest value that the pixels of a file can have

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError)
_BROKEN += (struct.error, zlib.error)  # everything Pillow raises on a damaged file
_BROKEN_EXIF = (*_BROKEN, ArithmeticError, AttributeError, LookupError, TypeError)


class ImageError(ValueError):
    """An image that cannot be used; `reason` is the message without the path."""

    def __init__(self, reason, path=None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


def load_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a PNG, JPEG or DICOM file as one grey channel.

    Returns float32 (H, W) in [0, 1]. 16-bit files are divided by their full scale: the one they
    say, else that of the bits they use (10, 12, 14 or 16); alpha is laid over black, and what EXIF
    says is stored turned is turned back.
    Raises ImageError for a missing, damaged, over-large or unsupported file.
    """
    with _open(path, max_pixels) as image:
        return _grey(image, path)


def load_film(
    path: Path | str, size: int, fit: str = "squash", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read a film at the size the models work at.

    Returns uint8 (size, size). fit: squash (ignore the aspect ratio), crop (the central square)
    or pad (whole film on black). Large JPEGs are decoded at a reduced scale, never below size.
    Raises ImageError as load_image does.
    """
    if fit not in FITS:
        raise ImageError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}.")
    with _open(path, max_pixels) as image:
        image.draft("L", (size, size))  # JPEG only: the decoder halves 1 to 3 times
        if image.mode == "L" and "transparency" not in image.info:  # grey as it is
            _load(image, path)
        else:
            image = Image.fromarray(unit_to_uint8(_grey(image, path)))
        return np.array(resize(image, size, fit))


def load_films(paths: Iterable[Path | str], size: int, fit: str = "squash") -> np.ndarray:
    """Read many films: uint8 (N, size, size), in the order of paths."""
    paths = list(paths)
    films = np.empty((len(paths), size, size), dtype=np.uint8)

    def read(index):
        films[index] = load_film(paths[index], size, fit)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing release the GIL
        list(pool.map(read, range(len(paths))))
    return films


def check_image(path: Path | str, decode: bool = True, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError if the file could not be used; decode=False looks at head and end only."""
    with _open(path, max_pixels, decode) as image:
        if decode or not _has_end(path, image.format):  # some writers put notes behind the end
            _load(image, path)


def _has_end(path, kind):
    end = ENDS.get(kind, b"")
    with open(path, "rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


def _open(path, max_pixels, decode=True):
    """Open a file lazily: only its header is read, so that bombs are refused before decoding.

    A DICOM file is what Pillow cannot open; it becomes an image of mode F, decoded if decode.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ImageError("the file has zero bytes.", path)
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise ImageError("there is no such file.", path) from None
    except IsADirectoryError:
        raise ImageError("this is a folder, not an image.", path) from None
    except PermissionError:
        raise ImageError("reading it is not permitted.", path) from None
    except Image.UnidentifiedImageError:
        if dicom.is_dicom(path):
            return _open_dicom(path, max_pixels, decode)
        raise ImageError(
            "this is not a PNG or JPEG, nor DICOM, or its header is damaged.", path
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"it claims more than {max_pixels:,} pixels.", path) from None
    except ImageError:
        raise
    except _BROKEN as error:
        raise ImageError(f"the header cannot be read ({error}).", path) from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageError(f"{width} x {height} is more than {max_pixels:,} pixels.", path)
    if image.mode not in MODES_8 + MODES_16:
        mode = image.mode
        image.close()
        raise ImageError(f"mode {mode} is not supported; save it as grey or RGB.", path)
    return image


def _open_dicom(path, max_pixels, decode):
    try:
        if decode:
            return Image.fromarray(dicom.read_film(path, max_pixels))  # in [0, 1]
        dicom.check_film(path, max_pixels)
    except dicom.DicomError as error:
        raise ImageError(str(error), path) from None
    return Image.new("F", (1, 1))


def _load(image, path):
    """Decode, and turn upright what EXIF says is stored turned."""
    try:
        image.load()
    except _BROKEN as error:
        raise ImageError(f"truncated or damaged ({error}).", path) from None
    with contextlib.suppress(*_BROKEN_EXIF):  # what cannot be read turns nothing
        ImageOps.exif_transpose(image, in_place=True)


def _grey(image, path):
    """Decode to float32 (H, W) in [0, 1]."""
    _load(image, path)
    if image.mode in MODES_16:  # convert("L") would clip everything above 255
        values = np.asarray(image).astype(np.float32)
        return np.clip(values / _full_scale(values.max(), image.info), 0, 1)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "La"):
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        grey = np.asarray(image.convert("RGB").convert("L"))
        return grey.astype(np.float32) / 255 * (alpha.astype(np.float32) / 255)
    return np.asarray(image.convert("L")).astype(np.float32) / 255


def _full_scale(maximum, info):
    """What a 16-bit file says, or the bits guessed from its maximum: detectors use 10 to 16."""
    if info.get(FULL_SCALE) == "65535":
        return 65535
    return next((2**bits - 1 for bits in (8, 10, 12, 14) if maximum < 2**bits), 65535)


def resize(image: Image.Image, size: int, fit: str = "squash") -> Image.Image:
    """Make a grey image square as fit says: area averages, then Lanczos; bilinear to grow."""
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    grows = max(image.size) < size
    how = Image.Resampling.BILINEAR if grows else Image.Resampling.LANCZOS
    if fit != "pad":
        return image.resize((size, size), how, reducing_gap=3.0)
    scale = size / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("L", (size, size), 0)
    corner = (size - inner[0]) // 2, (size - inner[1]) // 2
    canvas.paste(image.resize(inner, how, reducing_gap=3.0), corner)
    return canvas


def unit_to_sd(images):
    """Turn unit images into what the VAE takes: the grey channel three times, in [-1, 1].

    images: numpy or torch (B, H, W) in [0, 1]; returns torch (B, 3, H, W) in [-1, 1].
    Raises ImageError for another shape or range.
    """
    import torch

    images = torch.as_tensor(images)
    if images.ndim != 3:
        raise ImageError(f"unit_to_sd takes (B, H, W); it was given {tuple(images.shape)}.")
    _check_range(images, 0, 1, "[0, 1]", "uint8_to_unit")
    return (images * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)  # (B, 3, H, W)


def sd_to_unit(images):
    """Turn the VAE's output into unit images: mean over channels, clamped.

    images: torch (B, 3, H, W) in [-1, 1]; a decoder may overshoot, so up to [-8, 8] is taken.
    Returns torch (B, H, W) in [0, 1]. Raises ImageError for another shape or range.
    """
    if images.ndim != 4:
        raise ImageError(f"sd_to_unit takes (B, 3, H, W); it was given {tuple(images.shape)}.")
    _check_range(images, -8, 8, "[-1, 1]", "unit_to_sd")
    return (images.mean(dim=1) / 2 + 0.5).clamp(0, 1)  # (B, H, W)


def _check_range(images, low, high, needed, helper):
    if not images.is_floating_point():
        raise ImageError(f"images are {images.dtype}; floats in {needed} are needed. See {helper}.")
    if images.numel() == 0:
        return
    smallest, largest = images.min().item(), images.max().item()
    if not (low - 1e-3 <= smallest and largest <= high + 1e-3):  # NaN fails this as well
        raise ImageError(
            f"images span [{smallest:.4g}, {largest:.4g}]; {needed} is needed. See {helper}."
        )


def uint8_to_unit(images: np.ndarray) -> np.ndarray:
    """Turn uint8 in [0, 255] into float32 in [0, 1], any shape, numpy."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ImageError(f"images are {images.dtype}; uint8 in [0, 255] is needed.")
    return images.astype(np.float32) / 255


def unit_to_uint8(images) -> np.ndarray:
    """Turn [0, 1] (numpy, or torch on any device) into uint8: clipped, halves rounded up."""
    return _unit_to_integers(images, np.uint8)


def unit_to_uint16(images) -> np.ndarray:
    """Turn [0, 1] (numpy, or torch on any device) into uint16, as unit_to_uint8 does."""
    return _unit_to_integers(images, np.uint16)


def _unit_to_integers(images, dtype):
    if hasattr(images, "detach"):
        images = images.detach().float().cpu().numpy()
    images = np.asarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise ImageError(f"images are {images.dtype}; floats in [0, 1] are needed.")
    if not np.isfinite(images).all():
        raise ImageError("images hold NaN or infinity; finite values in [0, 1] are needed.")
    return np.floor(np.clip(images, 0, 1) * np.iinfo(dtype).max + 0.5).astype(dtype)


def save_png(path: Path | str, image, text: dict | None = None) -> None:
    """Write a film as PNG, atomically, with text chunks for its provenance.

    image: uint8, or floats in [0, 1] (written as uint8); (H, W) grey or (H, W, 3) colour; or uint16
    (H, W), written in 16 bits with its full scale. text: dict of strings.
    """
    if hasattr(image, "detach"):
        image = image.detach().float().cpu().numpy()
    image = np.asarray(image)
    if image.dtype not in (np.uint8, np.uint16):
        _check_unit(image)
        image = unit_to_uint8(image)
    colour = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if image.ndim != 2 and not colour:
        raise ImageError(f"save_png takes (H, W) or (H, W, 3); it was given {image.shape}.", path)
    full_scale = {FULL_SCALE: "65535"} if image.dtype == np.uint16 else {}
    chunks = PngImagePlugin.PngInfo()
    for key, value in {**full_scale, **(text or {})}.items():
        chunks.add_text(str(key), str(value))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunks)


def _check_unit(image):
    if image.size and not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
        raise ImageError(
            f"the image spans [{image.min():.4g}, {image.max():.4g}]; [0, 1] is needed."
        )
