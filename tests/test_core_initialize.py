import numpy as np
import pytest
from cases import one_test, refuses
from described import KINDS, whole

from doconv_core import ConvSpec, compose
from doconv_core.kinds.base import recipe
from doconv_core.networks.initialize import initialize
from doconv_core.networks.lowering import layers
from doconv_core.networks.nodes import Conv, DynamicHeads, Flatten, Linear, Network, sequence

kinds = pytest.mark.parametrize("kind", KINDS)


def many(*named, channels=48):
    return Network("net", sequence(*named), (channels, 5, 5))


def weight_of(node, seed=0, name="conv"):
    arrays = initialize(many(("flatten", Flatten()), (name, node)), seed).arrays
    return arrays[f"{name}.weight"]


def conv_weight(node, seed=0, name="conv"):
    return initialize(many((name, node)), seed).arrays[f"{name}.weight"]


@one_test
@pytest.mark.parametrize(
    ("node", "fan_in"),
    [
        (Conv(64, (3, 3)), 48 * 9),
        (Conv(64, (3, 3), kind=recipe("doconv")), 48 * 9),
        (Conv(64, (5, 1), groups=4), 12 * 5),
        (Conv(48 * 20, (3, 3), groups=0), 9),
        (Conv(200), 48),
    ],
)
def test_convolutions_are_kaiming_uniform(node, fan_in):
    weight = conv_weight(node).astype(np.float64)
    bound = np.sqrt(6 / fan_in)
    assert np.abs(weight).max() <= np.float32(bound)
    assert np.abs(weight).max() > 0.99 * bound
    assert weight.var() == pytest.approx(2 / fan_in, rel=0.05)
    assert abs(weight.mean()) < 4 * np.sqrt(2 / fan_in / weight.size)


@one_test
@pytest.mark.parametrize(
    ("weight", "fans"),
    [
        (lambda: conv_weight(Conv(300), name="classifier"), 48 + 300),
        (lambda: conv_weight(Conv(300, bias=True), name="classifier"), 48 + 300),
        (lambda: weight_of(Linear(20)), 48 * 25 + 20),
    ],
)
def test_classifiers_are_xavier_normal(weight, fans):
    drawn = weight().astype(np.float64)
    deviation = np.sqrt(2 / fans)
    assert drawn.var() == pytest.approx(deviation**2, rel=0.05)
    assert abs(drawn.mean()) < 4 * deviation / np.sqrt(drawn.size)
    beyond = np.mean(np.abs(drawn) > 2 * deviation)  # 4.55 % of a normal distribution
    assert beyond == pytest.approx(0.0455, abs=0.01)


@one_test
@kinds
def test_the_rest_starts_at_its_constants(kind):
    constants = {"gamma": 1, "running_var": 1, "beta": 0, "running_mean": 0}
    constants |= {"bias": 0, "depthwise_weight": 0}
    found = set()
    for entry, array in initialize(whole(KINDS[kind])).arrays.items():
        name = entry.split(".")[-1]
        assert array.dtype == np.float32
        assert np.all(array == constants[name]) if name in constants else array.std() > 0
        found.add(name)
    assert found == {*constants, "weight"} - ({"depthwise_weight"} if kind != "doconv" else set())


@one_test
@kinds
def test_the_same_seed_gives_the_same_state_and_another_another(kind):
    network = whole(KINDS[kind])
    first, again, other = (initialize(network, seed) for seed in (3, 3, 4))
    assert first.layers == again.layers == layers(network)
    for entry, array in first.arrays.items():
        assert np.array_equal(array, again.arrays[entry])
        if entry.endswith(".weight") and "depthwise_weight" not in entry:
            assert not np.array_equal(array, other.arrays[entry])


def test_arrays_come_in_the_order_of_the_layers_and_their_shapes():
    """Which the seed of Python's hashes does not change."""
    heads = [(f"heads{n}", DynamicHeads(48, heads=2, squeeze_rate=4)) for n in range(8)]
    state = initialize(many(("conv", Conv(48, (3, 3), kind=recipe("doconv"), bias=True)), *heads))
    shapes = [(path, name) for path, form in state.layers.items() for name in form.shapes]
    assert list(state.arrays) == [f"{path}.{name}" for path, name in shapes]


def test_no_two_arrays_are_alike():
    arrays = initialize(many(("a", Conv(48, (3, 3))), ("b", Conv(48, (3, 3))))).arrays
    assert not np.array_equal(arrays["a.weight"], arrays["b.weight"])


def test_another_layer_changes_none_of_the_others():
    plain = many(("a", Conv(8, (3, 3))), ("b", Conv(48)))
    longer = many(("new", Conv(48)), ("a", Conv(8, (3, 3))), ("more", Conv(8)), ("b", Conv(48)))
    expected, found = initialize(plain).arrays, initialize(longer).arrays
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_doconv_network_starts_as_the_ordinary_one():
    plain, over = (initialize(whole(KINDS[kind])).arrays for kind in ("conv", "doconv"))
    spec = ConvSpec(3, 6, (5, 3))
    kernel = compose(over["stem.weight"], over["stem.depthwise_weight"], spec)
    assert np.array_equal(kernel.reshape(plain["stem.weight"].shape), plain["stem.weight"])
    assert all(np.array_equal(over[name], array) for name, array in plain.items())


def test_the_numbers_stay_what_they_are():
    weight = conv_weight(Conv(4, (3, 3)), seed=1)
    assert weight[:, 0, 0] == pytest.approx(
        [-0.06101965, 0.10185228, 0.05687324, 0.08721686], rel=1e-5
    )


test_other_seeds_are_refused = refuses(
    lambda seed: initialize(whole(KINDS["conv"]), seed),
    (-1, ValueError, "seed must be at least 0; received seed=-1"),
    (1.5, TypeError, r"seed must be an integer; received seed=1\.5"),
    (None, TypeError, "seed must be an integer; received seed=None"),
)
