"""Batches: the same whatever prepares them, each image once, and what becomes of broken ones."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import training_data
from frameworks import fresh
from PIL import Image
from test_core_data_readers import folder_of, images

from doconv_core.training.data import (
    BrokenImages,
    DataError,
    ImageData,
    as_data,
    batches,
    open_data,
    series,
)  # fmt: skip
from doconv_core.training.data.sources import Arrays, Files, Source
from doconv_core.training.loss import targets
from doconv_core.training.recipe import recipe

CLASSES = 5
X, Y = images(23, 8, 8, 3), np.arange(23) % CLASSES
AUGMENTED = ("random_crop 8 2", "flip", "jitter .4 .4 .4", "lighting .1", "normalize .5 .25")


def source():
    return Arrays(X, Y)


def made(**changes):
    fields = {"batch_size": 6, "train_images": (), "eval_images": (), **changes}
    return recipe("digits", **fields)


def drawn(changes=None, training=True, of=None, **others):
    of = source() if of is None else of
    return list(batches(of, CLASSES, made(**(changes or {})), training=training, **others))


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, other)


def numbers(found, pixels=None):
    """Return which image each row of batches is."""
    pixels = X if pixels is None else pixels
    whole = np.concatenate([b.images for b in found]).transpose(0, 2, 3, 1) * 255
    return [int(np.argmin(np.abs(pixels - x).sum((1, 2, 3)))) for x in whole]


def test_an_evaluation_has_each_image_once_and_in_order():
    found = drawn({"label_smoothing": 0.1, "mixup": 0.4}, training=False)
    assert [len(b.labels) for b in found] == [6, 6, 6, 5]
    assert [b.total for b in found] == [6, 6, 6, 5]
    pixels = np.concatenate([b.images for b in found])
    np.testing.assert_array_equal(pixels, np.float32(1 / 255) * X.transpose(0, 3, 1, 2))
    assert pixels.dtype == np.float32
    assert np.concatenate([b.labels for b in found]).tolist() == Y.tolist()
    np.testing.assert_array_equal(found[0].targets, targets(Y[:6], CLASSES))


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_each_image_once_in_an_order_of_its_own(drop_last):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        found = drawn({"drop_last": drop_last}, seed=seed, epoch=epoch)
        orders.append(numbers(found))
        assert len(found) == (3 if drop_last else 4)
        assert len(set(orders[-1])) == (18 if drop_last else 23)
        labels = np.concatenate([b.labels for b in found])
        assert labels.tolist() == Y[orders[-1]].tolist()
    assert orders[0] != orders[1] != orders[2] != orders[0]


WHOLE = {"train_images": AUGMENTED, "mixup": 0.3, "label_smoothing": 0.1}


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_batches_are_the_same_wherever_a_run_begins(start):
    same(drawn(WHOLE)[start:], drawn(WHOLE, start=start))


def both(of, val=None):
    return ImageData("both", tuple("abcde"), of, of if val is None else val)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (0, 3), (1, 4), (3, 0)])
def test_a_series_has_each_epochs_batches_and_then_those_to_evaluate_on(
    epoch, start, in_files, tmp_path
):
    changes = {**WHOLE, "epochs": 3, "mixup_off_epochs": 1}
    how = {"seed": 2, "process": 1, "processes": 7, "layout": "NHWC"}  # of 5 images it gets none
    train, val = Arrays(X, Y), Arrays(X[:5], Y[:5])
    read = val
    if in_files:
        for n, x in enumerate(X[:5]):
            Image.fromarray(x).save(tmp_path / f"{n}.png")
        read = Files(tmp_path, [f"{n}.png" for n in range(5)], Y[:5])
    found = series(both(train, read), made(**changes), epoch=epoch, start=start, **how)
    for each in range(epoch, 3):
        first = start if each == epoch else 0
        same(list(found.part()), drawn(changes, start=first, epoch=each, **how))
        same(list(found.part()), drawn(changes, False, of=val, **how))
    same(list(found.part()), drawn(changes, False, of=val, **how))
    found.close()


def test_a_series_of_very_many_epochs_begins_and_ends():
    val, most = Arrays(X[:5], Y[:5]), 2**31 - 1
    found = series(both(source(), val), made(epochs=most))
    same(list(found.part()), drawn())
    found.close()
    found = series(both(source(), val), made(epochs=most), epoch=most - 1)
    assert [len(list(found.part())) for _ in range(3)] == [4, 1, 1]
    found.close()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_rows_of_processes_are_the_whole_batch(processes, training):
    whole = drawn(WHOLE, training, seed=3)
    parts = [
        drawn(WHOLE, training, seed=3, process=n, processes=processes) for n in range(processes)
    ]
    if training:  # where each process has each step
        assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        rows = [part[number] for part in parts if number < len(part)]
        for name in ("images", "targets", "labels"):
            joined = np.concatenate([getattr(row, name) for row in rows])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        assert {row.total for row in rows} == {batch.total}
        counts = [len(row.labels) for row in rows]
        assert max(counts) - min(counts) <= 1


def test_layouts_have_the_same_images():
    for changes in (WHOLE, {}):
        first, second = drawn(changes, layout="NCHW"), drawn(changes, layout="NHWC")
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a.images.transpose(0, 2, 3, 1), b.images)
            assert a.images.flags.c_contiguous
            assert b.images.flags.c_contiguous


def test_files_are_prepared_by_threads_as_arrays_are(tmp_path):
    (tmp_path / "a").mkdir()
    for n, x in enumerate(X):
        Image.fromarray(x).save(tmp_path / "a" / f"{n:02}.png")
    names = [f"a/{n:02}.png" for n in range(len(X))]
    same(drawn(WHOLE), drawn(WHOLE, of=Files(tmp_path, names, Y)))


def test_images_are_mixed_with_the_reversed_batch():
    changes = {"label_smoothing": 0.1, "epochs": 3, "mixup_off_epochs": 1}
    mixed, plain = drawn({**changes, "mixup": 0.5}), drawn(changes)
    shares = []
    for a, b in zip(mixed, plain, strict=True):
        assert a.labels.tolist() == b.labels.tolist()  # unmixed
        other = b.images[::-1]
        share = ((a.images - other) * (b.images - other)).sum() / ((b.images - other) ** 2).sum()
        shares.append(round(float(share), 5))
        for name in ("images", "targets"):
            one, reverse = getattr(b, name), getattr(b, name)[::-1]
            wanted = share * one + (1 - share) * reverse
            np.testing.assert_allclose(getattr(a, name), wanted, atol=1e-5)
    assert len(set(shares)) == len(shares)
    same(drawn({**changes, "mixup": 0.5}, epoch=2), drawn(changes, epoch=2))  # off at the end


def test_the_share_of_a_mixture_is_betas():
    many = as_data((np.zeros((4000, 1, 1), np.uint8), np.arange(4000) % 2)).train
    found = batches(many, 2, made(batch_size=2, mixup=0.2), training=True)
    shares = np.array([b.targets[0, b.labels[0]] for b in found if len(set(b.labels)) == 2])
    assert abs(shares.mean() - 0.5) < 0.05  # some 800 of deviation 0.42, so within three of 0.015
    assert abs(shares.var() - 1 / (4 * 1.4)) < 0.02


def test_augmentations_are_of_the_image_and_not_of_its_place():
    first, second = drawn({**WHOLE, "mixup": 0}), drawn({**WHOLE, "mixup": 0, "batch_size": 23})
    np.testing.assert_array_equal(np.concatenate([b.images for b in first]), second[0].images)


def test_operations_at_the_end_are_those_one_by_one():
    changes = {"train_images": ("lighting .5", "normalize .5 .4 .3 .2 .3 .4")}
    once = drawn(changes)
    apart = drawn({"train_images": (*changes["train_images"], "resize 8 8")})  # which does nothing
    for a, b in zip(once, apart, strict=True):
        np.testing.assert_allclose(a.images, b.images, atol=2e-6)


def broken_folder(place, broken=("train/a/1.PNG", "train/a/4.PNG"), count=6):
    folder_of(place, ("a", "b"), count=count)
    for n, name in enumerate(broken):
        stored = (place / name).read_bytes()
        (place / name).write_bytes(stored[:50] if n % 2 else b"no image")
    return place


SQUARE = {"train_images": ("resize 8 8",), "eval_images": ("resize 8 8",), "batch_size": 4}


def test_broken_images_are_named_and_others_take_their_place(tmp_path):
    data = open_data("folder", broken_folder(tmp_path), max_broken=2)
    with pytest.warns(UserWarning, match="could not be read") as told:
        found = drawn(SQUARE, of=data.train)
    assert sorted(str(each.message).partition(" could")[0] for each in told) == [
        str(tmp_path / "train" / "a" / "1.PNG"), str(tmp_path / "train" / "a" / "4.PNG"),
    ]  # fmt: skip
    assert all("; the next takes its place" in str(each.message) for each in told)
    assert sum(len(b.labels) for b in found) == 12
    assert sorted(np.concatenate([b.labels for b in found])) == [0] * 6 + [1] * 6


def test_a_broken_image_is_named_once_in_each_part_of_a_training(tmp_path):
    train = open_data("folder", broken_folder(tmp_path), max_broken=2).train
    found = series(both(train), made(**SQUARE, epochs=3))
    with pytest.warns(UserWarning, match="could not be read") as told:
        counts = [sum(len(b.labels) for b in found.part()) for _ in range(7)]
    assert counts == [12, 10, 12, 10, 12, 10, 10]
    assert len(told) == len({str(each.message) for each in told}) == 4


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ({}, [[0, 2, 3], [6, 7], [8, 9, 10, 11]]),
        ({"process": 0, "processes": 2}, [[0], [8, 9]]),  # of one batch it has broken ones alone
        ({"process": 1, "processes": 2}, [[2, 3], [6, 7], [10, 11]]),
    ],
)
def test_broken_images_do_not_count_in_an_evaluation(part, kept, tmp_path):
    broken = ("train/a/1.PNG", "train/a/4.PNG", "train/a/5.PNG")
    torn = open_data("folder", broken_folder(tmp_path / "torn", broken), max_broken=3)
    whole = open_data("folder", broken_folder(tmp_path / "whole", ()))
    (expected,) = drawn({**SQUARE, "batch_size": 12}, training=False, of=whole.train)
    warned = pytest.warns(UserWarning, match=r"could not be read \(.*\); it does not count$")
    with warned if part.get("process") != 1 else nullcontext():
        found = drawn(SQUARE, training=False, of=torn.train, **part)
    for batch, rows in zip(found, kept, strict=True):
        for name in ("images", "targets", "labels"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name)[rows])


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (0, r"\d.PNG could not be read \(.*\); 0 may be. Replace or remove the files, or allow"),
        (1, r"\d.PNG and 1 before it could not be read \(.*\); 1 may be"),
    ],
)
def test_too_many_broken_images(allowed, said, tmp_path):
    data = open_data("folder", broken_folder(tmp_path), max_broken=allowed)
    warned = pytest.warns(UserWarning, match="takes its place") if allowed else nullcontext()
    with warned, pytest.raises(BrokenImages, match=said):
        drawn(SQUARE, of=data.train)


def test_no_image_can_be_read(tmp_path):
    broken = [f"train/{c}/{n}.PNG" for c in "ab" for n in range(2)]
    data = open_data("folder", broken_folder(tmp_path, broken, 2), max_broken=100)
    with pytest.raises(BrokenImages, match="none of 4 images could be read"):
        drawn(SQUARE, of=data.train)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_whatever_is_damaged_is_broken_and_nothing_else(form, tmp_path):
    rng = np.random.default_rng(0)
    folder_of(tmp_path, ("a",), count=1)
    file = tmp_path / "train" / "a" / f"b.{form.lower().replace('jpeg', 'jpg')}"
    Image.fromarray(images(1, 24, 24, 3)[0]).save(file, form)
    stored = np.frombuffer(file.read_bytes(), np.uint8)
    data = open_data("folder", tmp_path, max_broken=1)
    for _ in range(40):
        damaged = stored.copy()
        places = rng.integers(0, len(stored), 3)
        damaged[places] = rng.integers(0, 256, 3)
        file.write_bytes(damaged.tobytes()[: rng.integers(1, 2 * len(stored))])
        assert _counted(data.train) == 2


def _counted(train):
    import warnings

    with warnings.catch_warnings():  # of ours, and what Pillow says of damaged files
        warnings.simplefilter("ignore")
        return sum(len(b.labels) for b in drawn(SQUARE, of=train))


class Failing(Source):
    """Says of an image what it was told."""

    def __init__(self, error):
        self.labels, self.channels, self.error = Y, 3, error

    def image(self, index):
        raise self.error


def test_errors_of_a_users_own_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        drawn(of=Failing(ZeroDivisionError()))
    with pytest.raises(DataError, match="as it was said"):
        drawn(of=Failing(DataError("as it was said")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "image 1 is 9x8x3, and others of its batch are 8x8x3; let the recipe resize or crop"),
        ({"eval_images": ("normalize 0 0 0 1 1 1", "resize 4 4")}, None),
    ],
)
def test_images_of_other_sizes_are_refused_or_resized(changes, said):
    pair = [(X[0], 0), (np.zeros((9, 8, 3), np.uint8), 1)]
    train = as_data((pair, pair)).train
    if said is None:
        assert drawn(changes, False, train)[0].images.shape == (2, 3, 4, 4)
        return
    with pytest.raises(DataError, match=said):
        drawn(changes, False, train)


def test_images_of_other_channels_are_refused():
    pair = [(X[0], 0), (X[0, :, :, 0], 1)]
    with pytest.raises(DataError, match="image 1 is 8x8x1, and others of its batch are 8x8x3"):
        drawn({}, False, as_data((pair, pair)).train)
    for operations in (("normalize 0 0 0 1 1 1",), ("normalize 0 0 0 1 1 1", "resize 4 4")):
        with pytest.raises(DataError, match="normalize has 3 means, and images have 1 channels"):
            drawn({"eval_images": operations}, False, Arrays(X[..., :1], Y))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layout": "CHW"}, "layout must be one of NCHW, NHWC; received 'CHW'"),
        ({"workers": -1}, "workers and start must be at least 0, .* received workers=-1, start=0"),
        ({"start": -1}, "received workers=0, start=-1, process=0"),
        ({"process": 2, "processes": 2}, "and process one of 2; received .*process=2"),
    ],
)
def test_arguments_are_looked_at_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        batches(source(), CLASSES, made(), training=True, **arguments)


def test_without_grain_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'needs grain, .* pip install "overconv\[train\]"'):
        drawn()


# In a process of its own: that of tests would hand all that it imported to each worker.
WORKERS = """
import logging
import numpy as np
from doconv_core.training.data import ImageData, batches, series
from doconv_core.training.data.sources import Arrays
from doconv_core.training.recipe import recipe

