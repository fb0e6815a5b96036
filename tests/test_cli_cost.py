"""`doconv cost`: the same figures as the core's, for layers and files."""

from __future__ import annotations

import json

import pytest
from command_line import doconv

from doconv_core import ConvSpec, layer_cost


@pytest.mark.parametrize(
    ("layer", "input_size", "spec", "positions", "bias"),
    [
        ("64,64,3x3", "56x56", ConvSpec(64, 64, (3, 3)), 56 * 56, True),
        ("64,64,3x3", "64x56x56", ConvSpec(64, 64, (3, 3)), 56 * 56, True),
        ("4,6,3,groups=2,S=5,bias=no", "9", ConvSpec(4, 6, (3,), 2, 5), 9, False),
        ("3,8,7x7,stride=2", "225x224", ConvSpec(3, 8, (7, 7)), 113 * 112, True),
        ("3,8,7x7,stride=2,padding=3", "224x224", ConvSpec(3, 8, (7, 7)), 112 * 112, True),
        ("3,8,3x3,padding=0,dilation=2", "9x7", ConvSpec(3, 8, (3, 3)), 5 * 3, True),
        ("3,8,2x3x1,padding=1x0x2", "4x5x6", ConvSpec(3, 8, (2, 3, 1)), 5 * 3 * 10, True),
        ("8,4,1x1,S=1", "5x5", ConvSpec(8, 4, (1, 1)), 25, True),
    ],
)
def test_a_layer(layer, input_size, spec, positions, bias):
    done = doconv("cost", layer, "--input", input_size, "--batch", "3", "--json")
    expected = layer_cost(spec, positions, batch=3, bias=bias)
    found = json.loads(done.stdout)
    assert found["cost"] == {form: cost._asdict() for form, cost in expected._asdict().items()}
    assert found["layer"]["depth_multiplier"] == spec.depth_multiplier
    assert found["batch"] == 3


def test_a_table_to_read():
    done = doconv("cost", "64,64,3x3", "--input", "56x56", "--batch", "32")
    lines = done.stdout.splitlines()
    assert lines[0] == "32 images of 56x56, output 56x56"
    assert lines[1].split() == ["parameters", "multiply-accumulates", "ratio"]
    expected = layer_cost(ConvSpec(64, 64, (3, 3)), 56 * 56, batch=32)
    assert f"{expected.kernel_composed.macs:,}" in lines[3]
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("layer", "input_size", "message"),
    [
        ("64,64,3x3,S=8", "9x9", "depth_multiplier must be at least the number of kernel taps"),
        ("64,64,0x3", "9x9", "the kernel must be a size such as 3x3; received '0x3'"),
        ("64,64,3x3,grups=2", "9x9", "a layer is IN,OUT,KERNEL.*received 'grups=2'"),
        ("64,64,3x3,groups=x", "9x9", "groups must be a positive integer; received 'x'"),
        ("64,64,3x3,stride=0", "9x9", "stride must be a number, or 2 of them.*received '0'"),
        ("64,64,3x3,stride=1x2x3", "9x9", "stride must be a number, or 2 of them"),
        ("64,64,3x3,bias=maybe", "9x9", "bias must be yes or no; received 'maybe'"),
        ("64,64,3x3,S=9,S=10", "9x9", "S is given twice"),
        ("64,63,3x3,groups=2", "9x9", "out_channels must be divisible by groups"),
        ("64,64,3x3", "9", "the input must have 2 sizes, as the kernel has; received 1"),
        ("64,64,3x3", "3x9x9", "64 input channels, which stand first; received .* 3x9x9\\. "),
        ("64,64,3x3", "9x9x64", "received the input size 9x9x64: write 64x9x9"),
        ("64,64,3x3,padding=0", "2x9", "the input is too small for the kernel"),
        ("64,64,3x3", "9x-1", "'9x-1' is no size; write it as 3x3 or 224x224"),
        ("64,64,3x3", None, "give the size of its input, such as --input 56x56"),
    ],
)
def test_wrong_usage(layer, input_size, message):
    options = [] if input_size is None else ["--input", input_size]
    doconv("cost", layer, *options, code=2, error=message)
