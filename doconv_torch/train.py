"""Training in PyTorch: its engine for a run, on one device or in several processes."""

from __future__ import annotations

import copy
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as f
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from doconv_core.atomic import replacing
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.models.report import Converted
from doconv_core.state.file import State, entry
from doconv_core.training import session
from doconv_core.training.engine import Batch, Engine, Step, Sums, Verified
from doconv_core.training.fields import ADAMW, BIASES, DEPTHWISE, KERNELS, NESTEROV, NORMS
from doconv_core.training.recipe import Recipe
from doconv_core.training.schedule import parts
from doconv_core.training.session import Callback, Trained
from doconv_torch.composed import ComposedConv
from doconv_torch.dgc import DynamicHeads2d, saliency_lasso, set_progress
from doconv_torch.kernel_cache import composed_once
from doconv_torch.model import fold
from doconv_torch.ordinary import check_model, is_sharded
from doconv_torch.orthonormal import has_orthonormal, orthonormality_loss
from doconv_torch.state import export_state, load_state

PRECISIONS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
CHECKPOINT, FOLDED = "torch.pt", "folded.pt"
HINT = "torchrun --nproc-per-node {} -m doconv_core.cli train"


def train(
    model: nn.Module,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    run: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    precision: str = "float32",
    devices: str | int | None = None,
    checkpoint_every: int | None = None,
    workers: int = 0,
    callback: Callback | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    quiet: bool = False,
    compile: bool = False,
    channels_last: bool = False,
    sharded: bool = False,
) -> Trained:
    """Train a model by a recipe, in a run that can be killed and gone on with; fold and verify it.

    model: from images `(B, C, H, W)` to logits `(B, classes)`; it is trained itself. recipe: or its
    name. data: the name of a data set, such as "cifar100" in `data_dir`; or your own, as
    `doconv_core.training.data.as_data` takes them.
    run: the folder that gets everything; None to write nothing. resume: go on with the run there.
    force: replace the one there. seed: of the batches, and of PyTorch's random numbers.
    precision: what is computed in, by autocast: "float32", "bfloat16" or "float16"; weights stay in
    float32. devices: such as "cpu" or "cuda:1"; None for a GPU if there is one. Started by
    `torchrun`, each process has a device of its own and a part of each batch.
    checkpoint_every: steps; None for each epoch. workers: processes that read images. callback:
    called after each epoch with how many are done, its metrics and the model. notes: what else
    `run.json` is to keep. quiet: print nothing.
    compile: train what `torch.compile` makes of the model. channels_last: in this memory format.
    sharded: each process has a part of each weight (FSDP2), in place of all (DDP).
    Raises TypeError, ValueError or `doconv_core.training.run.RunError`, before anything is
    written, for what cannot be; `doconv_core.training.session.RunEnded` where a run ends early.

    >>> trained = train(get_model("tutorial_pt"), "tutorial_pt", quiet=True)
    >>> len(trained.metrics), trained.verified.relative < 1e-5
    (2, True)
    """
    check_model(model)
    own = _join_processes()
    try:

        def make(recipe: Recipe) -> Engine:
            return TorchEngine(
                model, recipe, seed=seed, precision=precision, devices=devices, compile=compile,
                channels_last=channels_last, sharded=sharded,
            )  # fmt: skip

        return session.train(
            make, recipe, data, run=run, seed=seed, resume=resume, force=force,
            checkpoint_every=checkpoint_every, workers=workers, callback=callback,
            data_dir=data_dir, notes=notes, quiet=quiet,
        )  # fmt: skip
    finally:
        if own:
            distributed.destroy_process_group()


