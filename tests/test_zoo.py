"""The zoos' networks: a quick selection of them, and the sweep over all of them as a command."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import zoo
import zoo_check
import zoo_networks
import zoo_table
import zoo_worker
from frameworks import need
from zoo_networks import DRIVERS, ZOOS, Network
from zoo_row import Row

from doconv_core import Converted
from doconv_core.models.report import Change, Report
from doconv_core.networks.families import FAMILIES

BACKENDS = {"zoo_torch": "torch", "zoo_keras": "tf", "zoo_gluon": "mx"}
QUICK = [(name, network) for name in ZOOS for network in ZOOS[name] if network.quick]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "network"), QUICK, ids=lambda value: getattr(value, "name", None))
def test_network(name, network):
    need(BACKENDS[DRIVERS[name]])
    driver = importlib.import_module(DRIVERS[name])
    row = zoo_check.check(name, driver, network, driver.versions(network))
    assert row.problems == []
    original, training, folded = row.parameters
    assert original == folded < training
    assert (row.over, row.over_training, row.folded) == (0, 0, 0)
    assert row.replaced == row.moved > 0
    assert row.change > 0


@pytest.mark.exhaustive
def test_atrous_convolutions_are_over_parameterized_and_come_back():
    need("torch")
    driver = importlib.import_module("zoo_torch")
    named = {network.name: network for networks in ZOOS.values() for network in networks}
    network = named["deeplabv3_resnetd50b_voc"]
    model = driver.build(network, 0)
    atrous = atrous_convolutions(model)
    assert set(atrous.values()) >= {(2, 2), (4, 4), (12, 12), (24, 24), (36, 36)}
    new, report = driver.over_parameterize(model)
    assert atrous.keys() <= {change.path for change in report.changed}
    folded, _ = driver.fold(new, False)
    assert atrous == atrous_convolutions(new) == atrous_convolutions(folded)


def atrous_convolutions(model):
    """The dilations above 1 of a PyTorch model's convolutions, by path."""
    dilations = {path: getattr(layer, "dilation", 1) for path, layer in model.named_modules()}
    return {path: d for path, d in dilations.items() if isinstance(d, tuple) and max(d) > 1}


class TestNetworks:
    """The lists have what they are to have."""

    def test_each_zoo_has_a_quick_selection(self):
        assert {name for name, _ in QUICK} == set(ZOOS)

    @pytest.mark.parametrize("name", ZOOS)
    def test_names_are_unique(self, name):
        assert max(Counter(network.name for network in ZOOS[name]).values()) == 1

    def test_gluoncv_has_the_networks_of_the_papers_table(self):
        names = {network.name for network in ZOOS["gluon"]}
        depths, versions = (18, 34, 50, 101, 152), ("v1", "v1b", "v2")
        resnets = {f"resnet{depth}_{version}" for depth in depths for version in versions}
        mobile = {"mobilenet1.0", "mobilenetv2_1.0", "mobilenetv3_large"}
        assert names >= resnets | mobile | {"resnext50_32x4d"}

    def test_this_packages_own_are_of_every_family_and_kind(self):
        names = [network.name for network in ZOOS["doconv_torch"]]
        for other in ("doconv_tf", "doconv_mx"):
            assert [network.name for network in ZOOS[other]] == names
        bases = [re.sub("_(doconv|bsconvu|bsconvs_p1d[46])$", "", name) for name in names]
        folded = [family for family in FAMILIES if "heads" not in family.options]
        for family in folded:
            assert any(re.fullmatch(family.pattern, base) for base in bases), family.pattern
        kinds = ("_doconv", "_bsconvu", "_bsconvs_p1d4", "_bsconvs_p1d6")
        assert all(any(name.endswith(kind) for name in names) for kind in kinds)

    def test_pytorchcv_has_thirty_families(self):
        need("torch")
        provider = importlib.import_module("pytorchcv.model_provider")
        tried = [network.name for network in ZOOS["torch"] if network.failure is None]
        families = {provider._models[name].__module__ for name in tried}
        assert len(families) >= 30


NETWORK = Network("tiny", (2,))
EXPLAINED = Network("tiny", (2,), failure=("over-parameterizing changed", "It is made so."))


