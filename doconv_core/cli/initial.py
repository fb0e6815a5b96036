"""What a network starts from that is given by a file: of any format, as a state of the network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from doconv_core.cli.command import opened
from doconv_core.cli.contents import Contents
from doconv_core.cli.convert import flattenings, paired_by_order
from doconv_core.cli.flattening import Images
from doconv_core.cli.pairing import Paired, compare_metadata, pair_by_name
from doconv_core.cli.plan import Conversion
from doconv_core.files.entries import STATE
from doconv_core.files.folding import check_heads
from doconv_core.files.layers import Layer
from doconv_core.state.file import State, write_state
from doconv_core.training import run as runs


class Initial(NamedTuple):
    """state: of the network. kept: the layer of other classes that the file had no arrays for.

    number: of the network that it is of, among those asked for.
    """

    state: State
    kept: str | None
    number: int = 0


def state_from(file: Path, *networks: State) -> Initial:
    """Return the state of a network with the arrays of a file, which may be one of an ordinary one.

    networks: the network's, as initialised; of several, such as with its layers of another kind,
    that is taken which the file is of, the first in doubt. Its last layer stays so where the file's
    is one of other classes. A folder of a run stands for its last checkpoint. Raises what reading
    and converting the file does.
    """
    source = checkpoint_of(file)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        like = Path(folder) / "network.safetensors"
        contents = Contents(stack.enter_context(opened(source, ())))
        fresh = max(networks, key=partial(_alike, contents.copy_of_model(None)))
        write_state(fresh, like)
        template = Contents(stack.enter_context(opened(like, ())))
        template.path = Path(fresh.origin.get("network", "the network"))  # in messages
        layers = contents.copy_of_model(None)
        check_heads(source, layers)
        contents.check_plain(layers, ())
        paired = pair_by_name(layers, template.copy_of_model(None))
        if paired.first or paired.second:
            paired = paired_by_order(contents, layers, template)
        paired, kept = _without_classifier(paired)
        found = flattenings(contents, template, paired.both, STATE, Images(()))
        fold = not any(layer.over_parameterized for layer in template.layers)
        conversion = Conversion(contents, fold, found, keras=False)
        plan = conversion.like(template, paired)
        compare_metadata(contents, template, paired.both, False)
        arrays = {e.name: e.values().astype(fresh.arrays[e.name].dtype) for e in plan}
        state = State(fresh.layers, {**fresh.arrays, **arrays}, fresh.origin)
        return Initial(state, kept, networks.index(fresh))


def _alike(layers: Sequence[Layer], network: State) -> tuple[int, int]:
    """Return how many names a file shares with a network, and how far their sizes are apart."""
    names = {layer.path for layer in layers}
    return len(names & network.layers.keys()), -abs(len(layers) - len(network.layers))


def checkpoint_of(file: Path, best: bool = False) -> Path:
    """Return a file, or of a run's folder the state in its last checkpoint, or in its best."""
    if not (file / runs.DESCRIBED).is_file():
        return file
    run = runs.open_run(file)
    folder = run.best if best else run.last
    run.position()  # which refuses a run without checkpoints
    if folder is None:
        raise runs.RunError(f"{file} has no best checkpoint yet, as no epoch is done.")
    return folder / runs.STATE


def _without_classifier(paired: Paired) -> tuple[Paired, str | None]:
    """Leave out the last pair of layers where they differ in nothing but their classes."""
    *others, (layer, other) = paired.both
    theirs, ours = layer.kernel_shape, other.kernel_shape
    if theirs is None or ours is None or layer.kind != other.kind:
        return paired, None
    if theirs[0] == ours[0] or theirs[1:] != ours[1:]:
        return paired, None
    return paired._replace(both=others), other.path