class Telling(Arrays):
    def image(self, index):
        logging.getLogger("absl").warning("image")  # as grain does, what is not to be hidden
        return super().image(index)

if __name__ == "__main__":
    x = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
    train = Telling(x, np.arange(23) % 5)
    augmented = ("random_crop 8 2", "flip")
    made = recipe("digits", batch_size=4, epochs=2, mixup=0.3, train_images=augmented)
    def drawn(workers):
        return batches(train, 5, made, training=True, workers=workers)
    data = ImageData("both", tuple("abcde"), train, train)
    def parts(workers):
        found = series(data, made, start=1, workers=workers)
        yield from (batch for _ in range(5) for batch in found.part())
        found.close()
    for a, b in zip(parts(0), parts(2), strict=True):
        assert all(np.all(one == other) for one, other in zip(a, b))
    first = drawn(2)
    next(first), next(first)
    first.close()
    left = drawn(1)  # which is not closed, and as far as it came when Python ends
    next(left)
    print("drawn")
"""


def test_workers_prepare_the_same_and_leave_nothing_behind(tmp_path):
    (tmp_path / "program.py").write_text(WORKERS)
    done = fresh(tmp_path / "program.py")
    assert done.stdout == "drawn\n"
    assert {line.rpartition(":")[2] for line in done.stderr.splitlines()} == {"image"}


BROKEN = """
import sys
from doconv_core.training.data import BrokenImages, batches, open_data
from doconv_core.training.recipe import recipe

if __name__ == "__main__":
    train = open_data("folder", sys.argv[1], max_broken=1).train
    made = recipe("digits", batch_size=4, train_images=("resize 8 8",))
    try:
        list(batches(train, 2, made, training=True, workers=1))
    except BrokenImages as error:
        print(error)
"""


def test_errors_of_workers_are_told(tmp_path):
    (tmp_path / "program.py").write_text(BROKEN)
    done = fresh("-W", "ignore", tmp_path / "program.py", broken_folder(tmp_path / "data"))
    assert "PNG and 1 before it could not be read" in done.stdout


@pytest.mark.exhaustive
def test_the_benchmark_measures_both_and_an_index():
    done = fresh(training_data.__file__, "--quick")
    for name in ("500×375: crop", "2000×1500: crop", "jitter and lighting", "| 2,000 | 10 |"):
        assert name in done.stdout


def test_the_tables_of_the_benchmark():
    row = SimpleNamespace(
        case="a", seconds={"torch": 2.0, "ours": 1.6}, ratios={"ours": 0.8}, spread={"ours": 0.08}
    )
    assert training_data.table([row], 100).splitlines()[2] == "| a | 50 | 62 | **1.25** ± 0.12 |"
