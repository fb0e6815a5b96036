"""Data sets as they are distributed, made small, and a user's own; and what is none of them."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from frameworks import need
from PIL import Image, ImageFile
from scipy.io import savemat

from doconv_core.training.data import DATA_SETS, DataError, ImageData, as_data, open_data
from doconv_core.training.data.sources import GROUPS, Arrays, Names, Parquet, converted


def images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(array, form="PNG"):
    stream = BytesIO()
    Image.fromarray(array).save(stream, form)
    return stream.getvalue()


def rows_of(pixels):
    """CIFAR's rows: 1,024 red, green and blue values."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def all_of(source):
    return np.stack([np.asarray(source.image(n)) for n in range(len(source))])


CIFAR = {
    "cifar10": ([f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta"),
    "cifar100": (["train"], "test", "meta"),
}
LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}
NAMES = [f"class{n}" for n in range(7)]


def cifar_python(name, folder, protocol=2):
    place = folder / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    place.mkdir(parents=True)
    train, test, meta = CIFAR[name]
    whole = {}
    for number, file in enumerate((*train, test)):
        pixels, labels = images(3, 32, 32, 3, seed=number), [number % 7, 1, 6]
        stored = {b"data": rows_of(pixels), LABELS[name]: labels, b"coarse_labels": [0] * 3}
        (place / file).write_bytes(pickle.dumps(stored, protocol))
        whole[file] = pixels, labels
    key = b"label_names" if name == "cifar10" else b"fine_label_names"
    (place / meta).write_bytes(pickle.dumps({key: [n.encode() for n in NAMES]}, protocol))
    return whole


def cifar_binary(name, folder):
    ten = name == "cifar10"
    place = folder / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    place.mkdir(parents=True)
    train, test, _ = CIFAR[name]
    whole = {}
    for number, file in enumerate((*train, test)):
        pixels, labels = images(3, 32, 32, 3, seed=number), [number % 7, 1, 6]
        columns = [np.array(labels, np.uint8)[:, None], rows_of(pixels)]
        if not ten:
            columns.insert(0, np.full((3, 1), 3, np.uint8))  # the coarse label
        (place / f"{file}.bin").write_bytes(np.hstack(columns).tobytes())
        whole[file] = pixels, labels
    names = place / ("batches.meta.txt" if ten else "fine_label_names.txt")
    names.write_text("\n".join(NAMES) + "\n\n")
    return whole


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("write", [cifar_python, cifar_binary])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_as_distributed(name, write, inside, tmp_path):
    whole = write(name, tmp_path)
    data = open_data(name, next(tmp_path.iterdir()) if inside else tmp_path)
    train, test, _ = CIFAR[name]
    assert data.classes == tuple(NAMES)
    for source, files in ((data.train, train), (data.val, [test])):
        np.testing.assert_array_equal(all_of(source), np.concatenate([whole[f][0] for f in files]))
        assert source.labels.tolist() == [label for f in files for label in whole[f][1]]
        assert source.labels.dtype == np.int64


class Runs:
    """Makes a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_of_cifar_run_nothing(tmp_path):
    cifar_python("cifar10", tmp_path / "data")
    file = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(pickle.dumps({b"data": Runs(tmp_path / "made"), b"labels": []}))
    with pytest.raises(DataError, match=r"_2 is no file of CIFAR .* io\.open, which is not run"):
        open_data("cifar10", tmp_path / "data")
    assert not (tmp_path / "made").exists()


PIXELS = rows_of(images(3, 32, 32, 3))


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"", "data_batch_2 is no file of CIFAR for Python"),
        (b"\x80\x02}q\x00(X", "data_batch_2 is no file of CIFAR for Python"),
        (pickle.dumps([1]), "data_batch_2 has no data, and is no file of CIFAR"),
        (pickle.dumps({b"data": PIXELS}, 2), "data_batch_2 has no labels"),
        (
            pickle.dumps({b"data": PIXELS[:, :9], b"labels": [1, 1, 1]}, 2),
            r"must have images of 3,072 bytes; it has uint8 of \(3, 9\)",
        ),
        (
            pickle.dumps({b"data": PIXELS, b"labels": [1, 1]}, 2),
            r"must have 3 labels, integers; it has int64 of \(2,\)",
        ),
        (
            pickle.dumps({b"data": PIXELS, b"labels": [1, "a", {}]}, 2),
            "must have 3 labels, integers",
        ),
        (
            pickle.dumps({b"data": PIXELS, b"labels": [1, 1, 7]}, 2),
            "labels must be from 0 to 6, as there are 7 classes; the train part has 7",
        ),
    ],
)
def test_damaged_files_of_cifar_for_python(stored, said, tmp_path):
    cifar_python("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(stored)
    with pytest.raises(DataError, match=said):
        open_data("cifar10", tmp_path)


def test_cifar_that_is_not_whole(tmp_path):
    with pytest.raises(DataError, match="has no cifar100; put cifar-100-binary or cifar-100-"):
        open_data("cifar100", tmp_path)
    cifar_binary("cifar10", tmp_path)
    place = tmp_path / "cifar-10-batches-bin"
    (place / "data_batch_3.bin").write_bytes(b"1" * 4000)
    with pytest.raises(DataError, match="bin must have 3073 bytes an image; it has 4000 in all"):
        open_data("cifar10", tmp_path)
    (place / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"could not be read: .*data_batch_3.bin.*; put cifar-10"):
        open_data("cifar10", tmp_path)
    cifar_binary("cifar10", tmp_path / "names")
    place = tmp_path / "names" / "cifar-10-batches-bin"
    (place / "batches.meta.txt").write_bytes("K\xe4fer".encode("latin-1"))
    with pytest.raises(DataError, match=r"could not be read: 'utf-8' codec .*; put cifar-10-bat"):
        open_data("cifar10", tmp_path / "names")
    cifar_python("cifar10", tmp_path / "py")
    (tmp_path / "py" / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 is missing; it belongs to the distributed"):
        open_data("cifar10", tmp_path / "py")
    meta = tmp_path / "py" / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(pickle.dumps({b"label_names": 3}))
    with pytest.raises(DataError, match="must have a list of the classes' names; it has 3"):
        open_data("cifar10", tmp_path / "py")


def folder_of(place, classes=("cat", "dog"), parts=("train", "val"), count=2):
    for part in parts:
        for number, name in enumerate(classes):
            (place / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = np.full((5 + n, 6, 3), 40 * number + n, np.uint8)
                Image.fromarray(pixels).save(place / part / name / f"{n}.PNG")
    return place


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_a_folder_of_classes(val, tmp_path):
    folder_of(tmp_path, ("ä b", "dog"), ("train", val))
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "dog" / "._1.png").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = open_data("folder", str(tmp_path), max_broken=3)
    assert data.classes == ("dog", "ä b")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.max_broken == data.val.max_broken == 3
    assert data.train.name(3) == str(tmp_path / "train" / "ä b" / "1.PNG")
    assert np.asarray(data.train.image(1)).tolist() == np.full((6, 6, 3), 41).tolist()
    assert data.channels == 3


def test_what_is_no_folder_of_classes(tmp_path):
    def said(match, **others):
        with pytest.raises(DataError, match=match):
            open_data("folder", tmp_path, **others)

    said("has no data set; it needs train and val, each with a folder of images for each class")
    folder_of(tmp_path, parts=("train",))
    (tmp_path / "val").mkdir()
    said("val has no classes; it needs a folder of images for each class")
    (tmp_path / "val" / "cat").mkdir()
    said("train and val must have the same classes; 1 are in one alone, such as 'dog'")
    (tmp_path / "val" / "dog").mkdir()
    said("cat has no images, such as .jpg or .png")


def test_stanford_dogs_lists(tmp_path):
    breeds = "n02085620-Chihuahua", "n02085782-Japanese_spaniel"
    lists = {"train": [], "test": []}
    for number, breed in enumerate(breeds):
        (tmp_path / "Images" / breed).mkdir(parents=True)
        for n in range(3):
            name = f"{breed}/{breed[:9]}_{n}.jpg"
            Image.new("RGB", (8, 9), (90 * number, n, 0)).save(tmp_path / "Images" / name)
            lists["test" if n == 2 else "train"].insert(0, name)
    for part, names in lists.items():  # as distributed: a column of cells
        cells = np.array(names, object)[:, None]
        savemat(tmp_path / f"{part}_list.mat", {"file_list": cells, "labels": np.ones(len(names))})
    data = open_data("dogs", tmp_path)
    assert data.classes == ("Chihuahua", "Japanese_spaniel")
    assert data.train.labels.tolist() == [1, 1, 0, 0]
    assert data.val.labels.tolist() == [1, 0]
    assert data.train.name(0).endswith("Images/n02085782-Japanese_spaniel/n02085782_1.jpg")
    assert np.asarray(data.train.image(0)).shape == (9, 8, 3)

    def said(match, **stored):
        savemat(tmp_path / "test_list.mat", stored)
        with pytest.raises(DataError, match=match):
            open_data("dogs", tmp_path)

    said("test_list.mat is no list of Stanford Dogs", other=1)
    cells = np.array(["../x/y.jpg", "a"], object)[:, None]
    said("must list names such as 'breed/file.jpg'; it has '../x/y.jpg'", file_list=cells)
    cells = np.array(["n1-Pug/y.jpg", "n1-Pug/z.jpg"], object)[:, None]
    said("test_list.mat has the class 'n1-Pug', which train lacks", file_list=cells)
    (tmp_path / "test_list.mat").unlink()
    with pytest.raises(DataError, match=r"has no Stanford Dogs; put Images, train_list\.mat and"):
        open_data("dogs", tmp_path)


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(packed, dotted, tmp_path):
    whole = {"train": (images(5, 28, 28), [0, 2, 1, 1, 0]), "t10k": (images(3, 28, 28), [2, 2, 1])}
    for part, (pixels, labels) in whole.items():
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array(labels, np.uint8))):
            kind = kind.replace("-idx", ".idx") if dotted else kind
            stored = gzip.compress(idx(array)) if packed else idx(array)
            (tmp_path / f"{part}-{kind}-ubyte{'.gz' * packed}").write_bytes(stored)
    data = open_data("mnist", tmp_path)
    assert data.classes == ("0", "1", "2")
    assert data.channels == 1
    for source, (pixels, labels) in zip((data.train, data.val), whole.values(), strict=True):
        np.testing.assert_array_equal(all_of(source)[..., 0], pixels)
        assert source.labels.tolist() == labels


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (None, "has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; put train-images"),
        (b"", "is no idx file of bytes"),
        (b"\0\0\x0d\x01", "is no idx file of bytes"),
        (idx(images(5, 28, 28))[:-1], r"is not whole: 3,935 bytes for \(5, 28, 28\)"),
        (b"\0\0\x08\x03\0\0", r"is not whole: 6 bytes for \(0, 0, 0\)"),
        (
            idx(images(5, 28)),
            r"train must have images \(N, H, W\) with a label each; it has \(5,",
        ),
        (idx(images(4, 28, 28)), r"with a label each; it has \(4, 28, 28\) and \(5,\)"),
    ],
)
def test_damaged_idx_files(stored, said, tmp_path):
    labels = idx(np.zeros(5, np.uint8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    if stored is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(stored)
    with pytest.raises(DataError, match=said):
        open_data("mnist", tmp_path)


@pytest.mark.parametrize("packed", [gzip.compress(b"abc", mtime=0)[:-5], b"no gzip"])
def test_damaged_gzip(packed, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"could not be read: .*; put train-images-idx3"):
        open_data("mnist", tmp_path)


X, Y = images(6, 9, 9), np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "named",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels"),
    ],
)
@pytest.mark.parametrize("x", [X, np.stack([X] * 3, -1), np.stack([X] * 3, 1), X / 255])
def test_npz(x, named, tmp_path):
    np.savez(tmp_path / "a.npz", **dict(zip(named, (x, Y, x[:3], Y[:3, None]), strict=True)))
    for place in (tmp_path, tmp_path / "a.npz"):
        data = open_data("npz", place)
        assert (len(data.train), len(data.val), data.classes) == (6, 3, ("0", "1", "2"))
        assert data.channels == (1 if x.ndim == 3 else 3)
        factor = 255 if x.dtype == float else 1
        np.testing.assert_allclose(factor * all_of(data.train)[..., 0], X, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, "has no x_val or val_images"),
        ({"x_test": X}, "has no y_val or val_labels; it has x_train, y_train, x_test"),
        ({"x_test": X, "y_test": Y + 0.5}, "labels must be integers; it has float64"),
        ({"x_test": X[0, 0], "y_test": Y}, r"images must be \(N, H, W\) or \(N, H, W, C\)"),
        ({"x_test": X * 1.5, "y_test": Y}, "floats in images must be from 0 to 1, and finite"),
        ({"x_test": X, "y_test": Y - 1}, "labels must be from 0 to 2, .* the val part has -1"),
        ({"x_test": np.stack([X] * 3, -1), "y_test": Y}, "to train with have 1 channels, those to"),
        ({"x_test": X, "y_test": Y, "classes": np.array(["a", "b"])}, "as there are 2 classes"),
        ({"x_test": np.array([{}]), "y_test": Y}, "is no whole .npz of arrays: Object arrays"),
    ],
)
def test_what_is_no_npz(stored, said, tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, **stored)
    with pytest.raises(DataError, match=said):
        open_data("npz", tmp_path)


def test_npz_that_is_not_one(tmp_path):
    with pytest.raises(DataError, match=r"must be or have one .npz; it has 0; it needs x_train"):
        open_data("npz", tmp_path)
    np.save(tmp_path / "a.npz.npy", X)
    with pytest.raises(DataError, match=r"npy is no .npz, which is a zip file of arrays"):
        open_data("npz", tmp_path / "a.npz.npy")


def hugging_face(file, pixels, labels, names=None, label="label", rows=2, form="PNG"):
    """A file as `datasets` writes it: a structure of bytes and path, features in the metadata."""
    cells = [{"bytes": encoded(x, form), "path": None} for x in pixels]
    table = pa.table({"image": cells, label: pa.array(labels)})
    if names:
        features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        told = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": told})
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table, file, row_group_size=rows)


@pytest.mark.parametrize("label", ["label", "fine_label"])
def test_parquet_as_hugging_face_writes_it(label, tmp_path):
    x, names = images(7, 5, 6, 3), ["cat", "dog"]
    for number, rows in enumerate((slice(0, 4), slice(4, 7))):
        file = tmp_path / "data" / f"train-0000{number}-of-00002.parquet"
        hugging_face(file, x[rows], [0, 1, 1, 0][: len(x[rows])], names, label)
    hugging_face(tmp_path / "data" / "test-00000-of-00001.parquet", x[:2], [1, 0], names, label)
    data = open_data("parquet", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 1, 0, 0, 1, 1]
    np.testing.assert_array_equal(all_of(data.train), x)
    np.testing.assert_array_equal(all_of(data.val), x[:2])
    assert data.train.name(6).startswith("row 0 of group 1 of ")
    assert data.train.name(6).endswith("train-00001-of-00002.parquet")
    assert sorted(data.train.shuffled(np.random.default_rng(0))) == list(range(7))


def test_parquet_is_shuffled_by_groups(tmp_path):
    rows, groups = 3, 2 * GROUPS + 1
    starts = np.arange(0, rows * (groups + 1), rows)
    source = Parquet([], "image", starts, np.zeros((groups, 2), int), np.zeros(rows * groups, int))
    order = source.shuffled(np.random.default_rng(0))
    assert sorted(order) == list(range(rows * groups))
    first = order[: rows * GROUPS]
    assert len(set(first // rows)) == GROUPS  # whole groups
    assert np.abs(np.diff(first // rows)).max() > 5  # in no order
    assert (order != source.shuffled(np.random.default_rng(1))).any()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, r"has no val-\*.parquet; put train-\*.parquet and"),
        (
            {"image": [b"1"], "word": ["a"]},
            "must have a column of images' bytes and one of",
        ),
        (
            {"image": [b"1", b"2"], "label": [1, None]},
            "labels must be integers in every row; found float",
        ),
        ({"image": [b"1"], "label": [-1]}, "labels must be from 0 to 1, .* the val part has -1"),
    ],
)
def test_what_is_no_parquet(table, said, tmp_path):
    hugging_face(tmp_path / "train.parquet", images(2, 4, 4, 3), [0, 1])
    if table is not None:
        pq.write_table(pa.table(table), tmp_path / "val.parquet")
    with pytest.raises(DataError, match=said):
        open_data("parquet", tmp_path)


def test_parquet_that_differs_or_is_damaged(tmp_path):
    hugging_face(tmp_path / "train.parquet", images(2, 4, 4, 3), [0, 1], ["cat", "dog"])
    hugging_face(tmp_path / "val.parquet", images(2, 4, 4, 3), [0, 1], ["dog", "cat"])
    with pytest.raises(DataError, match="train and val must name the same classes"):
        open_data("parquet", tmp_path)
    (tmp_path / "val.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"val.parquet is no file of Parquet"):
        open_data("parquet", tmp_path)


def test_digits_are_split_by_each_digits_share():
    data = open_data("digits")
    assert (len(data.train), len(data.val), data.channels) == (1437, 360, 1)
    assert np.bincount(data.val.labels).min() == 35
    assert all_of(data.val).max() == 255


def test_what_there_is_no_data_for(tmp_path):
    with pytest.raises(DataError, match=r"data must be one of digits, .*; received 'cifar'"):
        open_data("cifar", tmp_path)
    for name in set(DATA_SETS) - {"digits"}:
        with pytest.raises(DataError, match=f"{name} is read from files; give the folder"):
            open_data(name)
        with pytest.raises(DataError, match=r"none does not exist; (put|it needs)"):
            open_data(name, tmp_path / "none")


LEVELS = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("L", "BMP"),
        ("L", "JPEG"),
    ],
)
def test_modes_become_colours(mode, form, tmp_path):
    folder_of(tmp_path, ("a",), count=1)
    grey = Image.fromarray(LEVELS * 5)
    file = tmp_path / "train" / "a" / f"b.{form.lower().replace('jpeg', 'jpg')}"
    grey.convert("RGB" if mode in ("CMYK", "RGBA") else "L").convert(mode).save(file, form)
    found = open_data("folder", tmp_path).train.image(1)
    assert (found.mode, found.size) == ("RGB", (8, 6))
    assert np.ptp(np.asarray(found), axis=2).max() <= 4  # it is grey
    if mode != "1":
        assert np.abs(np.asarray(found)[..., 0].astype(int) - LEVELS * 5).mean() < 4


def test_what_is_transparent_keeps_its_colour():
    image = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    assert converted(image, 3).getpixel((0, 0)) == (10, 200, 30)
    palette = Image.new("RGB", (2, 2), (10, 200, 30)).quantize(2)
    palette.info["transparency"] = 0
    assert converted(palette, 3).getpixel((0, 0)) == (10, 200, 30)


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        for channels in (1, 3):
            found = np.asarray(converted(image, channels)).reshape(6, 8, -1)
            np.testing.assert_array_equal(found[..., 0], levels // 256)
    with pytest.raises(ValueError, match="its levels are 0 to 70000, not of 16 bits"):
        converted(Image.fromarray(np.array([[0, 70000]], np.int32)), 3)
    with pytest.raises(ValueError, match="its levels are floats, of which none says what is white"):
        converted(Image.fromarray(np.zeros((2, 2), np.float32)), 3)


def test_a_truncated_jpeg_is_broken_whatever_others_have_set(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as GluonCV does
    folder_of(tmp_path, ("a",), count=1)
    stored = encoded(images(1, 64, 64, 3)[0], "JPEG")
    (tmp_path / "train" / "a" / "b.jpg").write_bytes(stored[: len(stored) // 2])
    with pytest.raises(OSError, match="truncated"):
        open_data("folder", tmp_path).train.image(1).load()


def test_an_image_that_is_too_large_is_broken(tmp_path, monkeypatch):
    folder_of(tmp_path, ("a",), count=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="exceeds limit of 20 pixels"):
        open_data("folder", tmp_path).train.image(0)


def test_names_are_kept_as_bytes():
    texts = ["a", "", "ü/ä.png", "\udcff"]
    names = Names(texts)
    assert list(names) == texts
    with pytest.raises(IndexError):
        names[4]


class Sequence:
    """As PyTorch's data sets are."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Targets(Sequence):
    """As torchvision's: what the labels are is told without decoding."""

    def __init__(self, items):
        super().__init__(items)
        self.targets = [label for _, label in items]

    def __getitem__(self, index):
        return self.items[index][0], "not asked for"


PAIRS = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
OWN = {
    "arrays": lambda: (X, Y),
    "pairs": lambda: PAIRS,
    "sequence": lambda: Sequence(PAIRS),
    "targets": lambda: Targets(PAIRS),
    "pillow": lambda: Sequence([(Image.fromarray(x), y) for x, y in PAIRS]),
    "iterable": lambda: iter(PAIRS),
    "pillow iterable": lambda: ((Image.fromarray(x), y) for x, y in PAIRS),
    "batches": lambda: iter([(X[:4], Y[:4]), (X[4:], Y[4:])]),
    "source": lambda: Arrays(X[..., None], Y),
}


@pytest.mark.parametrize("form", OWN)
def test_own_data(form):
    data = as_data((OWN[form](), OWN["arrays"]()))
    np.testing.assert_array_equal(all_of(data.train).reshape(X.shape), X)
    assert data.train.labels.tolist() == Y.tolist()
    assert (data.classes, data.channels) == (("0", "1", "2"), 1)
    assert as_data(data) is data


def test_own_data_of_pytorch():
    need("torch")
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    whole = TensorDataset(torch.from_numpy(X[:, None]), torch.from_numpy(Y))
    data = as_data((whole, DataLoader(whole, 4)), classes=("a", "b", "c"))
    for source in (data.train, data.val):
        np.testing.assert_array_equal(all_of(source)[..., 0], X)
        assert source.labels.tolist() == Y.tolist()
    assert data.classes == ("a", "b", "c")


def test_own_data_in_one_part_gives_every_fifth_to_evaluate_with():
    data = as_data((np.concatenate([X, X]), np.concatenate([Y, Y])))
    np.testing.assert_array_equal(all_of(data.val)[..., 0], X[[4, 3]])
    assert len(data.train) == 10


def test_own_images_in_colour_and_grey():
    colour, grey = Image.new("RGB", (4, 4), (9, 9, 9)), Image.new("LA", (4, 4))
    data = as_data(([(colour, 0), (grey, 1)], [(colour, 0)]))
    assert all_of(data.train).shape == (2, 4, 4, 3)


OK = (X, Y)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (3, TypeError, r"data must be of images and labels; received int: give \(images, labels\)"),
        ("digits", TypeError, "data must be of images and labels; received str"),
        ({"x": X}, TypeError, "data must be of images and labels; received dict"),
        ((X, Y, X), TypeError, "data must be a pair; received tuple"),
        ((X, Y[:3]), DataError, r"with one label each; received \(6, 9, 9, 1\) and \(3,\)"),
        ((X[0, 0], Y), DataError, r"must be \(N, H, W, C\) with one label each; received \(9,\)"),
        ((X, Y * 0.5), DataError, r"labels must be integers of shape \(N,\); received float64 of"),
        ((X * 1.0, Y), DataError, "must be from 0 to 1, and finite; received 0 to 255"),
        ((X * np.nan, Y), DataError, "from 0 to 1, and finite; received nan to nan"),
        ((X.astype(int) * 2, Y), DataError, "integers in images must be from 0 to 255"),
        ((X > 3, Y), DataError, "images must be integers or floats; received bool"),
        ((X, Y - 1), DataError, "labels must be from 0 to 1, as there are 2 classes; .* -1"),
        ((X[:0], Y[:0]), DataError, "own data: the train part has no images"),
        (([], OK), DataError, "a part of the data has no images"),
        ((iter([]), OK), DataError, "an iterable of the data gave no images"),
        ((iter([3]), OK), TypeError, r"an iterable must give \(images, labels\)"),
        ((iter([(X[0], 0), (X[0, :4], 0)]), OK), DataError, "must be of one size; received"),
        ((Sequence([3, 4]), OK), TypeError, r"a sequence must be of \(image, label\)"),
        ((Sequence([(X[0, 0], 1)]), OK), DataError, r"image must be \(H, W, C\); received \(9,"),
        ((X, 3), TypeError, "received ndarray as a part of the data"),
        ((np.stack([X] * 3, -1), Y), None, None),
    ],
)  # fmt: skip
def test_own_data_that_is_none(data, error, said):
    if error is None:
        assert as_data(data).channels == 3
        return
    with pytest.raises(error, match=said):
        as_data(data)


def test_labels_and_channels_are_looked_at():
    grey, colour = Arrays(X[..., None], Y), Arrays(np.stack([X] * 3, -1), Y)
    with pytest.raises(DataError, match=r"a: images to train with have 1 channels, .* with 3"):
        ImageData("a", ("0", "1", "2"), grey, colour)
    with pytest.raises(DataError, match=r"a: labels must be integers .*; the val part has float64"):
        ImageData("a", ("0", "1", "2"), grey, Arrays(X[..., None], Y / 2))
    with pytest.raises(DataError, match=r"labels must be from 0 to 1, .* the train part has 2"):
        as_data((OK, OK), classes=("a", "b"))
