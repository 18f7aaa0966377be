"""DICOM: what a film looks like by the standard, what is no film, and films written as derived."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from prism_nb import dicom, images
from prism_nb.dicom import DicomError, describe_folder, read_film, save_secondary_capture
from prism_nb.images import ImageError

pydicom = pytest.importorskip("pydicom")
uid = pydicom.uid

RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # 12 bits


def write(path, pixels=RAMP, syntax=uid.ExplicitVRLittleEndian, frame=None, **elements):
    """Write a digital radiograph with a header full of names; elements overrule, None deletes."""
    from pydicom.dataset import Dataset, FileMetaDataset

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    bits = 8 * pixels.dtype.itemsize
    about = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
        "SOPInstanceUID": uid.generate_uid(),
        "PatientName": "Doe^Jane",
        "PatientID": "MRN-0042",
        "PatientSex": "F",
        "PatientAge": "061Y",
        "Modality": "DX",
        "ViewPosition": "PA",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": bits,
        "BitsStored": min(bits, 12),
        "HighBit": min(bits, 12) - 1,
        "PixelRepresentation": int(np.issubdtype(pixels.dtype, np.signedinteger)),
    }
    for name, value in {**about, **elements}.items():
        if value is not None:
            setattr(dataset, name, value)
    if frame:
        dataset.PixelData = pydicom.encaps.encapsulate([frame])
        dataset["PixelData"].VR = "OB"
    else:
        dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def table(first, entries, bits, as_bytes=True):
    item = pydicom.dataset.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = np.asarray(entries, np.uint16).tobytes() if as_bytes else list(entries)
    item["LUTData"].VR = "OW" if as_bytes else "US"
    return pydicom.sequence.Sequence([item])


def film(tmp_path, pixels=RAMP, **elements):
    return read_film(write(tmp_path / "film.dcm", pixels, **elements), 10**6)


# what a film looks like


def test_without_a_window_the_film_spans_black_to_white(tmp_path):
    unit = film(tmp_path, RAMP + 5)
    assert (unit.dtype, unit.shape) == (np.float32, (16, 16))
    np.testing.assert_allclose(unit, RAMP / 4080, atol=1e-6)
    padded = RAMP.copy()
    padded[0] = 4095  # padding is no tissue: it does not stretch the range
    np.testing.assert_allclose(
        film(tmp_path, np.clip(padded, 256, 4095) // 2, PixelPaddingValue=2047)[1:],
        (RAMP[1:] - 256) / (4080 - 256),
        atol=1e-6,
    )
    assert (film(tmp_path, np.full((4, 4), 7, np.uint16)) == 0).all()  # flat


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_every_depth(tmp_path, bits):
    top = 2**bits - 1
    pixels = np.linspace(0, top, 256).astype(np.uint8 if bits == 8 else np.uint16).reshape(16, 16)
    unit = film(tmp_path, pixels, BitsStored=bits, HighBit=bits - 1)
    np.testing.assert_allclose(unit, pixels / top, atol=1e-6)
    assert len(np.unique(images.unit_to_uint8(unit))) == 256  # nothing is clipped


def test_windows(tmp_path):
    linear = film(tmp_path, WindowCenter=[1000, 50], WindowWidth=[401, 10])  # the first counts
    expected = np.clip((RAMP - 999.5) / 400 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(linear, expected, atol=1e-6)
    exact = film(tmp_path, WindowCenter=1000, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(exact, np.clip((RAMP - 1000.0) / 400 + 0.5, 0, 1), atol=1e-6)
    curve = film(tmp_path, WindowCenter=1000, WindowWidth=400, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(curve, 1 / (1 + np.exp(-(RAMP - 1000.0) / 100)), atol=1e-6)
    wide = film(tmp_path, WindowCenter=4096, WindowWidth=8192)  # twice the range: no white in it
    assert wide.max() == pytest.approx(0.498, abs=1e-3)
    none = film(tmp_path, WindowCenter=1000, WindowWidth=0)  # says nothing
    np.testing.assert_allclose(none, RAMP / 4080, atol=1e-6)


def test_windows_come_after_rescaling(tmp_path):
    halves = film(
        tmp_path, RescaleSlope=0.5, RescaleIntercept=-100, WindowCenter=400.5, WindowWidth=401
    )
    np.testing.assert_allclose(halves, np.clip((RAMP / 2 - 100 - 400) / 400 + 0.5, 0, 1), atol=1e-6)
    # A negative slope turns the film over once; a window after it must not do so again.
    over = film(
        tmp_path, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096
    )
    np.testing.assert_allclose(over, 1 - RAMP / 4095, atol=1e-6)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_tables_of_values(tmp_path, as_bytes):
    curve = np.round(255 * np.linspace(0, 1, 4000) ** 2).astype(int)  # from 10 on, in 8 bits
    unit = film(
        tmp_path, VOILUTSequence=table(10, curve, 8, as_bytes), WindowCenter=1, WindowWidth=2
    )
    expected = curve[np.clip(RAMP.astype(int) - 10, 0, 3999)] / 255  # a table goes before a window
    np.testing.assert_allclose(unit, expected, atol=1e-6)
    turned = np.arange(4095, -1, -1)
    unit = film(tmp_path, ModalityLUTSequence=table(0, turned, 12, as_bytes))
    np.testing.assert_allclose(unit, 1 - RAMP / 4080, atol=1e-6)


def test_monochrome1_is_turned_over_in_the_windows_range(tmp_path):
    window = {"WindowCenter": 1000, "WindowWidth": 401}
    straight = film(tmp_path, **window)
    turned = film(tmp_path, PhotometricInterpretation="MONOCHROME1", **window)
    np.testing.assert_allclose(turned, 1 - straight, atol=1e-6)
    plain = film(tmp_path, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(plain, 1 - RAMP / 4080, atol=1e-6)


def test_signed_pixels_and_bits_beyond_those_stored(tmp_path):
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    unit = film(tmp_path, signed, WindowCenter=0, WindowWidth=4096)
    np.testing.assert_allclose(unit, (signed + 2048) / 4095, atol=1e-3)
    assert film(tmp_path, RAMP | 0x1000).max() <= 1  # an old overlay in bit 12


# compression


def lossless_jpeg(pixels, bits):
    """Encode as JPEG Lossless, first-order prediction (ITU T.81, process 14, selection value 1)."""
    rows, columns = pixels.shape
    out = []
    for y, x in np.ndindex(rows, columns):
        left, above = pixels[y, x - 1], pixels[y - 1, x]
        guess = 2 ** (bits - 1) if x == y == 0 else above if x == 0 else left
        difference = (int(pixels[y, x]) - int(guess) + 2**15) % 2**16 - 2**15
        size = abs(difference).bit_length()
        out.append(f"{size:05b}")  # each of 17 sizes has a code of five bits
        if 0 < size < 16:
            out.append(f"{difference + (2**size - 1) * (difference < 0):0{size}b}")
    text = "".join(out)
    text += "1" * (-len(text) % 8)
    data = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)).replace(
        b"\xff", b"\xff\0"
    )

    def segment(mark, body):
        return bytes([0xFF, mark]) + (len(body) + 2).to_bytes(2, "big") + body

    size = bytes([bits]) + rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
    frame = segment(0xC3, size + bytes([1, 1, 0x11, 0]))
    codes = segment(0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)]))
    scan = segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    return b"\xff\xd8" + frame + codes + scan + data + b"\xff\xd9"


def compressed(path, pixels, bits, syntax, frame):
    """Write a film whose pixels are compressed, shown over their whole range."""
    whole = {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    return write(path, pixels, syntax, frame, BitsStored=bits, HighBit=bits - 1, **whole)


@pytest.mark.filterwarnings("ignore:End of file reached")
@pytest.mark.parametrize("bits", [12, 16])
def test_jpeg_lossless(tmp_path, bits, monkeypatch):
    pytest.importorskip("gdcm")
    decoder = pydicom.pixels.get_decoder(uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {"gdcm": decoder._available["gdcm"]})
    noise = np.random.default_rng(0).integers(0, 2**bits, (20, 17)).astype(np.uint16)
    frame, path = lossless_jpeg(noise, bits), tmp_path / "film.dcm"
    compressed(path, noise, bits, uid.JPEGLosslessSV1, frame)
    np.testing.assert_allclose(read_film(path, 10**6), noise / (2**bits - 1), atol=1e-6)
    path.write_bytes(path.read_bytes()[:-250])
    with pytest.raises(DicomError):
        read_film(path, 10**6)
    compressed(path, noise, bits, uid.JPEGLosslessSV1, frame[:-100])  # whole but for its pixels
    with pytest.raises(DicomError, match="cannot be decoded"):
        read_film(path, 10**6)


@pytest.mark.parametrize("bits", [12, 16])
def test_jpeg_2000(tmp_path, bits):
    noise = np.random.default_rng(0).integers(0, 2**bits, (20, 17)).astype(np.uint16)
    Image.fromarray(noise).save(stream := io.BytesIO(), "JPEG2000", no_jp2=True)
    path, frame = tmp_path / "film.dcm", stream.getvalue()
    compressed(path, noise, bits, uid.JPEG2000Lossless, frame)
    np.testing.assert_allclose(read_film(path, 10**6), noise / (2**bits - 1), atol=1e-6)


def test_lossy_jpeg_of_12_bits_is_refused_by_its_header(tmp_path, monkeypatch):
    decoder = pydicom.pixels.get_decoder(uid.JPEGExtended12Bit)
    monkeypatch.delitem(decoder._available, "pylibjpeg", raising=False)
    path = write(tmp_path / "film.dcm", RAMP, uid.JPEGExtended12Bit, b"\xff\xd8")
    with pytest.raises(ImageError, match=r"JPEG Extended.* 12 bits.*pylibjpeg-libjpeg"):
        images.check_image(path, decode=False)


def test_a_missing_codec_is_named_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "film.dcm", RAMP, uid.JPEGLosslessSV1, lossless_jpeg(RAMP, 12))
    decoder = pydicom.pixels.get_decoder(uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=r"JPEG Lossless.*pip install 'prism_nb\[dicom\]'\.$"):
        images.check_image(path, decode=False)
    path = write(tmp_path / "film.dcm", RAMP, uid.MPEG2MPML, b"\0\0")
    with pytest.raises(ImageError, match=r"MPEG2.*cannot be decoded; convert it"):
        images.load_image(path)


def test_without_pydicom(tmp_path, monkeypatch):
    path = write(tmp_path / "film.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match=r"DICOM needs pydicom: pip install 'prism_nb\[dicom\]'"):
        images.load_image(path)


# what is no film


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"NumberOfFrames": 30}, "it has 30 frames; a film has one"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, r"in colour \(RGB\)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
        ({"BitsStored": 1}, "1 bits a pixel; 8 to 16"),
        ({"Rows": 30000, "Columns": 30000}, "30000 x 30000 is more than 100,000,000 pixels"),
        ({"Rows": None}, "header is damaged"),
    ],
)
def test_other_images_are_refused_by_their_header(tmp_path, elements, reason, monkeypatch):
    path = write(tmp_path / "film.dcm", **elements)
    monkeypatch.setattr(
        "pydicom.Dataset.pixel_array", property(lambda self: pytest.fail("decoded"))
    )
    for decode in (False, True):
        with pytest.raises(ImageError, match=reason):
            images.check_image(path, decode)


def test_files_without_pixels_and_damaged_ones(tmp_path):
    path = write(tmp_path / "film.dcm", np.zeros((64, 64), np.uint16), Modality="SR")
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(tmp_path / "report.dcm")
    with pytest.raises(ImageError, match="has no pixels: it is SR, not a film"):
        images.check_image(tmp_path / "report.dcm", decode=False)
    whole = path.read_bytes()
    for length in range(132, len(whole), 211):  # a film or an ImageError, nothing else
        path.write_bytes(whole[:length])
        try:
            assert images.load_image(path).shape == (64, 64)
        except ImageError:
            continue


def test_films_by_any_name_go_the_way_of_all_images(tmp_path):
    path = write(tmp_path / "IM0001", WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_allclose(images.load_image(path), RAMP / 4095, atol=1e-6)
    eight = images.load_film(path, 16)
    np.testing.assert_array_equal(eight, images.unit_to_uint8(RAMP / 4095))
    images.check_image(path)
    images.check_image(path, decode=False)


# a folder of them


def test_a_folder_is_described_without_whose_it_is(tmp_path):
    write(tmp_path / "DOE JANE/a.dcm")
    write(tmp_path / "DOE JANE/b", PatientAge="007M", ViewPosition="LL")
    write(tmp_path / "x/c.DICOM", PatientID="7", PatientAge="095Y", PatientSex=None)
    write(tmp_path / "x/d.dcm", PatientID=None, ViewPosition=None)
    write(tmp_path / "x/ct.dcm", Modality="CT")
    write(tmp_path / "x/many.dcm", NumberOfFrames=4)
    (tmp_path / "x/e.dcm").write_bytes(b"nothing")
    (tmp_path / "x/notes").write_text("no DICOM")
    (tmp_path / "x/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "x/same.dcm").write_bytes((tmp_path / "x/d.dcm").read_bytes())
    rows = {row["path"]: row for row in describe_folder(tmp_path)}
    assert list(rows) == sorted(rows)
    assert len(rows) == 8
    first, second = rows["DOE JANE/a.dcm"], rows["DOE JANE/b"]
    assert first["patient_id"] == second["patient_id"] != rows["x/c.DICOM"]["patient_id"]
    assert [rows[p]["Age"] for p in ("DOE JANE/a.dcm", "DOE JANE/b", "x/c.DICOM")] == [
        "61",
        "0",
        "90",
    ]
    assert (second["view"], rows["x/d.dcm"]["view"], rows["x/c.DICOM"]["Sex"]) == ("LL", "", "")
    reasons = {path: row["reason"] for path, row in rows.items() if row["reason"]}
    assert set(reasons) == {"x/ct.dcm", "x/many.dcm", "x/e.dcm", "x/same.dcm"}
    assert reasons["x/ct.dcm"] == "the modality is CT; CR or DX is needed."
    assert reasons["x/same.dcm"].startswith("another file holds the same SOP Instance UID")
    told = " ".join(str({**row, "path": ""}) for row in rows.values())
    assert not any(word in told for word in ("Doe", "DOE", "MRN", "0042", "Jane"))
    write(tmp_path / "y/1.2.840.113619.2.7")  # named by its unique id: a number is no suffix
    (tmp_path / "y/notes.1").write_text("no DICOM")
    assert [row["path"] for row in describe_folder(tmp_path / "y")] == ["1.2.840.113619.2.7"]
    os.replace(tmp_path / "x/c.DICOM", tmp_path / "x/z.dcm")  # names do not hang on the path
    moved = next(row for row in describe_folder(tmp_path) if row["path"] == "x/z.dcm")
    assert moved["film_id"] == rows["x/c.DICOM"]["film_id"]


def test_without_a_patients_id_the_films_of_a_study_are_of_one_patient(tmp_path):
    studies = [uid.generate_uid() for _ in range(2)]
    for name, study in zip("abc", [studies[0], studies[0], studies[1]], strict=True):
        write(tmp_path / f"{name}.dcm", PatientID=" ", StudyInstanceUID=study)
    write(tmp_path / "d.dcm", PatientID="")
    for name, patient in zip("ef", ("P1", " P1 "), strict=True):  # each of its own study
        write(tmp_path / f"{name}.dcm", PatientID=patient, StudyInstanceUID=uid.generate_uid())
    rows = describe_folder(tmp_path)
    a, b, c, d, e, f = (row["patient_id"] for row in rows)
    assert (a, e) == (b, f)
    assert len({a, c, d, e}) == 4
    assert [row["has_patient"] for row in rows] == [False] * 4 + [True] * 2
    assert not any(study in str(rows) for study in studies)


@pytest.mark.skipif(sys.platform != "linux", reason="no file that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_one_rejected_row(tmp_path):
    write(tmp_path / "a.dcm")
    (tmp_path / "IM0001").symlink_to("/proc/self/mem")
    rows = describe_folder(tmp_path)
    assert [row["path"] for row in rows if not row["reason"]] == ["a.dcm"]
    assert rows[0]["reason"].startswith("the DICOM header cannot be read")


def test_a_film_cut_short_is_found_by_its_header(tmp_path):
    path = write(tmp_path / "film.dcm", np.zeros((64, 64), np.uint16))
    images.check_image(path, decode=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ImageError, match="cut short"):
        images.check_image(path, decode=False)


# written


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(16, 16), (5, 3)])
def test_a_secondary_capture_is_whole_and_of_nobody(tmp_path, dtype, shape):
    drawn = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    about = {"T": "chest x-ray showing edema", "T'": "chest x-ray", "S_CLIP": 0.21, "ö": "ä\\b"}
    save_secondary_capture(tmp_path / "new/film.dcm", drawn, about, patient="P-17")
    read = pydicom.dcmread(tmp_path / "new/film.dcm")
    np.testing.assert_array_equal(read.pixel_array, drawn)
    scale = np.iinfo(dtype).max
    np.testing.assert_allclose(
        images.load_image(tmp_path / "new/film.dcm"), drawn / scale, atol=1e-6
    )
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID
    assert read.SOPClassUID == uid.SecondaryCaptureImageStorage
    assert list(read.ImageType) == ["DERIVED", "SECONDARY"]
    assert "SYNTHETIC" in read.SeriesDescription
    assert "SYNTHETIC" in read.DerivationDescription
    assert (read.SyntheticData, read.BurnedInAnnotation) == ("YES", "YES")
    assert (str(read.PatientName), read.PatientID) == ("P-17", "P-17")
    assert pydicom.dataset.json.loads(read.ImageComments) == about
    needed = "PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber"
    assert all(name in read and not read[name].value for name in needed.split())
    uids = (read.StudyInstanceUID, read.SeriesInstanceUID, read.SOPInstanceUID)
    assert len(set(uids)) == 3
    assert all(each.is_valid for each in uids)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["film.dcm"]


def test_secondary_captures_of_the_phantom_and_refusals(tmp_path):
    black = np.zeros((4, 4), np.uint8)
    for name in ("a.dcm", "b.dcm"):
        save_secondary_capture(tmp_path / name, black, {}, burned_in=False)
    first, second = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert first.BurnedInAnnotation == "NO"
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert (str(first.PatientName), first.PatientID) == ("", "")
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(DicomError, match=r"uint8 or uint16 \(H, W\) is needed"):
            save_secondary_capture(tmp_path / "c.dcm", wrong, {})
    with pytest.raises(DicomError, match="10240 fit"):
        save_secondary_capture(tmp_path / "c.dcm", black, {"T": "x" * 20_000})
    assert not (tmp_path / "c.dcm").exists()


def test_a_secondary_capture_refers_to_its_source_and_copies_nothing(tmp_path):
    uids = {name: uid.generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    source = write(tmp_path / "source.dcm", StationName="Ward 7", StudyDate="20200102", **uids)
    save_secondary_capture(tmp_path / "new.dcm", np.zeros((4, 4), np.uint8), {}, source=source)
    old, new = (pydicom.dcmread(tmp_path / name) for name in ("source.dcm", "new.dcm"))
    (image,) = new.SourceImageSequence
    assert image.ReferencedSOPInstanceUID == old.SOPInstanceUID
    assert image.ReferencedSOPClassUID == old.SOPClassUID
    assert image.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"  # source of processing
    (study,) = new.StudiesContainingOtherReferencedInstancesSequence  # another than its own
    assert study.StudyInstanceUID == old.StudyInstanceUID != new.StudyInstanceUID
    (series,) = study.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == old.SeriesInstanceUID != new.SeriesInstanceUID
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
    for told in ("Doe", "MRN", "061Y", "Ward", "20200102", "PA\n"):
        assert told not in str(new)
    assert "DX" not in (new.Modality, new.get("ViewPosition"))
    assert "the source is referred to by its unique ids" in new.DeidentificationMethod
    nameless = write(tmp_path / "nameless.dcm")  # without unique ids there is nothing to refer to
    save_secondary_capture(tmp_path / "new.dcm", np.zeros((4, 4), np.uint8), {}, source=nameless)
    assert "SourceImageSequence" not in pydicom.dcmread(tmp_path / "new.dcm")


def test_writing_needs_pydicom(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DicomError, match=r"^DICOM needs pydicom: pip install 'prism_nb\[dicom\]'"):
        save_secondary_capture(tmp_path / "c.dcm", np.zeros((4, 4), np.uint8), {})


def test_an_unmarked_file_is_no_dicom(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "film.png")
    assert not dicom.is_dicom(tmp_path / "film.png")
    (tmp_path / "short").write_bytes(b"DICM")
    assert not dicom.is_dicom(tmp_path / "short")
