"""Radiographs in DICOM files: read as one grey channel, and written as derived images.

Reading keeps the standard's order: modality table or rescale, then the first VOI table or window,
then MONOCHROME1 is turned over. All three make one table over the stored values (16 bits at most),
which is looked up once a pixel. Film (H, W) in [0, 1].
What a header says of the patient stays in the file: films and patients get names that are hashes of
unique ids. Needs the extra "dicom": pydicom, and GDCM for JPEG Lossless and JPEG 2000.
Used by images.py, layouts.py and `prism-nb edit`.
"""

import datetime
import hashlib
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from prism_nb.files import atomic_path, plain

MODALITIES = ("", "CR", "DX", "RG", "OT")  # computed, digital, film; OT: secondary captures
SUFFIXES = (".dcm", ".dicom", "")
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # not compressed
AGE_UNITS = {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}  # how many of each make a year
SYNTHETIC = "SYNTHETIC counterfactual, made by prism_nb"
PROVENANCE_CHARACTERS = 10_240  # what an element of type LT holds

_QUIET = logging.NullHandler()
_BROKEN = (OSError, ValueError, EOFError, AttributeError, KeyError, IndexError, TypeError)
_BROKEN += (RuntimeError, NotImplementedError, OverflowError, struct.error, zlib.error)


class DicomError(ValueError):
    """A DICOM file that cannot be used; the message is the reason, without the path."""


def is_dicom(path: Path | str) -> bool:
    """Say whether a file carries the mark of DICOM, whatever its name."""
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _may_be_dicom(path):
    try:
        return is_dicom(path)
    except OSError:  # it is to be rejected with its reason, not passed over
        return True


def read_film(path: Path | str, max_pixels: int) -> np.ndarray:
    """Read a radiograph as its writer meant it to be seen: float32 (H, W) in [0, 1], air black.

    Without a VOI table or window the darkest pixel becomes 0 and the brightest 1, padding aside.
    Raises DicomError for what is no grey single frame of 8 to 16 bits, or cannot be decoded.
    """
    dataset = _open(path)
    _check(dataset, max_pixels)
    try:
        pixels = dataset.pixel_array.astype(np.int32)  # (H, W)
        first, last = _stored_range(dataset)
        pixels = np.clip(pixels, first, last)
        shown = _display(dataset, np.arange(first, last + 1), pixels)
    except _BROKEN as error:
        raise DicomError(f"its pixels cannot be decoded ({_one_line(error)}).") from None
    return shown[pixels - first]


def check_film(path: Path | str, max_pixels: int) -> None:
    """Raise DicomError if the header says that the file could not be used; no pixel is decoded."""
    _check(_open(path), max_pixels)