def evaluate(
    model: nn.Module,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    precision: str = "float32",
    devices: str | int | None = None,
    workers: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Return the loss, top-1, top-5, images and seconds of a model on evaluation images.

    The arguments are those of `train`; the recipe says how images are prepared, and how many are
    evaluated at once.

    >>> found = evaluate(get_model("tutorial_pt"), "tutorial_pt")
    >>> found["images"], 0 <= found["top1"] <= found["top5"] <= 1
    (360, True)
    """
    check_model(model)

    def make(recipe: Recipe) -> Engine:
        return TorchEngine(model, recipe, precision=precision, devices=devices)

    return session.evaluate(make, recipe, data, workers=workers, data_dir=data_dir)


class TorchEngine(Engine):
    """A PyTorch model with its optimizer, as `doconv_core.training.session` trains it.

    Takes what `train` does. In several processes the process group must have been joined.
    """

    framework, version = "torch", torch.__version__
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        seed: int = 0,
        precision: str = "float32",
        devices: str | int | None = None,
        compile: bool = False,
        channels_last: bool = False,
        sharded: bool = False,
    ) -> None:
        if distributed.is_initialized():
            self.process, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.device = device_of(devices)
        self.dtype = _dtype_of(precision, self.device, sharded)
        if sharded and not distributed.is_initialized():
            raise ValueError(
                "sharded=True divides the weights among the processes of torchrun, and there are "
                f"none; begin with {HINT.format(2)}."
            )
        self.model, self.recipe = model.to(self.device), recipe
        self.sharded = sharded
        self.layout = "NHWC" if channels_last else "NCHW"
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.is_dynamic = any(isinstance(m, DynamicHeads2d) for m in model.modules())
        self.is_orthonormal = has_orthonormal(model)
        self.described = {
            "precision": precision, "device": str(self.device), "compile": compile,
            "channels_last": channels_last, "sharded": sharded,
        }  # fmt: skip
        torch.manual_seed((seed + self.process) % 2**64)
        self.composed = self._composed()
        self.other = self._other()  # before the model is wrapped or divided
        self.wrapped = self._wrapped(compile)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._steps: list[Tensor] = []
        self._begin_average()

    def _other(self) -> nn.Module | None:
        """Return the module that is evaluated in the model's place; None where it is itself.

        It has the averages, or the whole of weights that are divided among processes. Its tensors
        are its own.
        """
        if self.recipe.average is None and not self.sharded:
            return None
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def _composed(self) -> dict[str, ComposedConv[Any]]:
        """Return the layers whose kernels are averaged, one of those that share a weight, by path.

        Raises ValueError for one that cannot be given a kernel, as its weight is computed.
        """
        found: dict[int, tuple[str, ComposedConv[Any]]] = {}
        if self.recipe.average is None or self.recipe.average_of != KERNELS:
            return {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, ComposedConv):
                if parametrize.is_parametrized(layer):
                    raise ValueError(
                        f"average_of={KERNELS!r} gives a layer the kernel as its weight, and that "
                        f"of {path!r} is parametrized; remove the parametrization, or average "
                        "weights."
                    )
                found.setdefault(id(layer.weight), (path, layer))
        return dict(found.values())

    def _begin_average(self) -> None:
        """Let the averages, if there are any, begin with the weights of now."""
        self.average: dict[str, Tensor] = {}
        if self.recipe.average is not None:
            with torch.no_grad():
                now = self._averaged_now()
            self.average = {name: value.detach().clone() for name, value in now.items()}

    def _wrapped(self, compile: bool) -> Callable[[Tensor], Tensor]:
        """Return what the training calls."""
        if self.sharded:
            from torch.distributed.fsdp import fully_shard  # here, as importing it takes long

            for child in self.model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child)
            fully_shard(self.model)
        wrapped: Any = torch.compile(self.model) if compile else self.model
        if self.processes > 1 and not self.sharded:
            wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
        made: Callable[[Tensor], Tensor] = wrapped
        return made

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        decaying: list[nn.Parameter] = []
        exempt: list[nn.Parameter] = []
        for parameter, role in roles(self.model):
            (exempt if role in recipe.decay_exempt else decaying).append(parameter)
        groups = [
            {"params": decaying, "weight_decay": recipe.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = self.device.type == "cuda"
        if recipe.optimizer == ADAMW:
            return torch.optim.AdamW(
                groups, lr=recipe.learning_rate, betas=(recipe.momentum, recipe.beta2),
                eps=recipe.epsilon, fused=fused,
            )  # fmt: skip
        return torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=recipe.momentum,
            nesterov=recipe.optimizer == NESTEROV and recipe.momentum > 0, fused=fused,
        )  # fmt: skip

    def train_step(self, step: Step, batch: Batch) -> None:
        """Update the weights by one batch, in parts where the recipe accumulates."""
        if not self.model.training:
            self.model.train()
        if self.is_dynamic:
            set_progress(self.model, step.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = step.learning_rate
        tensors = self._placed(batch)
        # Of a short batch there may be no image here; the other processes wait for this one's step.
        slices = list(parts(self.recipe, len(batch.images))) or [slice(0, 0)]
        found = []
        for rows in slices:
            last = rows is slices[-1]
            with self._gathering(last):
                images, targets, labels = (tensor[rows] for tensor in tensors)
                found.append(self._backward(images, targets, labels, batch.total, last))
        self._steps.append(torch.stack(found).sum(0))
        self._update()

    def _backward(
        self, images: Tensor, targets: Tensor, labels: Tensor, total: int, last: bool
    ) -> Tensor:
        """Add the gradient of a part of the batch; return its sums.

        Gradients are averaged over the processes: so each takes its share of the mean over all
        images, times their number. last: whether the loss of the weights alone is to be added, too.
        """
        with self._autocast():
            outputs = self.wrapped(images)
        outputs, rows = outputs.float(), len(images)
        summed = f.cross_entropy(outputs, targets, reduction="sum")
        if self.is_dynamic and self.recipe.lasso and rows:
            summed = summed + rows * saliency_lasso(self.model, self.recipe.lasso)
        loss, told = summed * (self.processes / total), summed.detach()
        if last and self.is_orthonormal and self.recipe.orthonormality:
            extra = orthonormality_loss(self.model, self.recipe.orthonormality)
            loss, told = loss + extra, told + self._rows * extra.detach()
        self.scaler.scale(loss).backward()
        return _sums(told, outputs.detach(), labels)

    def _update(self) -> None:
        """Change the weights by the gradients, and the averages by the weights."""
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.recipe.average is not None:
            with torch.no_grad():
                now = self._averaged_now()
                average = get_ema_multi_avg_fn(self.recipe.average)
                average(list(self.average.values()), [now[name] for name in self.average], None)

    def _averaged_now(self) -> dict[str, Tensor]:
        """Return what is averaged as it is now: parameters, or the kernels that some compose."""
        inside = {id(p) for layer in self.composed.values() for p in layer.entries().values()}
        named = self.model.named_parameters()
        found: dict[str, Tensor] = {name: p for name, p in named if id(p) not in inside}
        for path, layer in self.composed.items():
            found[entry(path, "weight")] = layer.composed_kernel()
        return found

    def _weights(self) -> dict[str, Tensor]:
        """Return the parameters that are evaluated; of a kernel's average, those it starts from."""
        if self.recipe.average is None:
            return dict(self.model.named_parameters())
        found = dict(self.average)
        for path, layer in self.composed.items():
            kernel = _whole(found[entry(path, "weight")])
            started = layer.start(kernel, layer.spec)
            found |= {entry(path, name): value for name, value in started.items()}
        return found

    def _placed(self, batch: Batch) -> list[Tensor]:
        """Return a batch's images, targets and labels on the device."""
        self._rows = len(batch.images)
        arrays = (np.require(array, requirements="W") for array in batch[:3])
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        images, *others = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        return [images.permute(0, 3, 1, 2) if self.layout == "NHWC" else images, *others]

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    @contextmanager
    def _gathering(self, last: bool) -> Iterator[None]:
        """Let the processes put their gradients together after a batch's last part alone."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDP's
        yield

    def taken(self) -> list[Sums]:
        """Return what each step since the last call came to, in this process; waits for them."""
        steps, self._steps = self._steps, []
        return [_as_sums(row) for row in torch.stack(steps).tolist()] if steps else []

    def evaluate(self, batches: Iterable[Batch]) -> Sums:
        """Return what the model reaches in evaluation mode, averaged if the recipe averages."""
        model, found = self._evaluated(), []
        with torch.no_grad(), composed_once(model):
            for batch in batches:
                images, targets, labels = self._placed(batch)
                with self._autocast():
                    outputs = model(images)
                found.append(_loss(outputs, targets, labels))
        return reduce(Sums.plus, map(_as_sums, torch.stack(found).tolist())) if found else Sums()

    def _evaluated(self) -> nn.Module:
        """Return the module that is evaluated, with the weights of now, in evaluation mode."""
        if self.processes > 1:
            for buffer in self.model.buffers():  # each process has seen other images
                distributed.broadcast(buffer, 0)
        if self.other is None:
            return self.model.eval()
        weights = self._weights()
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, parameter in self.other.named_parameters():
                parameter.copy_(_whole(weights[name]))
            for name, buffer in self.other.named_buffers():
                buffer.copy_(buffers[name])
        return self.other.eval()

    def total(self, sums: Sums) -> Sums:
        """Return the sums over all processes."""
        if self.processes == 1:
            return sums
        added = torch.tensor(sums, dtype=torch.float64, device=self.device)
        distributed.all_reduce(added)
        return _as_sums(added.tolist())

    def save(self, folder: Path | None) -> None:
        """Write weights, optimizer, averages and random states of all processes to a folder."""
        told = {
            "model": _whole(self.model.state_dict()),
            "optimizer": _whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "average": _whole(self.average),
            "random": self._random_states(),
        }
        if folder is not None:
            written = io.BytesIO()  # PyTorch's own writer tells of a full disk by no OSError
            torch.save(told, written)
            (folder / CHECKPOINT).write_bytes(written.getbuffer())

    def _random_states(self) -> list[dict[str, Any]]:
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "python": random.getstate(),
            "numpy": [
                x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()
            ],
        }
        if self.processes == 1:
            return [own]
        gathered: list[Any] = [None] * self.processes
        distributed.all_gather_object(gathered, own)
        return gathered

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, in every process.

        Where there are more processes than there were, the new ones draw random numbers afresh.
        """
        told = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        self.model.load_state_dict(_parts_like(self.model.state_dict(), told["model"]))
        self.optimizer.load_state_dict(self._optimizer_parts(told["optimizer"]))
        self.scaler.load_state_dict(told["scaler"])
        for name, average in _parts_like(self.average, told["average"]).items():
            self.average[name].copy_(average)
        if self.process < len(told["random"]):
            states = told["random"][self.process]
            torch.set_rng_state(states["torch"])
            if states["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"], self.device)
            random.setstate(states["python"])
            np.random.set_state(tuple(states["numpy"]))

    def _optimizer_parts(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with the parts of each array that this process has."""
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        state = {
            number: {
                name: _part_like(parameters[number], value)
                if isinstance(value, Tensor) and value.shape == parameters[number].shape
                else value
                for name, value in entries.items()
            }
            for number, entries in whole["state"].items()
        }
        return {**whole, "state": state}

    def export_state(self) -> State:
        """Return the model's canonical state, of the averaged weights if the recipe averages."""
        return export_state(self._evaluated())

    def load_state(self, state: State) -> None:
        """Take up a canonical state's weights, as at the beginning of a run."""
        load_state(self.model, state)
        self._begin_average()

    def fold(self) -> Converted[Any]:
        """Return a folded copy of the model, in evaluation mode, and the report."""
        return fold(self._evaluated())

    def folded_state(self, folded: Any) -> State:
        """Return a folded model's canonical state."""
        return export_state(folded)

    def verify(self, folded: Any, batches: Iterable[Batch]) -> Verified:
        """Compare the model with the folded one on all of the batches, in float32."""
        model, found = self._evaluated(), []
        largest = torch.zeros(2, device=self.device)  # of a difference, and of an output
        with torch.no_grad(), composed_once(model):
            for batch in batches:
                images, targets, labels = self._placed(batch)
                a, b = model(images), folded(images)
                found.append(torch.stack([_loss(each, targets, labels) for each in (a, b)]))
                largest = torch.maximum(largest, torch.stack([(b - a).abs().max(), a.abs().max()]))
        absolute, output = largest.tolist()
        before, after = (
            reduce(Sums.plus, map(_as_sums, rows), Sums())
            for rows in zip(*(pair.tolist() for pair in found), strict=True)
        )
        return Verified(before, after, absolute, absolute / output if output else 0.0)

    def write_folded(self, folded: Any, folder: Path) -> Path:
        """Write a folded model's state dict; return the file."""
        file = folder / FOLDED
        with replacing(file) as temporary:
            written = io.BytesIO()
            torch.save({name: value.cpu() for name, value in folded.state_dict().items()}, written)
            temporary.write_bytes(written.getbuffer())
        return file


def roles(model: nn.Module) -> Iterator[tuple[nn.Parameter, str | None]]:
    """Yield each parameter that is trained, once, with its role in recipes; None for a weight."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if isinstance(module, NORM_TYPES):
                yield parameter, NORMS
            elif name.endswith("bias"):
                yield parameter, BIASES
            else:
                is_depthwise = name == DO_CONV.names[1] and isinstance(module, ComposedConv)
                yield parameter, DEPTHWISE if is_depthwise else None


def device_of(devices: str | int | None) -> torch.device:
    """Return this process's device; ValueError for one that is not here, with those that are.

    devices: a name such as "cuda:1"; or how many, of which each process has one.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    local = int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else 0
    if isinstance(devices, int) or (isinstance(devices, str) and devices.isdigit()):
        if int(devices) != processes:
            raise ValueError(
                f"each process has one device; received devices={devices} and "
                f"{processes} of torchrun: begin with {HINT.format(devices)}."
            )
        devices = None
    here = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    name = devices or ("cuda" if len(here) > 1 and "cuda:0" in here else "cpu")
    if name == "cuda":
        name = f"cuda:{local}"
    if name not in here:
        raise ValueError(f"there is no device {name!r} here; there is {', '.join(here)}.")
    return torch.device(name)


def _dtype_of(precision: str, device: torch.device, sharded: bool) -> torch.dtype:
    """Return what is computed in; ValueError for what the device has not."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be {', '.join(PRECISIONS)}; received precision={precision!r}."
        )
    if precision == "float16" and (device.type == "cpu" or sharded):
        where = "with sharded weights" if sharded else "on the CPU"
        raise ValueError(f"{where} nothing is trained in float16; use bfloat16.")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{device} does not compute in bfloat16; use float16.")
    return PRECISIONS[precision]


def _join_processes() -> bool:
    """Join the other processes of torchrun, if this is one of several; return whether it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    return True


def _loss(outputs: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Return an evaluation's sums of some images; ValueError for outputs that do not fit."""
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the model must give logits of shape (B, classes), {tuple(targets.shape)} for these "
            f"data; it gave {got}."
        )
    outputs = outputs.float()
    return _sums(f.cross_entropy(outputs, targets, reduction="sum"), outputs, labels)


def _sums(loss: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the fields of `Sums` as a tensor, on the device.

    Of equal outputs the first counts as the larger, and none is larger than one that is no number.
    """
    own = outputs.gather(1, labels[:, None])
    after = torch.arange(outputs.shape[1], device=labels.device) >= labels[:, None]
    before = (outputs > own) | (outputs.isnan() | (outputs == own) & ~after)
    rank = before.sum(1)
    counts = (rank < 1).sum(), (rank < 5).sum(), torch.tensor(len(labels), device=labels.device)
    return torch.stack([loss, *(count.to(loss.dtype) for count in counts)])


def _as_sums(row: list[float]) -> Sums:
    return Sums(row[0], *map(int, row[1:]))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _whole(value: Any) -> Any:
    """Return tensors, nested in dicts and lists, whole, of which each process has a part."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return value.full_tensor() if is_sharded(value) else value


def _parts_like(own: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _part_like(own.get(name), value) for name, value in whole.items()}


def _part_like(own: Any, whole: Any) -> Any:
    """Return the part of a tensor that this process has of another, if it has a part."""
    if not is_sharded(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
