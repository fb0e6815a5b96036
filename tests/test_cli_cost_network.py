"""`doconv cost` of a network given by its name: its table, its totals, JSON and the plot."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict

import pytest
from command_line import MISSING, TARGET, USAGE, doconv, save, state_dict

from doconv_core import count

PNG, SVG, PDF = b"\x89PNG\r\n", b"<?xml", b"%PDF-"


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("cifar_resnet20", (), (3, 32, 32), 100),
        ("cifar_resnet20_bsconvu", ("--input", "3x32x32", "--classes", "100"), (3, 32, 32), 100),
        ("cifar_wrn28_2_doconv", ("--input", "1x64x48", "--classes", "7"), (1, 64, 48), 7),
        ("resnet18_v2_doconv", (), (3, 224, 224), 1000),
        ("resnet50_v1b", (), None, None),
        ("mobilenetv3_small", ("--input", "160x128"), (3, 160, 128), 1000),
        ("tutorial_tf_doconv", ("--input", "20x20"), (1, 20, 20), 10),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_json(name, options, shape, classes, batch):
    found = json.loads(doconv("cost", name, *options, "--batch", batch, "--json").stdout)
    expected = count(name, shape, classes)
    shape, classes = expected.input_shape, *expected.output_shape
    assert found["network"] == name
    assert found["batch"] == batch
    assert found["input"] == list(shape)
    assert found["output"] == [classes]
    assert found["total"] == {
        "parameters": expected.parameters,
        "flops": batch * expected.flops,
        "macs": batch * expected.macs,
        "training_parameters": expected.training_parameters,
        "composition_macs": expected.composition_macs,
    }
    assert len(found["layers"]) == len(expected.layers)
    for row, layer in zip(found["layers"], expected.layers, strict=True):
        told = json.loads(json.dumps(asdict(layer)))
        assert told.pop("branch_macs") == 0
        assert (told.pop("heads"), told.pop("dgc_flops")) == (None, layer.dgc_flops)
        assert row == told | {"flops": batch * layer.flops, "macs": batch * layer.macs}


def test_a_kind_in_the_places_of_convolutions_is_counted():
    found = json.loads(
        doconv("cost", "cifar_resnet20", "--kind", "repvgg", "--batch", 2, "--json").stdout
    )
    expected = count("cifar_resnet20", kind="repvgg")
    assert found["total"]["branch_macs"] == 2 * expected.branch_macs > 0
    assert found["total"]["training_parameters"] == expected.training_parameters
    assert [row["kind"] for row in found["layers"]].count("repvgg") == 19
    told = doconv("cost", "cifar_resnet20", "--kind", "orepa").stdout
    assert f"{count('cifar_resnet20_orepa').composition_macs:,}" in told
    refused = doconv("cost", "cifar_resnet20", "--kind", "vgg", code=USAGE, error="received 'vgg'")
    assert not refused.stdout


def test_dynamic_groups_are_counted_as_in_their_tables_and_as_they_run():
    sizes = ("--classes", 10, "--stages", "2-2-2", "--growth", "4-8-16")
    cost = count("cifar_dydensenet86", None, 10, stages=(2, 2, 2), growth=(4, 8, 16))
    found = json.loads(doconv("cost", cost.name, *sizes, "--batch", 2, "--json").stdout)
    assert found["total"]["dgc_flops"] == 2 * 1520190
    assert found["total"]["heads"] == cost.heads._asdict()
    rows = {row["path"]: row["heads"] for row in found["layers"] if row["heads"]}
    assert len(rows) == 6
    told = doconv("cost", cost.name, *sizes).stdout
    assert re.search(r"operations by DGC's rule +1,520,190\n", told)
    skipping = cost.macs - cost.heads.dense + cost.heads.kept + cost.heads.selector
    assert re.search(rf"dropped channels skipped +{skipping:,}\n", told)
    for args, message in (
        (("resnet18", "--heads", 2), "'resnet18' takes no options; received heads=2"),
        (("64,64,3x3", "--gate-factor", 0.5), "--gate-factor is for networks, given by name"),
        ((cost.name, "--stages", "2-x"), "'2-x' is no list; write it as 14-14-14"),
    ):
        assert message in doconv("cost", *args, code=USAGE).stderr


def test_a_table_to_read():
    lines = doconv("cost", "cifar_resnet20", "--batch", "2").stdout.splitlines()
    found = count("cifar_resnet20")
    assert lines[0] == "cifar_resnet20: 2 images of 3x32x32"
    assert lines[2].split() == [
        "layer", "kind", "kernel", "input", "output", "parameters", "multiply-accumulates",
        "operations", "share",
    ]  # fmt: skip
    rows = {line.split()[0]: line.split()[1:] for line in lines[3 : 3 + len(found.layers)]}
    share = 100 * 9 * 16 * 16 * 1024 / found.flops
    assert rows["stage1.unit1.conv1"] == [
        "conv", "3x3", "16x32x32", "16x32x32", "2,304", "4,718,592", "4,718,592",
        f"{share:.1f}", "%",
    ]  # fmt: skip
    assert rows["stage1.relu1"] == [
        "relu", "16x32x32", "16x32x32", "0", "0", "32,768", "0.0", "%",
    ]  # fmt: skip
    totals = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in lines[-3:]}
    assert totals == {
        "parameters": f"{found.parameters:,}",
        "multiply-accumulates": f"{2 * found.macs:,}",
        "operations": f"{2 * found.flops:,}",
    }


def test_what_a_network_costs_in_training_is_in_the_totals():
    lines = doconv("cost", "plain18_doconv", "--batch", "2").stdout.splitlines()
    found = count("plain18_doconv", None, None)
    totals = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in lines[-5:]}
    assert totals == {
        "parameters, folded": f"{found.parameters:,}",
        "parameters in training": f"{found.training_parameters:,}",
        "multiply-accumulates": f"{2 * found.macs:,}",
        "operations": f"{2 * found.flops:,}",
        "multiply-accumulates of composing the kernels": f"{found.composition_macs:,}",
    }


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("plain18", state_dict())
    line = doconv("cost", "plain18", "--kernel-size", "block.1=3x3").stdout.splitlines()[0]
    assert line.startswith("plain18: 1 image; where no output is told")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cifar_resnet21"], "'cifar_resnet21' is no file, and no layer such as 64,64,3x3, and no "
         "network: the depth of a cifar_resnet is 20, 56.*the nearest are 'cifar_resnet20'"),
        (["resnet50_v1_bsconvu"], "resnet50_v1 has no BSConv variant.*nearest are 'resnet50_v1"),
        (["cifar_resnet20", "--input", "32"], "--input of a network is rows.*received 32"),
        (["cifar_resnet20", "--input", "1x3x32x32"], "or channels before them.*received 1x3x32x32"),
        (["tutorial_tf", "--input", "4x4"], "tutorial_tf: 'conv2' needs at least 3 .*too small"),
        (["plain18", "--classes", "0"], "'--classes'.*0 is not in the range"),
        (["plain18", "--at", "conv1=/2"], "'plain18' is no file, as --at, --kernel-size and"),
        (["plain18", "--kernel-size", "3x3"], "'plain18' is no file, as --at, --kernel-size and"),
        (["64,64,3x3", "--input", "9x9", "--classes", "3"], "--classes, --plot, --kind and"),
        (["64,64,3x3", "--input", "9x9", "--plot", "a.png"], "are for networks, given by name"),
        (["64,64,3x3", "--input", "9x9", "--force"], "are for networks, given by name"),
        (["plain18", "--plot", "plot.txt"], "OUT must end in .png, .svg or .pdf; received 'plot.t"),
        (["plain18", "--plot", "plot"], "OUT must end in .png, .svg or .pdf; received 'plot'"),
    ],
)  # fmt: skip
def test_wrong_usage(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doconv("cost", *args, code=USAGE, error=message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "begins"), [("png", PNG), ("svg", SVG), ("PDF", PDF)])
def test_a_plot(suffix, begins, tmp_path):
    target = tmp_path / f"cost.{suffix}"
    done = doconv("cost", "cifar_resnet20_bsconvs_p1d4", "--plot", target)
    assert done.stdout.startswith("cifar_resnet20_bsconvs_p1d4: 1 image of 3x32x32\n")
    assert target.read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_plot_names_the_layers_that_multiply(tmp_path):
    doconv("cost", "tutorial_tf", "--plot", tmp_path / "cost.svg")
    text = (tmp_path / "cost.svg").read_text(encoding="utf-8")
    for name in ("conv1", "conv2", "dense", "classifier", "parameters", "operations"):
        assert f"<!-- {name} -->" in text
    found = count("tutorial_tf", None, None)
    relu = 100 * sum(row.flops for row in found.layers if row.kind == "relu") / found.flops
    assert f"other layers take {relu:.1f} % of the operations" in text


def test_a_plot_of_very_many_layers_names_some(tmp_path):
    doconv("cost", "cifar_wrn40_1_bsconvs_p1d4", "--plot", tmp_path / "cost.svg")
    text = (tmp_path / "cost.svg").read_text(encoding="utf-8")
    rows = [row for row in count("cifar_wrn40_1_bsconvs_p1d4").layers if row.macs]
    named = [f"<!-- {row.path} -->" in text for row in rows]
    assert 30 <= sum(named) <= 60
    assert named[0]


def test_a_plot_replaces_nothing_unless_told(tmp_path):
    target = tmp_path / "cost.png"
    target.write_text("mine")
    args = ("cost", "tutorial_pt", "--plot", target)
    doconv(*args, code=TARGET, error="cost.png exists; use --force to replace it")
    assert target.read_text() == "mine"
    doconv(*args, "--force")
    assert target.read_bytes().startswith(PNG)


def test_a_plot_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "cost.png"
    target.write_text("mine")

    def fails(figure, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    args = ("cost", "tutorial_pt", "--plot", target, "--force")
    doconv(*args, code=TARGET, error="cost.png could not be written: No space left on device")
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["cost.png"]


def test_a_plot_in_no_folder(tmp_path):
    target = tmp_path / "nowhere" / "cost.png"
    doconv("cost", "tutorial_pt", "--plot", target, code=TARGET, error="nowhere.* does not exist")


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = (
        r"--plot needs matplotlib, which is not installed.*pip install \"overconv\[samples\]\""
    )
    args = ("cost", "tutorial_pt", "--plot", tmp_path / "cost.png")
    doconv(*args, code=MISSING, error=message)
    assert not list(tmp_path.iterdir())
    doconv("cost", "tutorial_pt")  # the rest does without it