def need_pydicom():
    """The module pydicom; DicomError, one line, where it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise DicomError("DICOM needs pydicom: pip install 'prism_nb[dicom]'.") from None
    return pydicom


def _open(path):
    """Read the header; pixels and other large elements only when they are asked for."""
    pydicom = need_pydicom()
    logging.getLogger("pydicom").addHandler(_QUIET)  # what it logs is in our errors already
    try:
        return pydicom.dcmread(path, defer_size=1024)
    except (*_BROKEN, pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException) as e:
        raise DicomError(f"the DICOM header cannot be read ({_one_line(e)}).") from None


def _check(dataset, max_pixels):
    """Refuse what is no radiograph, before anything is decoded."""
    try:
        reason = _fault(dataset, max_pixels) or _codec_fault(dataset)
    except _BROKEN as error:
        reason = f"the DICOM header is damaged ({_one_line(error)})."
    if reason:
        raise DicomError(reason)


def _fault(dataset, max_pixels):
    if "PixelData" not in dataset:
        return f"it has no pixels: it is {dataset.get('Modality') or 'no image'}, not a film."
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        return f"it has {frames} frames; a film has one."
    colours = dataset.PhotometricInterpretation
    if dataset.SamplesPerPixel != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        return f"it is in colour ({colours}); MONOCHROME1 or MONOCHROME2 is needed."
    if not 8 <= dataset.BitsStored <= 16:
        return f"it has {dataset.BitsStored} bits a pixel; 8 to 16 are needed."
    if dataset.Rows * dataset.Columns > max_pixels:
        return f"{dataset.Columns} x {dataset.Rows} is more than {max_pixels:,} pixels."
    stored = dataset.get_item("PixelData", keep_deferred=True)
    native = dataset.file_meta.TransferSyntaxUID in NATIVE  # pydicom finds the others' end itself
    if native and stored.value_tell + stored.length > os.path.getsize(dataset.filename):
        return "it is cut short: its pixels go beyond its end."
    return ""


def _codec_fault(dataset):
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGExtended12Bit

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return f"its pixels are stored as {syntax.name}, which cannot be decoded; convert it."
    plugins = decoder.available_plugins
    if syntax == JPEGExtended12Bit and dataset.BitsStored > 8 and "pylibjpeg" not in plugins:
        codec = "pip install pylibjpeg-libjpeg (its licence is the GPL)"
        return f"its pixels are {syntax.name} in {dataset.BitsStored} bits; for that: {codec}."
    if decoder.is_available:
        return ""
    return f"its pixels are {syntax.name}; for that codec: pip install 'prism_nb[dicom]'."


def _stored_range(dataset):
    """The smallest and the largest value that a stored pixel can have."""
    values = 2**dataset.BitsStored
    return (-values // 2, values // 2 - 1) if dataset.PixelRepresentation else (0, values - 1)


def _display(dataset, stored, pixels):
    """What each stored value (V,) looks like, in a film of these pixels: float32 in [0, 1].

    pydicom's own windowing is not used: a negative rescale slope turns it over, and a VOI table
    of 8 bits overflows in it.
    """
    if dataset.get("ModalityLUTSequence"):
        values, _ = _look_up(dataset, dataset.ModalityLUTSequence[0], stored)
    else:
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        values = stored * float(1 if slope is None else slope) + float(intercept or 0)
    width = _first(dataset.get("WindowWidth"))
    if dataset.get("VOILUTSequence"):
        shown, largest_entry = _look_up(dataset, dataset.VOILUTSequence[0], values)
        shown = shown / largest_entry
    elif width > 0 and dataset.get("WindowCenter") is not None:
        function = dataset.get("VOILUTFunction", "LINEAR")
        shown = _window(values, _first(dataset.WindowCenter), width, function)
    else:
        used = values[
            np.isin(stored, pixels) & (stored != dataset.get("PixelPaddingValue", np.inf))
        ]
        low, high = (used.min(), used.max()) if used.size else (0, 1)
        shown = (values - low) / max(float(high - low), 1e-6)
    shown = np.clip(shown, 0, 1).astype(np.float32)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _look_up(dataset, item, values):
    """Send values through a modality or VOI table; and the largest entry it may have (PS3.3 C.11).

    What lies below its first value, or beyond the last, takes the first or last entry.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = item.LUTData
    if isinstance(entries, bytes):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries, "u1" if len(entries) == count else f"{order}u2")
    entries = np.asarray(entries, np.float64)[: count or 2**16]
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)
    return entries[index], 2**bits - 1