class Driver:
    """A framework of one network: it scales its input by a kernel, W or W and D."""

    def __init__(self, **faults):
        self.faults = faults

    def build(self, network, seed):
        return {"kernel": np.array([2.0, 3.0])}

    def settle(self, model, inputs):
        pass

    def norms(self, model):
        return []

    def read(self, variable):
        return variable.copy()

    def write(self, variable, value):
        variable[...] = value

    def outputs(self, model, inputs, training):
        kernel = model["kernel"] + model["kernel"] * model.get("d", 0) + model.get("error", 0)
        return {"": inputs[0] * kernel}

    def step(self, model, inputs, targets):
        model["d"] += self.faults.get("step", 0.5)
        return self.faults.get("loss", 1.0)

    def depthwise(self, model):
        return [model["d"]] if "d" in model else []

    def ordinary(self, model):
        return self.faults.get("ordinary", 1)

    def bsconvs(self, model):
        return 0

    def parameters(self, model):
        return sum(value.size for value in model.values())

    def entries(self, model):
        return {name: value.shape for name, value in model.items()}

    def traces(self, model):
        return self.faults.get("traces", [])

    def over_parameterize(self, model):
        new = {"kernel": model["kernel"].copy(), "d": np.zeros(2)}
        if "over" in self.faults:
            new["error"] = np.array(self.faults["over"])
        return self._converted("over-parameterized", model, new)

    def fold(self, model, fuse_batchnorm):
        if "fold" in self.faults:
            raise ValueError(self.faults["fold"])
        kernel = model["kernel"] + model["kernel"] * model["d"]
        fault = self.faults.get("fuse" if fuse_batchnorm else "folded", 0)
        return self._converted("folded", model, {"kernel": kernel + fault})

    def _converted(self, action, before, after):
        counts = (self.parameters(before), self.parameters(after))
        return Converted(after, Report(action, (Change("", "a", "b"),), (), *counts))

    def release(self):
        if "release" in self.faults:
            raise RuntimeError(self.faults["release"])


def check(network=NETWORK, **faults):
    return zoo_check.check("torch", Driver(**faults), network, "nothing 1.0")


