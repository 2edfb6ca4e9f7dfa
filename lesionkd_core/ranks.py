"""Several processes at one training batch (torchrun): who holds which cases, and sums over all of them.

Every rank runs the same program. A training batch is spread over them, and what is a mean over its cases is
the mean over all ranks, gradients included; files are written by the first rank alone. A single process meets no
collective here: each function gives back what it got.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import store
from .config import LesionKDError, TeacherConfig
from .progress import Tell

T = TypeVar("T")
SILENCE = timedelta(minutes=5)
"""How long a training step waits for another rank; waiting for what one rank does alone has no limit."""

LOST = (
    "a process of this run was lost (killed, out of memory, its node gone or silent for minutes), or the job was cancelled. "
    "Finished epochs are kept: the same command goes on from the last checkpoint."
)

_steps = None  # process group of the training steps; the default one is for waiting, and goes by the CPU
_spread = 0  # cases of the batch in work; 0 where every rank holds all of them


class RankLost(LesionKDError):
    """Another process of the run is gone, or this one was told to end."""


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _steps else 1


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not _steps or dist.get_rank() == 0


def join(cfg: TeacherConfig) -> None:
    """Become one of the ranks that torchrun started; nothing happens where it did not.

    Raises
    ------
    LesionKDError
        A device that is not there, or fewer cases in a batch than processes.
    """
    global _steps
    count = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if count == 1:
        return
    if cfg.batch_size < count:
        raise LesionKDError(f"batch_size = {cfg.batch_size} is spread over {count} processes: start fewer, or take at least {count}")
    signal.signal(signal.SIGTERM, _told_to_end)
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        fabric = Fabric(**_strategy(cfg.device))
        fabric.launch()
        _steps = dist.new_group(backend="nccl" if fabric.device.type == "cuda" else "gloo", timeout=SILENCE)
    except LesionKDError:
        raise
    except Exception as error:  # whatever Lightning, NCCL and gloo raise
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise LesionKDError(f"{count} processes on device = {cfg.device!r} do not come together: {problem}") from error
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave() -> None:
    """The end of a run that went well."""
    if _steps:
        dist.destroy_process_group()


def _told_to_end(*_: Any) -> None:
    raise RankLost(LOST)


def fabric_options(device: str) -> dict[str, Any]:
    """What Fabric is told about devices: one, or this rank's own of its node."""
    return _strategy(device) if _steps else {"accelerator": device, "devices": 1}


def _strategy(device: str) -> dict[str, Any]:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    nodes, here = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return {"accelerator": kind, "devices": here, "num_nodes": nodes, "strategy": "ddp"}


def first_to_tell() -> bool:
    """Whether this rank is the first that has to say how the run ended: one message for all."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the message comes before the end that torchrun makes of all ranks
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10)).add(f"told{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except (KeyError, RuntimeError):  # no torchrun, or none any more
        return True


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL know no other
        raise RankLost(LOST) from error


def agree(value: Any = None) -> Any:
    """The first rank's value, for all; whoever comes early waits as long as it takes."""
    if not _steps:
        return value
    box = [value]
    with _peers():
        dist.broadcast_object_list(box, 0)
    return box[0]


def after_first(make: Callable[[], T]) -> T:
    """What the first rank makes and the others then find."""
    if not first():
        agree()
        return make()
    made = make()
    agree()
    return made


@contextmanager
def lock(path: Path, tell: Tell = print) -> Iterator[None]:
    """`store.lock`, taken by the first rank for all; they go in together and come out together."""
    with store.lock(path, tell) if first() else nullcontext():
        agree()
        if not path.with_name(path.name + ".lock").exists():
            raise LesionKDError(f"the processes do not see one {path.parent}: LESIONKD_RUNS wants a folder that all nodes share")
        yield
        agree()


def collect(value: T) -> list[T]:
    """Everybody's value, in the order of the ranks."""
    if not _steps:
        return [value]
    values: list[Any] = [None] * size()
    with _peers():
        dist.all_gather_object(values, value)
    return values


def part(cases: int) -> slice:
    """Which of so many cases this rank holds; all of them where there are fewer than ranks."""
    if cases < size():
        return slice(0, cases)
    rank = dist.get_rank() if _steps else 0
    return slice(rank * cases // size(), (rank + 1) * cases // size())


@contextmanager
def batch(cases: int) -> Iterator[None]:
    """The batch in work has so many cases over all ranks."""
    global _spread
    _spread = cases if 1 < size() <= cases else 0
    try:
        yield
    finally:
        _spread = 0


def spread() -> int:
    """Cases of the batch in work over all ranks; 0 where this rank holds all of them."""
    return _spread


def weight() -> float:
    """What this rank's cases count in a mean over the batch; the weights of all ranks sum to 1."""
    held = part(_spread)
    return (held.stop - held.start) / _spread if _spread else 1 / size()


def share_of(count: Tensor) -> Tensor | float:
    """Factor on a mean over so many of this rank's items that makes the weighted sum over ranks the mean over everybody's."""
    return count / total(count).clamp_min(1) / weight() if _spread else 1.0


def total(x: Tensor) -> Tensor:
    """Sum over all ranks, whoever holds what; no gradient."""
    if not _steps:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with _peers():
        dist.all_reduce(x, group=_steps)
    return x


class _Total(torch.autograd.Function):
    """`total` with its gradient, which is the sum of everybody's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad)


def mean(x: Tensor) -> Tensor:
    """A mean over this rank's cases -> the mean over the batch in work, with its gradient."""
    return _Total.apply(x * weight()) if _spread else x


def gather(x: Tensor) -> Tensor:
    """This rank's cases (N, ...) -> those of the batch in work, in its order, with their gradient."""
    if not _spread:
        return x
    held = part(_spread)
    before, after = x.new_zeros(held.start, *x.shape[1:]), x.new_zeros(_spread - held.stop, *x.shape[1:])
    whole: Tensor = _Total.apply(torch.cat([before, x, after]))
    return whole


def own(x: Tensor) -> Tensor:
    """All cases of the batch in work -> this rank's, as `gather` took them."""
    return x[part(_spread)] if _spread else x


def add_gradients(parameters: list[Tensor]) -> None:
    """Every gradient becomes the sum over all ranks.

    In one vector after the backward pass: networks of this size gain little from sending in between.
    """
    if not _steps:
        return
    grads = []
    for p in parameters:
        if p.grad is None:  # another rank may have one
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    summed = total(torch.cat([grad.flatten() for grad in grads])).split([grad.numel() for grad in grads])
    for grad, part_of_sum in zip(grads, summed):
        grad.copy_(part_of_sum.view_as(grad))
