"""The processes of one job: what they agree on, and what they tell each other when one fails."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# A rank may finish its share long before the others; a rank that dies is noticed at once all the same.
_PATIENCE = timedelta(days=30)


class Ranks:
    """The ranks that share one call; a single process is the job of one rank."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; an exception there is raised on every rank."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = decide()
            except Exception as error:
                outcome[1] = error
        with _others():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, written to `value`; of rows that one rank each has filled, it is these rows' bits."""
        if self.size > 1:
            with _others():
                dist.all_reduce(value, group=self._group)
        return value

    def send(self, value: Tensor, source: int) -> Tensor:
        """What the rank `source` has, on every rank; written to `value` on the others."""
        if self.size > 1:
            value = value.contiguous()
            with _others():
                dist.broadcast(torch.view_as_real(value) if value.is_complex() else value, source, group=self._group)
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank, and leave it when all have: an error of one becomes an error of all.

        Raises:
            RuntimeError: another rank failed or ended.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, message in enumerate(self.gather("")):
            if message:
                raise RuntimeError(
                    f"rank {rank} failed: {message}. Finished tiles are kept; run the same call again to go on"
                )


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the connection to a rank broke
        raise RuntimeError(
            "another rank of this job ended before its tiles were finished. Finished tiles are kept; run the same "
            f"call again to go on ({error})"
        ) from error


# torch's group of all ranks, and ours beside it. A group cannot be ended and begun again safely, so they stay.
_groups: dict[Any, Any] = {}


def job() -> Ranks:
    """The ranks of this job: torch.distributed's where it runs, else those that torchrun started."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        dist.init_process_group("gloo")
        atexit.register(_end)
    if dist.get_world_size() == 1:
        return Ranks()
    everyone = dist.group.WORLD
    if everyone not in _groups:
        # Only decisions and messages travel, so gloo serves on every kind of machine.
        _groups[everyone] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), _groups[everyone])


def _end() -> None:
    """Ends the groups that this file began, while Python still runs.

    A thread of gloo's that frees a Python object later ends the process with an error. The threads are joined when the
    last reference to their group goes, so none may stay here.
    """
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