class TestCheck:
    """What does not hold is found, and an error does not end the sweep."""

    def test_a_network_without_fault(self):
        row = check()
        assert row.problems == []
        assert row.parameters == (2, 4, 2)
        assert (row.over, row.folded, row.fused, row.moved) == (0, 0, 0, 1)

    @pytest.mark.parametrize(
        ("faults", "problem"),
        [
            ({"over": 1e-9}, "over-parameterizing changed the output by"),
            ({"ordinary": 2}, "1 layers were replaced; there are 2 convolutions to replace"),
            ({"loss": np.nan}, "the loss is nan"),
            ({"step": 0.0}, "training moved 0 of 1 depthwise weights"),
            ({"traces": ["DOConv2d"]}, "folding left DOConv2d"),
            ({"folded": 1e-9}, "folding changed the output by"),
            ({"fuse": 0.1}, "fusing changed the output by"),
            ({"fold": "not this one"}, "ValueError: not this one"),
            ({"release": "too late"}, "RuntimeError: too late"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_fault_is_found(self, faults, problem):
        assert any(p.startswith(problem) for p in check(**faults).problems)

    def test_a_fault_is_explained_where_the_explanation_is_of_it(self):
        row = check(EXPLAINED, over=1e-9)
        assert row.explanation(EXPLAINED) == ""  # the parameters are not what they were, too
        row.problems = row.problems[:1]
        assert row.explanation(EXPLAINED) == "It is made so."
        assert row.verdict(EXPLAINED) == "explained"

    def test_an_explanation_without_a_fault_is_a_fault(self):
        row = check(EXPLAINED)
        assert row.problems == ["did not fail, but was to, with 'over-parameterizing changed'"]
        assert row.verdict(EXPLAINED) == "FAILED"


@pytest.fixture
def two_zoos(monkeypatch):
    """Two zoos of networks without a framework, and a sweep that takes their rows as given."""
    zoos = {
        "torch": (Network("good", (2,), quick=True), Network("bad", (2,))),
        "keras": (Network("explained", (2,), failure=("it fails", "as it should")),),
    }
    problems = {"good": [], "bad": ["it fails"], "explained": ["it fails"]}
    for module in (zoo, zoo_table):
        monkeypatch.setattr(module, "ZOOS", zoos)
    asked = []

    def tried(name, networks):
        for network in networks:
            asked.append(network.name)
            yield Row(name, network.name, (2,), "1.0", 1, problems=problems[network.name])

    monkeypatch.setattr(zoo, "tried", tried)
    return asked


class TestCommand:
    """`python benchmarks/zoo.py`."""

    def test_an_unexplained_failure_is_the_exit_status(self, two_zoos, tmp_path, capsys):
        out = tmp_path / "zoo.md"
        assert zoo.main(["--out", str(out)]) == 1
        assert two_zoos == ["good", "bad", "explained"]
        assert "Not explained: torch bad" in capsys.readouterr().err
        assert zoo.main(["--out", str(out), "--zoo", "keras"]) == 1  # it is in the table still
        text = out.read_text(encoding="utf-8")
        assert "| good | 2 | 1 |" in text
        assert "- bad: it fails. **Not explained.**" in text
        assert "- explained: it fails. **as it should.**" in text
        assert zoo.main(["--out", str(out), "--only", "unheard-of"]) == 2

    def test_success_is_zero(self, two_zoos, tmp_path):
        assert zoo.main(["--out", str(tmp_path / "zoo.md"), "--quick"]) == 0
        assert zoo.main(["--out", str(tmp_path / "zoo.md"), "--only", "ex*"]) == 0
        assert two_zoos == ["good", "explained"]

    def test_a_sweep_goes_on_where_it_was_interrupted(self, two_zoos, tmp_path, monkeypatch):
        out = tmp_path / "zoo.md"
        whole = zoo.tried

        def interrupted(name, networks):
            yield next(whole(name, networks))
            raise KeyboardInterrupt

        monkeypatch.setattr(zoo, "tried", interrupted)
        assert zoo.main(["--out", str(out)]) == 130
        assert not out.exists()
        assert [row["name"] for row in json.loads((tmp_path / "zoo.json").read_text())] == ["good"]
        monkeypatch.setattr(zoo, "tried", whole)
        assert zoo.main(["--out", str(out), "--resume"]) == 1
        assert two_zoos == ["good", "bad", "explained"]
        text = out.read_text(encoding="utf-8")
        assert zoo.main(["--out", str(out), "--resume"]) == 1  # nothing is left to try
        assert out.read_text(encoding="utf-8") == text

    def test_a_process_that_dies_costs_one_row(self, tmp_path, monkeypatch):
        script = tmp_path / "worker.py"
        script.write_text(
            "import json, os, sys\n"
            "for name in sys.argv[2:]:\n"
            "    if name == 'deadly': print('sorry', file=sys.stderr, flush=True); os.abort()\n"
            "    row = dict(zoo='torch', name=name, shape=[], versions=os.environ.get('A', ''))\n"
            "    print('noise'); print('zoo row: ' + json.dumps(row), flush=True)\n"
        )
        monkeypatch.setattr(zoo_worker, "__file__", str(script))
        networks = [Network(name, ()) for name in ("a", "deadly", "b")]
        networks.append(Network("c", (), environment={"A": "of its own"}))
        rows = list(zoo_worker.tried("torch", networks))
        assert [row.name for row in rows] == ["a", "deadly", "b", "c"]
        assert [bool(row.problems) for row in rows] == [False, True, False, False]
        assert rows[1].problems[0].startswith("the process ended or hung: sorry")
        assert rows[3].versions == "of its own"

    def test_a_process_that_hangs_is_ended(self, tmp_path, monkeypatch):
        script = tmp_path / "worker.py"
        script.write_text("import time\ntime.sleep(600)\n")
        monkeypatch.setattr(zoo_worker, "__file__", str(script))
        monkeypatch.setattr(zoo_worker, "LIMIT", 0.1)
        (row,) = zoo_worker.tried("torch", [Network("slow", ())])
        assert row.problems[0].startswith("the process ended or hung")


def test_the_documents_table_is_of_these_networks():
    """The table in the documents has every network of the lists, and nothing unexplained."""
    record = zoo.OUT.with_suffix(".json")
    rows = {(row["zoo"], row["name"]): Row(**row) for row in json.loads(record.read_text("utf-8"))}
    networks = {(name, n.name): n for name, found in zoo_networks.ZOOS.items() for n in found}
    assert rows.keys() == networks.keys()
    verdicts = {key: row.verdict(networks[key]) for key, row in rows.items()}
    assert "FAILED" not in verdicts.values()
    assert zoo.OUT.read_text(encoding="utf-8") == zoo_table.document(list(rows.values()))
