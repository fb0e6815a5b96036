"""Data sets by name, read from the files in which they are distributed. Nothing is downloaded."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.needed import needed
from doconv_core.training.data.own import as_images
from doconv_core.training.data.sources import Arrays, DataError, Files, ImageData, Names, Parquet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "eval")
SHARE = 0.2  # of the digits that is to evaluate with, each digit having its share of it


def open_data(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, max_broken: int = 0
) -> ImageData:
    """Return the data set of this name, from files in a folder.

    "digits" is in scikit-learn: 1,797 digits of 8x8. In `data_dir` lie: of "cifar10" and "cifar100"
    the folder as distributed, in binary or for Python; "folder" `train` and `val` with a folder for
    each class, as of ImageNet; "dogs" Stanford Dogs' `Images` and lists; "mnist" four idx files,
    gzipped or not, as of Fashion-MNIST, too; "npz" a file of NumPy's with x_train, y_train, x_test,
    y_test; "parquet" files such as `train-00000-of-00001.parquet`, as Hugging Face writes them.
    max_broken: how many images may be unreadable in an epoch before that is an error; in training
    the next ones take their place, in evaluation they do not count. Raises DataError for a name
    that is none, and for what is not there, with where to put it.

    >>> data = open_data("digits")
    >>> len(data.train), len(data.val), data.channels
    (1437, 360, 1)
    """
    if name not in DATA_SETS:
        raise DataError(f"data must be one of {', '.join(DATA_SETS)}; received {name!r}.")
    if name == "digits":
        found = _digits()
    else:
        if data_dir is None:
            raise DataError(f"{name} is read from files; give the folder they are in as data_dir.")
        folder = Path(data_dir)
        if not folder.exists():
            raise DataError(f"{folder} does not exist; {_WANTED[name]}.")
        try:
            found = DATA_SETS[name](folder)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{folder} could not be read: {error}; {_WANTED[name]}.") from error
    found.train.max_broken = found.val.max_broken = max_broken
    return found


def _digits() -> ImageData:
    data = needed("sklearn.datasets").load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    split = needed("sklearn.model_selection").train_test_split
    rows = split(np.arange(len(labels)), test_size=SHARE, random_state=0, stratify=labels)
    parts = [Arrays(images[part], labels[part]) for part in map(np.sort, rows)]
    return ImageData("digits", tuple(map(str, range(10))), parts[0], parts[1])


def _cifar(name: str, folder: Path) -> ImageData:
    python, binary = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
        "cifar100": ("cifar-100-python", "cifar-100-binary"),
    }[name]
    known = ["data_batch_1", "data_batch_1.bin"] if name == "cifar10" else ["train", "train.bin"]
    for place in (folder, folder / python, folder / binary):
        for file in known:
            if (place / file).is_file():
                read = _cifar_binary if file.endswith(".bin") else _cifar_python
                return read(name, place)
    raise DataError(f"{folder} has no {name}; {_WANTED[name]}.")


def _cifar_binary(name: str, folder: Path) -> ImageData:
    ten = name == "cifar10"
    files = [f"data_batch_{n}.bin" for n in range(1, 6)] if ten else ["train.bin"]
    names = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
    classes = tuple(names.read_text(encoding="utf-8").split())

    def part(*files: str) -> Arrays:
        width = (1 if ten else 2) + 3072  # the last byte before the pixels is the class
        stored = []
        for file in files:
            found = np.fromfile(folder / file, np.uint8)
            if not len(found) or len(found) % width:
                raise DataError(
                    f"{folder / file} must have {width} bytes an image; it has {len(found)} in all."
                )
            stored.append(found.reshape(-1, width))
        rows = np.concatenate(stored)
        return Arrays(_pixels(rows[:, -3072:]), rows[:, -3073].astype(np.int64))

    return ImageData(name, classes, part(*files), part("test_batch.bin" if ten else "test.bin"))


def _cifar_python(name: str, folder: Path) -> ImageData:
    ten = name == "cifar10"
    files = [f"data_batch_{n}" for n in range(1, 6)] if ten else ["train"]
    meta = _unpickled(folder / ("batches.meta" if ten else "meta"))
    names = _entry(meta, "label_names" if ten else "fine_label_names", folder)
    if not isinstance(names, list):
        raise DataError(f"{folder} must have a list of the classes' names; it has {names!r}.")
    classes = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)

    def part(*files: str) -> Arrays:
        images, labels = [], []
        for file in files:
            stored = _unpickled(folder / file)
            data = np.asarray(_entry(stored, "data", folder / file))
            if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
                raise DataError(
                    f"{folder / file} must have images of 3,072 bytes; it has {data.dtype} of "
                    f"{data.shape}."
                )
            images.append(data)
            told = np.asarray(_entry(stored, "labels" if ten else "fine_labels", folder / file))
            if told.dtype.kind not in "iu" or told.shape != (len(data),):
                raise DataError(
                    f"{folder / file} must have {len(data)} labels, integers; it has {told.dtype} "
                    f"of {told.shape}."
                )
            labels.append(told)
        return Arrays(_pixels(np.concatenate(images)), np.concatenate(labels))

    return ImageData(name, classes, part(*files), part("test_batch" if ten else "test"))


def _pixels(rows: Array) -> Array:
    """Return images of rows of 1,024 red, green and blue values each."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _entry(stored: Any, name: str, file: Path) -> Any:
    if isinstance(stored, Mapping):
        for key in (name, name.encode()):
            if key in stored:
                return stored[key]
    raise DataError(f"{file} has no {name}, and is no file of CIFAR.")


