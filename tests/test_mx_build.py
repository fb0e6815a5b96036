"""Networks from descriptions, in Gluon: hybridized, stored, exported, and side by side."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import build  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402
from networks.described import NETWORKS, SHAPE, USUAL  # noqa: E402

from doconv_core.networks.nodes import Conv, Network, sequence  # noqa: E402
from doconv_mx.surgery import copied  # noqa: E402

X = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)


def outputs(model):
    return model(mx.nd.array(X)).asnumpy()


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
@pytest.mark.parametrize("name", NETWORKS)
def test_copied_stored_hybridized_and_exported(name, tmp_path):
    mx.random.seed(1)
    model, file = build(NETWORKS[name]), str(tmp_path / "net")
    model.initialize(mx.init.Xavier())
    expected = outputs(model)
    assert expected.std() > 0
    np.testing.assert_array_equal(outputs(copied(model)), expected, "copied")
    other = build(NETWORKS[name])
    model.save_parameters(f"{file}.params")
    other.load_parameters(f"{file}.params")
    np.testing.assert_array_equal(outputs(other), expected, "stored")
    other = build(NETWORKS[name])
    model.collect_params().save(f"{file}.names", strip_prefix=model.prefix)
    other.collect_params().load(f"{file}.names", restore_prefix=other.prefix)
    np.testing.assert_array_equal(outputs(other), expected, "stored by name")
    for flags in ({"static_alloc": True, "static_shape": True}, {}):
        model.hybridize(**flags)
        np.testing.assert_allclose(outputs(model), expected, 1e-5, 1e-6, err_msg=str(flags))
    model.export(file)
    block = SymbolBlock.imports(f"{file}-symbol.json", ["data"], f"{file}-0000.params")
    np.testing.assert_allclose(outputs(block), expected, 1e-5, 1e-6, err_msg="exported")


@pytest.mark.parametrize("name", USUAL)
def test_two_in_one_network_have_parameters_of_their_own(name):
    net = nn.HybridSequential()
    pair = [build(NETWORKS[name]) for _ in range(2)]
    net.add(*pair)
    parameters = net.collect_params()
    assert len(list(parameters)) == 2 * len(list(pair[0].collect_params()))
    assert not any("." in each for each in parameters)
    net.initialize()
    Trainer(parameters, "sgd")


def test_it_reads_as_described():
    model = build(NETWORKS["residuals"])
    lines = repr(model).splitlines()
    assert lines[0] == "Network("
    assert "    (1): Residual(" in lines
    assert "        (activation): ReLU6" in lines
    assert "      (shortcut): HybridSequential(" in lines
    assert model.stem is model[0]
    model.initialize()
    names = list(model.collect_params())
    assert names[0] == f"{model.prefix}stem_weight"
    assert f"{model.prefix}stage1_1_shortcut_conv_weight" in names
    assert model.prefix.startswith("residuals")


def test_a_name_that_blocks_have_themselves_is_refused():
    with pytest.raises(ValueError, match="cannot have a child named 'prefix', a block's own"):
        build(Network("one", sequence(("prefix", Conv(1))), SHAPE))
