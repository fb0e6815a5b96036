"""`docs/models.md` and its plots are what `docs/make_models.py` writes, and tell of every name."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import draw_models
import make_models
import pytest
from model_texts import SECTIONS

from doconv_core import count
from doconv_core.networks.names import list_models

DOCS = Path(make_models.__file__).parent
PLOTS = sorted(f"models_{amount}.svg" for amount in draw_models.AMOUNTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    make_models.write(folder)
    return folder


def rows_of(text):
    """Return the cells of every network of the page, by its name."""
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_the_page_is_what_the_command_writes(written):
    assert sorted(path.name for path in written.iterdir()) == ["models.md", *PLOTS]
    text = (written / "models.md").read_text(encoding="utf-8")
    assert text == (DOCS / "models.md").read_text(encoding="utf-8"), "run docs/make_models.py"


def test_every_name_has_its_row(written):
    rows = rows_of((written / "models.md").read_text(encoding="utf-8"))
    assert {*rows} == {name.removesuffix("_doconv") for name in list_models()}
    for name in ("cifar_wrn28_3_bsconvs_p1d4", "resnet50_v1b", "mobilenetv3_small", "tutorial_tf"):
        found = count(name, None, None)
        shown = [int(cell.replace(",", "")) for cell in rows[name][:3]]
        assert shown == [found.parameters, found.flops, found.macs]


def test_the_compact_names_are_all_names(written):
    text = (written / "models.md").read_text(encoding="utf-8")
    found = []
    for line in re.findall(r"^\d+×\d+×\d+, .* behind\.$", text, re.MULTILINE):
        names, _, suffixes = line.partition(": ")[2].partition(", also with ")
        names = re.findall(r"`(.*?)`", names)
        if "{" in names[0]:
            start, rests = names[0].removesuffix("}").split("{")
            names = [start + rest for rest in rests.split(",")]
        found += [n + s for s in ("", *re.findall(r"`(.*?)`", suffixes)) for n in names]
    assert sorted(found) == sorted(list_models())


def test_published_accuracies_stand_beside_their_networks(written):
    rows = rows_of((written / "models.md").read_text(encoding="utf-8"))
    with (DOCS / "data" / "bsconv_cifar100.csv").open(encoding="utf-8") as file:
        cifar = {row["model"]: row["accuracy_percent"] for row in csv.DictReader(file)}
    assert {name: rows[name][-1] for name in cifar} == cifar
    assert len(cifar) == 54
    with (DOCS / "data" / "doconv_imagenet.csv").open(encoding="utf-8") as file:
        imagenet = list(csv.DictReader(file))
    assert len(imagenet) == 20
    for row in imagenet:
        reference, baseline, over = rows[row["model"]][-3:]
        assert reference.strip() == row["reference_percent"]
        assert baseline == row["baseline_percent"]
        gain = float(row["gain_percent"])
        assert float(over) - float(baseline) == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_whole_and_the_same_each_time(name, written, tmp_path):
    root = ElementTree.parse(written / name).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (written / name).read_text(encoding="utf-8")
    for shown in ("ResNets", "WRN-28", "WRN-40", "BSConv-U", "depth 20, 56, 110, 302, 602"):
        assert shown in text  # what is drawn as curves is told in a comment
    assert "<dc:date>" not in text
    amount = name.removeprefix("models_").removesuffix(".svg")
    draw_models.draw(make_models.read("bsconv_cifar100.csv"), amount, tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_every_row_is_a_point_of_the_plots():
    rows = make_models.read("bsconv_cifar100.csv")
    drawn = [
        row["model"]
        for table, start in draw_models.FAMILIES.items()
        for suffix, *_ in draw_models.KINDS
        for row in draw_models.by_number(
            start, suffix, [row for row in rows if row["table"] == table]
        ).values()
    ]
    assert drawn == [row["model"] for row in rows]


def test_a_plot_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "plot.svg"
    target.write_text("before")

    def fails(figure, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="No space left"):
        draw_models.draw(make_models.read("bsconv_cifar100.csv"), "flops", target)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


def test_a_family_without_a_section_is_named(monkeypatch):
    monkeypatch.setattr(make_models, "SECTIONS", SECTIONS[:-1])
    monkeypatch.setattr(make_models, "_family", lambda family, figures: ())  # which takes long
    with pytest.raises(KeyError, match=r"no section of docs/model_texts\.py.*'tutorial_pt'"):
        make_models.page()