class _Inert(pickle.Unpickler):
    """Reads arrays of NumPy's and plain values; anything else that a pickle asks for is refused."""

    ALLOWED = frozenset((
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    ))  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few things that arrays are made by."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return super().find_class(module, name)


def _unpickled(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return _Inert(stream, encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{file} is missing; it belongs to the distributed folder.") from None
    except Exception as error:  # whatever a damaged pickle may come to
        raise DataError(f"{file} is no file of CIFAR for Python: {error}.") from error


def _folder(folder: Path) -> ImageData:
    found = [_part_of(folder, names) for names in (TRAIN, VAL)]
    if None in found:
        raise DataError(f"{folder} has no data set; {_WANTED['folder']}.")
    train, val = (_classes(part) for part in found if part is not None)
    if train != val:
        only = sorted(set(train) ^ set(val))
        raise DataError(
            f"{folder}: train and val must have the same classes; {len(only)} are in one alone, "
            f"such as {only[0]!r}."
        )
    parts = [_files(part, train) for part in found if part is not None]
    return ImageData("folder", train, parts[0], parts[1])


def _part_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _classes(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        found = tuple(sorted(e.name for e in entries if e.is_dir() and e.name[0] != "."))
    if not found:
        raise DataError(f"{folder} has no classes; it needs a folder of images for each class.")
    return found


def _files(folder: Path, classes: tuple[str, ...]) -> Files:
    counts = np.zeros(len(classes), np.int64)

    def names() -> Iterator[str]:
        for label, name in enumerate(classes):
            with os.scandir(folder / name) as entries:
                found = sorted(e.name for e in entries if _is_image(e.name))
            counts[label] = len(found)
            yield from found

    stored = Names(names())
    if not counts.all():
        empty = classes[int(np.argmin(counts))]
        raise DataError(f"{folder / empty} has no images, such as .jpg or .png.")
    return Files(folder, stored, np.repeat(np.arange(len(classes)), counts), classes)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name[0] != "."  # which macOS puts beside others


def _dogs(folder: Path) -> ImageData:
    images = folder / "Images"
    lists = {}
    for part in ("train", "test"):
        places = [place / f"{part}_list.mat" for place in (folder, folder / "lists")]
        file = next((place for place in places if place.is_file()), None)
        if file is None or not images.is_dir():
            raise DataError(f"{folder} has no Stanford Dogs; {_WANTED['dogs']}.")
        lists[part] = _listed(file)
    breeds = {part: [name.partition("/")[0] for name in names] for part, names in lists.items()}
    classes = sorted(set(breeds["train"]))
    unknown = sorted(set(breeds["test"]) - set(classes))
    if unknown:
        raise DataError(f"{folder}: test_list.mat has the class {unknown[0]!r}, which train lacks.")
    place = {name: n for n, name in enumerate(classes)}
    parts = [
        Files(images, Names(lists[p]), np.array([place[b] for b in breeds[p]], np.int64))
        for p in ("train", "test")
    ]
    # A breed's name stands behind the first dash: n02085620-Chihuahua.
    return ImageData(
        "dogs", tuple(name.partition("-")[2] or name for name in classes), parts[0], parts[1]
    )


def _listed(file: Path) -> list[str]:
    try:
        stored = needed("scipy.io").loadmat(file)["file_list"]
        names = [str(row.item() if row.shape == () else row.ravel()[0]) for row in stored.ravel()]
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DataError(f"{file} is no list of Stanford Dogs: {error}.") from error
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or "/" not in name:
            raise DataError(f"{file} must list names such as 'breed/file.jpg'; it has {name!r}.")
    return names


def _mnist(folder: Path) -> ImageData:
    def read(stem: str) -> Array:
        for suffix in ("", ".gz"):
            for name in (f"{stem}-ubyte{suffix}", f"{stem.replace('-idx', '.idx')}-ubyte{suffix}"):
                if (folder / name).is_file():
                    return _idx(folder / name)
        raise DataError(f"{folder} has no {stem}-ubyte or {stem}-ubyte.gz; {_WANTED['mnist']}.")

    parts = []
    for part in ("train", "t10k"):
        images, labels = read(f"{part}-images-idx3"), read(f"{part}-labels-idx1")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{folder}: {part} must have images (N, H, W) with a label each; it has "
                f"{images.shape} and {labels.shape}."
            )
        parts.append(Arrays(images[..., None], labels.astype(np.int64)))
    return _counted("mnist", parts[0], parts[1])


def _idx(file: Path) -> Array:
    stored = file.read_bytes()
    if file.suffix == ".gz":
        stored = gzip.decompress(stored)
    if len(stored) < 4 or stored[:3] != b"\0\0\x08":
        raise DataError(f"{file} is no idx file of bytes.")
    begin = 4 + 4 * stored[3]  # of the values, behind the length of each axis
    shape = tuple(np.frombuffer(stored[4:begin].ljust(begin - 4, b"\0"), ">u4").tolist())
    if len(stored) != begin + prod(shape):
        raise DataError(f"{file} is not whole: {len(stored):,} bytes for {shape}.")
    return np.frombuffer(stored, np.uint8, offset=begin).reshape(shape)


def _npz(folder: Path) -> ImageData:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.npz"))
    if len(files) != 1:
        raise DataError(
            f"{folder} must be or have one .npz; it has {len(files)}; {_WANTED['npz']}."
        )
    if not zipfile.is_zipfile(files[0]):
        raise DataError(f"{files[0]} is no .npz, which is a zip file of arrays.")
    try:
        with np.load(files[0], allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, EOFError) as error:
        raise DataError(f"{files[0]} is no whole .npz of arrays: {error}.") from error
    parts = []
    for names in (TRAIN, VAL):
        x, y = (_array_of(arrays, kind, names, files[0]) for kind in "xy")
        images = as_images(x)
        if images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) != len(y):
            raise DataError(
                f"{files[0]}: images must be (N, H, W) or (N, H, W, C) with a label each; it has "
                f"{x.shape} and {y.shape}."
            )
        if y.dtype.kind not in "iu":
            raise DataError(f"{files[0]}: labels must be integers; it has {y.dtype}.")
        parts.append(Arrays(images, y.reshape(len(y)).astype(np.int64)))
    named = arrays.get("classes")
    if named is not None:
        return ImageData("npz", tuple(map(str, named.tolist())), parts[0], parts[1])
    return _counted("npz", parts[0], parts[1])


def _array_of(arrays: Mapping[str, Array], kind: str, parts: tuple[str, ...], file: Path) -> Array:
    word = {"x": "images", "y": "labels"}[kind]
    for part in parts:
        for name in (f"{kind}_{part}", f"{part}_{word}"):
            if name in arrays:
                return arrays[name]
    raise DataError(
        f"{file} has no {kind}_{parts[0]} or {parts[0]}_{word}; it has {', '.join(arrays)}."
    )


def _counted(name: str, train: Arrays, val: Arrays) -> ImageData:
    """Return a data set whose classes are numbers."""
    count = int(max(train.labels.max(initial=0), val.labels.max(initial=0))) + 1
    return ImageData(name, tuple(map(str, range(count))), train, val)


def _parquet(folder: Path) -> ImageData:
    parts, classes = [], []
    for names in (TRAIN, VAL):
        # The first of the names that there is: a test part is no more of a validation part.
        found = (_parquet_files(folder, part) for part in names)
        files = next(filter(None, found), None)
        if files is None:
            raise DataError(f"{folder} has no {names[0]}-*.parquet; {_WANTED['parquet']}.")
        source, told = _parquet_part(files)
        parts.append(source)
        classes.append(told)
    if classes[0] != classes[1]:
        raise DataError(f"{folder}: train and val must name the same classes; they do not.")
    count = int(max(part.labels.max(initial=0) for part in parts)) + 1
    named = classes[0] or tuple(map(str, range(count)))
    return ImageData("parquet", named, parts[0], parts[1])


def _parquet_files(folder: Path, part: str) -> list[Path]:
    places = (folder, folder / "data")
    patterns = (f"{part}-*.parquet", f"{part}.parquet")
    return sorted(file for place in places for pattern in patterns for file in place.glob(pattern))


def _parquet_part(files: list[Path]) -> tuple[Parquet, tuple[str, ...]]:
    parquet, arrow = needed("pyarrow.parquet"), needed("pyarrow")
    labels, starts, groups = [], [0], []
    image = label = ""
    told: tuple[str, ...] = ()
    for number, file in enumerate(files):
        try:
            opened = parquet.ParquetFile(file)
        except arrow.ArrowInvalid as error:
            raise DataError(f"{file} is no file of Parquet: {error}.") from error
        with opened:
            schema = opened.schema_arrow
            image, label = _columns(schema, arrow, file)
            told = _named(schema, label)
            labels.append(opened.read(columns=[label]).column(0).to_numpy())
            for group in range(opened.num_row_groups):
                groups.append((number, group))
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
    joined = np.concatenate(labels)
    if joined.dtype.kind not in "iu":
        raise DataError(f"{files[0]}: labels must be integers in every row; found {joined.dtype}.")
    places = np.array(starts), np.array(groups, np.int64).reshape(-1, 2)
    return Parquet(files, image, *places, joined.astype(np.int64)), told


def _columns(schema: Any, arrow: Any, file: Path) -> tuple[str, str]:
    """Return the names of the column of images and that of labels."""
    types = {field.name: field.type for field in schema}
    images = [name for name, kind in types.items() if _holds_bytes(kind, arrow)]
    labels = [name for name, kind in types.items() if arrow.types.is_integer(kind)]
    named = [name for name in ("label", "labels", "fine_label") if name in labels]
    if not images or not labels:
        raise DataError(
            f"{file} must have a column of images' bytes and one of integers, such as image and "
            f"label; it has {', '.join(types)}."
        )
    return images[0], (named or labels)[0]


def _holds_bytes(kind: Any, arrow: Any) -> bool:
    if arrow.types.is_struct(kind):
        return any(kind.field(n).name == "bytes" for n in range(kind.num_fields))
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def _named(schema: Any, label: str) -> tuple[str, ...]:
    """Return the classes' names that Hugging Face's metadata tell; () where there are none."""
    told = (schema.metadata or {}).get(b"huggingface")
    if told is None:
        return ()
    try:
        return tuple(map(str, json.loads(told)["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


DATA_SETS: dict[str, Callable[[Path], ImageData]] = {
    "digits": lambda folder: _digits(),
    "cifar10": lambda folder: _cifar("cifar10", folder),
    "cifar100": lambda folder: _cifar("cifar100", folder),
    "folder": _folder,
    "dogs": _dogs,
    "mnist": _mnist,
    "npz": _npz,
    "parquet": _parquet,
}
_WANTED = {
    "cifar10": "put cifar-10-batches-bin or cifar-10-batches-py there, as "
    "www.cs.toronto.edu/~kriz/cifar.html has them",
    "cifar100": "put cifar-100-binary or cifar-100-python there, as "
    "www.cs.toronto.edu/~kriz/cifar.html has them",
    "folder": "it needs train and val, each with a folder of images for each class",
    "dogs": "put Images, train_list.mat and test_list.mat there, as "
    "vision.stanford.edu/aditya86/ImageNetDogs has them",
    "mnist": "put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte there, or the same with .gz",
    "npz": "it needs x_train, y_train, x_test and y_test",
    "parquet": "put train-*.parquet and validation-*.parquet or test-*.parquet there",
}
