"""Recipes: how a network is trained, as data that is the same for every framework."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from doconv_core.networks.names import describe
from doconv_core.networks.nodes import FAN_OUT
from doconv_core.training.fields import CONSTANT, FIELDS, ITERATION, STEPS, WEIGHTS
from doconv_core.training.named import NAMED, TUTORIALS_ON_DIGITS

if sys.version_info >= (3, 11):
    import tomllib
else:  # its forerunner, which is installed for Python 3.10
    import tomli as tomllib

SUFFIX = ".toml"
DIGITS = "digits"  # the data of that name, and its recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: everything but the network, the images and the seed.

    name: what it is called, in the run and in lists.
    epochs: how often each image is seen. batch_size: images of a step, in all processes together.
    accumulate: into how many parts a process divides its share of a batch, to need less memory.
    optimizer: "sgd" (with momentum), "nesterov" or "adamw". learning_rate: the highest.
    momentum: of AdamW the first beta. beta2, epsilon: AdamW's.
    weight_decay: times the weight, added to its gradient; AdamW subtracts it from the weight, times
    the learning rate. decay_exempt: the roles it does not act on, of "norms" (gamma and beta of any
    norm), "biases" (any) and "depthwise" (D, which decays towards the identity).
    schedule: of the learning rate: "constant"; "steps", where it is multiplied by `factor` at the
    start of each epoch of `milestones`, counted from 0; "cosine", down to 0. per: whether the
    cosine goes on with each "iteration" or each "epoch". warmup_epochs: in which it rises from 0.
    clip_norm: the norm of all gradients together to which a larger one is scaled; None for any.
    label_smoothing: the share of a target that all classes have evenly. mixup: alpha of the Beta
    distribution of which a batch's share is drawn; 0 for none. mixup_off_epochs: the last epochs,
    which go without.
    average: the decay of the exponential moving average with which the model is evaluated; None for
    the weights as they are. average_of: the average of the "weights", or of the "kernels" that they
    compose, which is another.
    orthonormality: the weight of the orthonormality loss (alpha of BSConv). lasso: the weight of
    the saliencies (lambda of DGC). zero_last_gamma: whether the last norm of each residual unit
    starts from gamma 0. drop_last: whether an epoch's last batch is left out where it is short.
    train_images, eval_images: the operations on each image, one after the other.
    Raises TypeError and ValueError for what cannot be, in one line that names the field.

    >>> Recipe(name="mine", epochs=2, batch_size=32, optimizer="sgd", learning_rate=0.1).momentum
    0.9
    """

    name: str
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    accumulate: int = 1
    momentum: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decay_exempt: tuple[str, ...] = ()
    schedule: str = CONSTANT
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 0.0
    per: str = ITERATION
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    mixup_off_epochs: int = 0
    average: float | None = None
    average_of: str = WEIGHTS
    orthonormality: float = 0.0
    lasso: float = 0.0
    zero_last_gamma: bool = False
    drop_last: bool = False
    train_images: tuple[str, ...] = ()
    eval_images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate every field, and store plain numbers and tuples in place of what came."""
        for name, field in FIELDS.items():
            object.__setattr__(self, name, field.check(name, getattr(self, name)))
        _check_together(self)


def recipe(name: str, **changes: Any) -> Recipe:
    """Return the recipe of this name, or of a file whose name ends in ".toml".

    changes: fields that are to be others. Raises ValueError for a name that is none, with the
    nearest, and for a file that holds none; TypeError and ValueError for fields that cannot be;
    OSError for a file that cannot be read.

    >>> recipe("bsconv_cifar", epochs=160, milestones=(80, 120)).learning_rate
    0.1
    """
    if not isinstance(name, str):
        raise TypeError(f"a recipe is given by its name, a string; received {name!r}.")
    if name.endswith(SUFFIX):
        return _with(read_recipe(Path(name)), changes)
    if name not in NAMED:
        nearest = get_close_matches(name, NAMED, 3, 0)
        raise ValueError(
            f"{name!r} is no recipe, and no file that ends in {SUFFIX}; the nearest are "
            f"{', '.join(nearest)}."
        )
    return _with(Recipe(name=name, **NAMED[name]), changes)


def recipes() -> tuple[str, ...]:
    """Return the names that `recipe` knows.

    >>> recipes()[:2]
    ('bsconv_cifar', 'bsconv_finegrained')
    """
    return tuple(NAMED)


def default_recipe(network: str, data: str) -> Recipe:
    """Return the recipe for a network, given by its name, on data of this name.

    That of the network's family, with which it was published; on "digits" and "mnist" the one for
    digits, in the size of the network's images, and on "dogs" that of fine-grained images. Raises
    ValueError for a name that is no network.

    >>> default_recipe("cifar_resnet20_doconv", "cifar100").name
    'bsconv_cifar'
    """
    described = describe(network)
    tutorial = next((name for name in TUTORIALS_ON_DIGITS if network.startswith(name)), None)
    if tutorial is not None:
        return recipe(tutorial, **(TUTORIALS_ON_DIGITS[tutorial] if data == DIGITS else {}))
    if data in (DIGITS, "mnist"):
        resize = ("resize {} {}".format(*described.input_shape[1:]),)
        return recipe(DIGITS, train_images=resize, eval_images=resize)
    cifar = network.startswith("cifar_")
    if described.start == FAN_OUT:  # dynamic networks, and what they are compared with
        return recipe("dgc_cifar" if cifar else "dgc_imagenet")
    if cifar:
        return recipe("bsconv_cifar")
    return recipe("bsconv_finegrained" if data == "dogs" else "gluoncv_imagenet")


def changed(old: Recipe, texts: Mapping[str, str]) -> Recipe:
    """Return the recipe with fields changed to what texts say, as of `--set`.

    Entries of a tuple have a comma between them; no text stands for none of them. What may be None
    is "none", and what is so or not is "true" or "false". All changes are made together. Raises
    ValueError or TypeError for an unknown field, and for a value that cannot be.

    >>> changed(recipe("bsconv_cifar"), {"epochs": "20", "milestones": "10,15"}).milestones
    (10, 15)
    """
    known = {name: text for name, text in texts.items() if name in FIELDS}
    return _with(old, {**texts, **{name: FIELDS[name].read(text) for name, text in known.items()}})


def to_json(made: Recipe) -> dict[str, Any]:
    """Return all fields as what JSON and TOML have, to keep with a run; `from_json` reads it.

    >>> to_json(recipe("bsconv_cifar"))["milestones"]
    [100, 150, 180]
    """
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(made).items()
    }


def from_json(entries: Mapping[str, Any]) -> Recipe:
    """Return the recipe of such fields; those that have a default may lack.

    Raises TypeError or ValueError for unknown fields, for missing ones, and for values that cannot
    be.

    >>> from_json(to_json(recipe("digits"))) == recipe("digits")
    True
    """
    if not isinstance(entries, Mapping):
        raise TypeError(f"a recipe is an object of fields; received {entries!r}.")
    _check_known(entries)
    needed = [field.name for field in fields(Recipe) if field.default is MISSING]
    missing = [name for name in needed if name not in entries]
    if missing:
        raise ValueError(f"a recipe needs {', '.join(needed)}; {', '.join(missing)} is missing.")
    return Recipe(**entries)


def to_toml(made: Recipe) -> str:
    """Return the text of a TOML file that `read_recipe` reads; what is None is a comment.

    >>> to_toml(recipe("bsconv_cifar")).splitlines()[1]
    'epochs = 200'
    """
    # What JSON writes of text, numbers and lists is TOML, too.
    return "".join(
        f"# {name}: none\n"
        if value is None
        else f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in to_json(made).items()
    )


def read_recipe(file: Path) -> Recipe:
    """Return the recipe of a TOML file, whose keys are fields; without a name, the file's.

    Raises ValueError, which begins with the file, for what is no recipe; OSError for what cannot be
    read.
    """
    text = file.read_bytes()
    try:
        entries = tomllib.loads(text.decode())
        return from_json({"name": file.stem, **entries})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None


def check_data(made: Recipe, classes: int, images: int) -> None:
    """Raise ValueError where a recipe cannot train on data of so many classes and images.

    >>> check_data(recipe("digits", mixup=0.2), classes=1, images=100)
    Traceback (most recent call last):
    ValueError: mixup mixes images of different classes; received mixup=0.2 for data of one class.
    """
    if images < 1:
        raise ValueError("the data has no images to train on.")
    if made.mixup and classes < 2:
        raise ValueError(
            "mixup mixes images of different classes; received "
            f"mixup={made.mixup} for data of one class."
        )
    if made.drop_last and images < made.batch_size:
        raise ValueError(
            f"drop_last leaves out the last short batch, and of {images} images there is no other: "
            f"batch_size must be at most {images}; received batch_size={made.batch_size}."
        )


def _with(old: Recipe, changes: Mapping[str, Any]) -> Recipe:
    _check_known(changes)
    return replace(old, **changes)


def _check_known(entries: Mapping[str, Any]) -> None:
    for name in entries:
        if name not in FIELDS:
            nearest = get_close_matches(str(name), FIELDS, 3, 0)
            raise ValueError(
                f"a recipe has no field {name!r}; the nearest are {', '.join(nearest)}."
            )


def _check_together(made: Recipe) -> None:
    """Raise ValueError where fields do not fit each other."""
    _check_at_most("accumulate", made.accumulate, "batch_size", made.batch_size)
    _check_at_most("mixup_off_epochs", made.mixup_off_epochs, "epochs", made.epochs)
    if made.warmup_epochs >= made.epochs:
        raise ValueError(
            f"warmup_epochs must be below epochs={made.epochs}; received "
            f"warmup_epochs={made.warmup_epochs}."
        )
    if made.schedule != STEPS:
        return
    if not made.milestones:
        raise ValueError(
            'schedule="steps" needs milestones, the epochs at which the rate changes; without, it '
            'is "constant".'
        )
    if made.milestones[-1] >= made.epochs:
        raise ValueError(
            f"milestones must be below epochs={made.epochs}; received milestones={made.milestones}."
        )


def _check_at_most(name: str, value: int, limit: str, most: int) -> None:
    if value > most:
        raise ValueError(f"{name} must be at most {limit}={most}; received {name}={value}.")