def _window(values, center, width, function):
    """A window's output in [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return (values - center) / max(width, 1e-6) + 0.5


def _first(value):
    """The first of one or several numbers; 0 if there is none."""
    several = not isinstance(value, str | float | int | None)
    return float((value[0] if several else value) or 0)


def _one_line(error):
    return " ".join(str(error).split())[:200]


def describe_folder(folder: Path | str) -> list[dict]:
    """Describe the DICOM files under a folder, sorted: what is needed of each, and not whose it is.

    Rows: path (in the folder), film_id (hash of the SOP Instance UID), patient_id (named after one
    of the patient's films), has_patient (False: it has no PatientID, so that a study's films are
    taken to be a patient's), Sex, Age ("90" from 90 on), view, reason to reject it ("" = none).
    """
    folder, patients, rows = Path(folder), {}, []
    for path in sorted(each for each in folder.rglob("*") if suffix(each) in SUFFIXES):
        if not path.is_file() or path.name == "DICOMDIR":
            continue
        if suffix(path) or _may_be_dicom(path):
            row, patient = _describe(path)
            rows.append({"path": path.relative_to(folder).as_posix(), **row})
            patients.setdefault(patient or row["film_id"], []).append(rows[-1])
    for films in patients.values():
        name = min(
            film["film_id"] for film in films
        )  # a hash of a hospital's number can be guessed
        for film in films:
            film["patient_id"] = name.replace("film", "patient")
    seen = set()
    for row in rows:
        if row["film_id"] in seen:
            row["reason"] = row["reason"] or "another file holds the same SOP Instance UID."
        seen.add(row["film_id"])
    return rows


def suffix(path: Path) -> str:
    """The suffix in lower case; the end of a name that is a unique id, such as 1.2.840, is none."""
    return "" if path.suffix[1:].isdigit() else path.suffix.lower()


def _describe(path):
    """One row of describe_folder, and the patient's (or study's) id, which goes no further."""
    row = {"film_id": _hash(path.as_posix()), "has_patient": False}
    row |= {"Sex": "", "Age": "", "view": "", "reason": ""}
    try:
        dataset = _open(path)
        row["film_id"] = _hash(str(dataset.get("SOPInstanceUID") or path.as_posix()))
        _check(dataset, max_pixels=2**62)  # images.py says how large a film may be
        if dataset.get("Modality", "") not in MODALITIES:
            raise DicomError(f"the modality is {dataset.Modality}; CR or DX is needed.")
        row["Sex"], row["view"] = dataset.get("PatientSex") or "", dataset.get("ViewPosition") or ""
        row["Age"] = _years(dataset.get("PatientAge") or "")
    except DicomError as error:
        return row | {"reason": str(error)}, ""
    patient = str(dataset.get("PatientID") or "").strip()  # PS3.5 6.2: such spaces say nothing
    row["has_patient"] = patient != ""
    return row, patient or str(dataset.get("StudyInstanceUID") or "")


def _years(age):
    """Whole years of a DICOM age such as 061Y or 003M; "" if it has none; at most 90."""
    number, unit = age[:-1], age[-1:]
    if not number.isdigit() or unit not in AGE_UNITS:
        return ""
    return str(min(int(int(number) / AGE_UNITS[unit]), 90))


def _hash(text):
    return f"film_{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def save_secondary_capture(
    path: Path | str,
    film: np.ndarray,
    about: dict,
    patient: str = "",
    burned_in: bool = True,
    source: Path | str | None = None,
) -> None:
    """Write a film as a derived Secondary Capture, atomically: new ids, nothing of the source.

    film: uint8 or uint16 (H, W), 0 black. about: how it was made, kept as JSON in Image Comments.
    patient: a pseudonym, or empty. burned_in: False only if the source holds no text or marker,
    for an edit leaves them where they are. source: a DICOM file to refer to, by its unique ids.
    Raises DicomError for another film, too long an about, or where pydicom is missing.
    """
    need_pydicom()
    film = np.asarray(film)
    if film.ndim != 2 or film.dtype not in (np.uint8, np.uint16):
        raise DicomError(
            f"the film is {film.dtype} {film.shape}; uint8 or uint16 (H, W) is needed."
        )
    comments = json.dumps(plain(about), ensure_ascii=False)
    if len(comments) > PROVENANCE_CHARACTERS:
        raise DicomError(f"about has {len(comments)} characters; {PROVENANCE_CHARACTERS} fit.")
    dataset = _derived(film)
    dataset.PatientName = dataset.PatientID = patient
    dataset.BurnedInAnnotation = "YES" if burned_in else "NO"
    dataset.ImageComments = comments
    if source is not None:
        _refer(dataset, _open(source))
    with atomic_path(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _derived(film):
    """The data set of a Secondary Capture (PS3.3 A.8.1): what it is, and of nobody."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset, bits, now = Dataset(), 8 * film.dtype.itemsize, datetime.datetime.now()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elements = {
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": SecondaryCaptureImageStorage,
        "ImageType": ["DERIVED", "SECONDARY"],
        "SyntheticData": "YES",
        "ConversionType": "WSD",  # made on a workstation
        "Modality": "OT",
        "Manufacturer": "prism_nb",
        "SeriesDescription": "SYNTHETIC counterfactual",
        "DerivationDescription": f"{SYNTHETIC}; it shows no patient",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "no element of the source was copied",
        "ContentDate": now.strftime("%Y%m%d"),
        "ContentTime": now.strftime("%H%M%S"),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": film.shape[0],
        "Columns": film.shape[1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "WindowCenter": 2 ** (bits - 1),  # the whole range: shown as it is stored
        "WindowWidth": 2**bits,
    }
    elements |= {name: generate_uid() for name in ("SOPInstanceUID", "StudyInstanceUID")}
    elements |= {"SeriesInstanceUID": generate_uid(), "InstanceNumber": 1, "SeriesNumber": 1}
    empty = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
    empty += ("AccessionNumber", "ReferringPhysicianName", "PatientOrientation", "Laterality")
    for name, value in {**elements, **dict.fromkeys(empty, "")}.items():
        setattr(dataset, name, value)
    dataset.PixelData = film.astype(film.dtype.newbyteorder("<")).tobytes()
    return dataset


def _refer(dataset, source):
    """Name the image that a film was made of, and its study (PS3.3 C.12.4 and C.12.2)."""
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
    study, series, kind, instance = (source.get(name) for name in names)
    if not (study and series and kind and instance):
        return
    image = {"ReferencedSOPClassUID": kind, "ReferencedSOPInstanceUID": instance}
    meaning = "Source image for image processing operation"
    purpose = {"CodeValue": "121322", "CodingSchemeDesignator": "DCM", "CodeMeaning": meaning}
    purpose = {"PurposeOfReferenceCodeSequence": [_item(**purpose)]}
    dataset.SourceImageSequence = [_item(**image, **purpose)]
    series = _item(SeriesInstanceUID=series, ReferencedInstanceSequence=[_item(**image)])
    study = _item(StudyInstanceUID=study, ReferencedSeriesSequence=[series])
    dataset.StudiesContainingOtherReferencedInstancesSequence = [study]
    how = dataset.DeidentificationMethod
    dataset.DeidentificationMethod = [how, "the source is referred to by its unique ids"]


def _item(**elements):
    from pydicom.dataset import Dataset

    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item
