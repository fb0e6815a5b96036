"""Recipes: what one may be, by name, from a file and with changes; and what the data refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from cases import one_test, refuses

from doconv_core import Recipe, recipe, recipes
from doconv_core.training.recipe import (
    changed,
    check_data,
    default_recipe,
    from_json,
    read_recipe,
    to_json,
    to_toml,
)

LEAST = {
    "name": "mine", "epochs": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1,
}  # fmt: skip


def test_a_recipe_is_frozen_and_keeps_plain_values():
    made = Recipe(**{**LEAST, "learning_rate": 1, "train_images": [" random_crop  32 4", "flip"]})
    assert type(made.learning_rate) is float
    assert made.train_images == ("random_crop 32 4", "flip")
    with pytest.raises(FrozenInstanceError):
        made.epochs = 3
    with pytest.raises(TypeError):
        Recipe("mine", 2, 8, "sgd", 0.1)


@one_test
@pytest.mark.parametrize("name", recipes())
def test_named_recipes_go_to_json_and_toml_and_back(name, tmp_path):
    made = recipe(name)
    assert made.name == name
    assert from_json(to_json(made)) == made
    file = tmp_path / "my.toml"
    file.write_text(to_toml(made), encoding="utf-8")
    assert read_recipe(file) == recipe(str(file)) == made


# What the papers' implementations are run with.
FACTS = {
    "bsconv_cifar": {
        "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 128,
        "milestones": (100, 150, 180), "orthonormality": 0.1, "drop_last": False, "eval_images": (),
    },
    "bsconv_finegrained": {"eval_images": ("resize 256 256", "center_crop 224")},
    "gluoncv_imagenet": {
        "optimizer": "nesterov", "learning_rate": 0.4, "batch_size": 1024, "epochs": 120,
        "warmup_epochs": 5, "schedule": "cosine", "per": "iteration", "drop_last": True,
    },
    "gluoncv_cifar": {"optimizer": "nesterov", "factor": 0.1, "weight_decay": 1e-4},
    "dgc_cifar": {
        "optimizer": "nesterov", "lasso": 1e-5, "epochs": 300, "batch_size": 64,
        "schedule": "cosine", "decay_exempt": (), "warmup_epochs": 0,
    },
    "dgc_imagenet": {"epochs": 120, "batch_size": 256, "lasso": 1e-5},
    "tutorial_pt": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1, "epochs": 2},
    "tutorial_tf": {"optimizer": "adamw", "weight_decay": 0, "learning_rate": 1e-3, "epochs": 5},
    "tutorial_gluon": {"optimizer": "sgd", "momentum": 0, "learning_rate": 0.03, "epochs": 10},
    "digits": {"optimizer": "nesterov", "schedule": "cosine"},
}  # fmt: skip


@one_test
@pytest.mark.parametrize("name", recipes())
def test_named_recipes_are_those_of_the_implementations(name):
    made = to_json(recipe(name, **FACTS[name]))
    assert made == to_json(recipe(name))


@one_test
@pytest.mark.parametrize(
    ("network", "data", "expected"),
    [
        ("cifar_resnet20_doconv", "cifar100", "bsconv_cifar"),
        ("cifar_dydensenet86", "cifar10", "dgc_cifar"),
        ("dyresnet18", "folder", "dgc_imagenet"),
        ("resnet18_v1b_doconv", "folder", "gluoncv_imagenet"),
        ("mobilenetv2_w1_bsconvs_p1d6", "dogs", "bsconv_finegrained"),
        ("tutorial_tf_doconv", "mnist", "tutorial_tf"),
        ("cifar_resnet20", "digits", "digits"),
    ],
)
def test_networks_have_a_recipe_of_their_family(network, data, expected):
    assert default_recipe(network, data) == recipe(expected)


def test_on_digits_tutorials_take_more_epochs_and_images_the_networks_size():
    made = default_recipe("tutorial_pt_doconv", "digits")
    assert made == recipe("tutorial_pt", epochs=150, learning_rate=0.03)
    assert default_recipe("resnet10", "digits").eval_images == ("resize 224 224",)


@one_test
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", " 200", 200),
        ("learning_rate", "1e-3", 1e-3),
        ("optimizer", "adamw", "adamw"),
        ("milestones", "10, 20", (10, 20)),
        ("decay_exempt", "norms,biases", ("norms", "biases")),
        ("decay_exempt", "", ()),
        ("clip_norm", "none", None),
        ("clip_norm", "5", 5.0),
        ("average", "0.999", 0.999),
        ("drop_last", "true", True),
        ("zero_last_gamma", "False", False),
        ("train_images", "random_crop 32 4,flip", ("random_crop 32 4", "flip")),
    ],
)
def test_texts_become_what_their_field_is(field, text, value):
    old = recipe("bsconv_cifar", clip_norm=1.0, decay_exempt=("depthwise",))
    found = getattr(changed(old, {field: text}), field)
    assert found == value
    assert type(found) is type(value)


def test_an_integer_beyond_all_numbers_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        recipe("bsconv_cifar", weight_decay=10**400)


def test_changes_are_made_together():
    made = changed(recipe("bsconv_cifar"), {"epochs": "20", "milestones": "10,15"})
    assert (made.epochs, made.milestones) == (20, (10, 15))


test_texts_that_cannot_be_are_refused = refuses(
    lambda texts: changed(recipe("bsconv_cifar"), texts),
    ({"lr": "1"}, ValueError, "a recipe has no field 'lr'; the nearest are"),
    ({"epochs": "ten"}, TypeError, "epochs must be an integer; received epochs='ten'"),
    ({"epochs": "0"}, ValueError, "epochs must be at least 1; received epochs=0"),
    ({"learning_rate": "-1"}, ValueError, "learning_rate must be above 0; .*=-1.0"),
    ({"learning_rate": "nan"}, ValueError, "learning_rate must be finite"),
    ({"epochs": "9000000000"}, ValueError, "epochs must be at most 2147483647; received .*=900000"),
    ({"momentum": "1"}, ValueError, "momentum must be at least 0 and below 1"),
    ({"beta2": "0.999999999"}, ValueError, "below 1, as a float32 too; .*beta2=0.999999999"),
    ({"average": "0"}, ValueError, "average must be above 0 and below 1"),
    ({"weight_decay": "-1e-4"}, ValueError, "weight_decay must be at least 0"),
    ({"optimizer": "adam"}, ValueError, "optimizer must be one of sgd, nesterov, adamw"),
    ({"decay_exempt": "norms,D"}, ValueError, r"decay_exempt\[1\] must be one of norms, biases"),
    ({"schedule": "step"}, ValueError, "schedule must be one of constant, steps, cosine"),
    ({"milestones": "20,10"}, ValueError, r"milestones must rise, .*received .*\(20, 10\)"),
    ({"milestones": "100,200"}, ValueError, "milestones must be below epochs=200"),
    ({"milestones": ""}, ValueError, "needs milestones, the epochs at which the rate changes"),
    ({"warmup_epochs": "200"}, ValueError, "warmup_epochs must be below epochs=200"),
    ({"learning_rate": "1e300"}, ValueError, r"must be a float32, .* to 3\.4e\+38; .*=1e\+300"),
    ({"clip_norm": "1e-300"}, ValueError, r"clip_norm must be a float32, from 1\.2e-38"),
    ({"accumulate": "129"}, ValueError, "accumulate must be at most batch_size=128; .*=129"),
    ({"mixup_off_epochs": "201"}, ValueError, "mixup_off_epochs must be at most epochs=200"),
    ({"orthonormality": "-1"}, ValueError, "orthonormality must not be negative"),
    ({"lasso": "much"}, TypeError, "lasso must be a number; received lasso='much'"),
    ({"drop_last": "yes"}, TypeError, "drop_last must be true or false; received .*'yes'"),
    ({"name": "\n"}, ValueError, "name must be text of one line"),
    (
        {"eval_images": "resize 9 9,flip"},
        ValueError,
        r"eval_images\[1\] must not be random, .*flip",
    ),
    ({"train_images": "flip,spin 2"}, ValueError, r"train_images\[1\]: 'spin 2'"),
)

test_values_of_another_type_are_refused = refuses(
    lambda given: Recipe(**{**LEAST, **given}),
    ({"milestones": 100}, TypeError, r"milestones must be a tuple of epochs, .*=100"),
    ({"decay_exempt": "norms"}, TypeError, "decay_exempt must be a tuple of roles"),
    ({"train_images": (3,)}, TypeError, r"train_images\[0\] must be an operation .*received 3"),
    ({"epochs": True}, TypeError, "epochs must be an integer"),
    ({"drop_last": 1}, TypeError, "drop_last must be true or false; received drop_last=1"),
)

test_entries_that_are_no_recipe_are_refused = refuses(
    from_json,
    ({}, ValueError, "a recipe needs name, epochs, batch_size, optimizer, learning_rate; name, ep"),
    ([], TypeError, r"a recipe is an object of fields; received \[\]"),
    ({**LEAST, "epoch": 3}, ValueError, "has no field 'epoch'; the nearest are epochs"),
)

test_names_that_are_no_recipe_are_refused = refuses(
    recipe,
    ("bsconv", ValueError, "'bsconv' is no recipe, .*the nearest are bsconv_cifar"),
    (None, TypeError, "a recipe is given by its name, a string; received None"),
    ("absent.toml", FileNotFoundError, "absent.toml"),
)


@one_test
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = = 2\n", "my.toml: .*line 1"),
        ("\xff", "my.toml: 'utf-8' codec"),
        ("epochs = 2", "my.toml: a recipe needs .*; batch_size, optimizer, learning_rate is miss"),
        ("a = " + "[" * 9999, "my.toml: "),
    ],
    ids=["no TOML", "no text", "fields missing", "deep"],
)  # fmt: skip
def test_files_that_are_no_recipe_are_refused(text, message, tmp_path):
    file = tmp_path / "my.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as refused:
        read_recipe(file)
    assert "\n" not in str(refused.value)


def test_a_file_without_a_name_has_that_of_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('epochs=2\nbatch_size=8\noptimizer="sgd"\nlearning_rate=1\n', encoding="utf-8")
    assert recipe(str(file), epochs=3) == Recipe(**{**LEAST, "epochs": 3, "learning_rate": 1})


test_data_that_does_not_fit_is_refused = refuses(
    lambda given: check_data(recipe("digits", **given[0]), *given[1:]),
    (({"mixup": 0.2}, 1, 99), ValueError, "mixup mixes images of different .*=0.2 .*one class"),
    (({"drop_last": True}, 9, 31), ValueError, "batch_size must be at most 31; .*batch_size=32"),
    (({}, 9, 0), ValueError, "the data has no images to train on"),
)


def test_data_that_fits_is_taken():
    check_data(recipe("digits", mixup=0.2, drop_last=True), 2, 32)
    check_data(recipe("digits"), 1, 1)
