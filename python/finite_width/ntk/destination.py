"""Where a streamed kernel goes: a Zarr array that remembers its finished tiles, or any array that can be written."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _check

ATTRIBUTE = "finite_width"
Region = tuple[slice, slice]


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of the kernel, and the largest piece in which it may be stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    edge: int  # rows and columns of one stored piece

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Destination(ABC):
    """What the stream writes to."""

    name: str

    @abstractmethod
    def open(self, layout: Layout, facts: dict[str, str]) -> None:
        """Check everything, then make ready; nothing that was there before is changed by an error."""

    @abstractmethod
    def missing(self, regions: Iterable[Region]) -> set[int]:
        """Which of the regions are not safely stored, by their place in the list."""

    @abstractmethod
    def write(self, region: Region, values: Tensor) -> None: ...

    @abstractmethod
    def result(self) -> Any: ...


class PlainArray(Destination):
    """Any array with shape, dtype and item assignment: numpy, a memory map, h5py, a tensor. It remembers nothing."""

    def __init__(self, array: Any) -> None:
        self.array, self.name = array, f"out ({type(array).__name__})"

    def open(self, layout: Layout, facts: dict[str, str]) -> None:
        if tuple(self.array.shape) != layout.shape:
            raise ValueError(f"out must have shape {list(layout.shape)}, got {list(self.array.shape)}")
        dtype = self.array.dtype
        given = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else str(np.dtype(dtype))
        if given != layout.dtype_name:
            raise TypeError(f"out must have dtype {layout.dtype_name}, as the model's parameters, got {given}")
        flags = getattr(self.array, "flags", None)
        if getattr(self.array, "read_only", False) or not getattr(flags, "writeable", True):
            raise ValueError("out is read-only; open it for writing")
        if isinstance(self.array, Tensor):
            self._check_tensor(self.array)

    @staticmethod
    def _check_tensor(out: Tensor) -> None:
        if out.requires_grad:
            raise ValueError("out must not require a gradient; pass out.detach()")
        _check.is_dense("out", out)
        if out.is_meta:
            raise ValueError("out must have memory, got a tensor on the device 'meta'")
        if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
            raise ValueError("out must have memory for every entry, got an expanded tensor; pass torch.empty(...)")
        if out.is_inference():
            raise ValueError("out was made in inference mode and cannot be written; pass a tensor made outside of it")

    def missing(self, regions: Iterable[Region]) -> set[int]:
        return set(range(len(list(regions))))

    def write(self, region: Region, values: Tensor) -> None:
        self.array[region] = values if isinstance(self.array, Tensor) else values.cpu().numpy()

    def result(self) -> Any:
        if hasattr(self.array, "flush"):
            self.array.flush()
        return self.array

    @property
    def shared(self) -> bool:
        """Whether what one process writes is seen by the others."""
        return isinstance(self.array, np.memmap) and self.array.mode in ("r+", "w+")


class ZarrArray(Destination):
    """A Zarr array with a checksum on every piece: a piece that is there and whole is finished.

    Zarr's local store writes a piece beside its place and renames it, so a killed run leaves whole pieces only; after
    a power failure the checksum finds those that are not.
    """

    def __init__(self, where: Any) -> None:
        try:
            import zarr
        except ImportError:
            raise ImportError("out= as a path or store needs zarr: pip install finite-width[scale]") from None
        self._zarr = zarr
        if isinstance(where, zarr.Array):
            where = where.store_path
        self.where = os.fspath(where) if isinstance(where, str | Path) else where
        self.name = f"out {str(where)!r}"
        self.array: Any = None

    def open(self, layout: Layout, facts: dict[str, str]) -> None:
        if isinstance(self.where, str) and "://" not in self.where:
            self._check_path(Path(self.where))
        elif getattr(self.where, "read_only", False):
            raise ValueError(f"{self.name} is read-only; open it for writing")
        if isinstance(getattr(self.where, "store", self.where), self._zarr.storage.ZipStore):
            raise ValueError(f"{self.name}: a ZIP file is readable only once it is closed; pass a folder's path")
        try:
            self.array = self._zarr.open_array(self.where, mode="r+")
        except FileNotFoundError:
            self.array = None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.name} exists and is no Zarr array ({error}); nothing was changed. Pass another path"
            ) from None
        if self.array is None:
            try:
                self._create(layout, facts)
            except OSError as error:
                raise OSError(error.errno, f"{self.name} cannot be made: {error.strerror or error}") from error
        else:
            self._check_fits(layout, facts)

    @staticmethod
    def _check_path(path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"out {str(path)!r} is a file, not a Zarr store; nothing was changed. Pass another path")
        if path.is_dir() and not (path / "zarr.json").exists() and any(path.iterdir()):
            raise ValueError(
                f"out {str(path)!r} is a folder with other things in it; nothing was changed. Pass another path"
            )
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"out {str(path)!r} cannot be written: {str(existing)!r} is read-only")

    def _create(self, layout: Layout, facts: dict[str, str]) -> None:
        from zarr.codecs import Crc32cCodec

        edges = [min(layout.edge, size) for size in layout.shape[:2]]
        self.array = self._zarr.create_array(
            self.where,
            shape=layout.shape,
            chunks=(*edges, *layout.shape[2:]),
            dtype=layout.dtype_name,
            fill_value=float("nan"),
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=["n", "m", "a", "b"][: len(layout.shape)],
            attributes={ATTRIBUTE: facts},
            overwrite=False,
        )

    def _check_fits(self, layout: Layout, facts: dict[str, str]) -> None:
        stored = self.array.attrs.asdict().get(ATTRIBUTE)
        if not isinstance(stored, dict):
            raise ValueError(
                f"{self.name} is a Zarr array that empirical_ntk did not make; nothing was changed. Pass another "
                "path, or the opened array itself to overwrite it"
            )
        if tuple(self.array.shape) != layout.shape:
            raise ValueError(
                f"{self.name} holds a kernel of shape {list(self.array.shape)}, but this one has "
                f"{list(layout.shape)}; nothing was changed. Pass another path"
            )
        different = [name for name in facts if stored.get(name) != facts[name]]
        if different:
            raise ValueError(
                f"{self.name} holds a kernel that differs in: {', '.join(different)}; nothing was changed. "
                "Pass another path, or delete it to start anew"
            )

    def missing(self, regions: Iterable[Region]) -> set[int]:
        from zarr.core.sync import sync

        place = self.array.store_path
        prefix = f"{place.path}/" if place.path else ""

        async def listed() -> set[str]:
            return {key.removeprefix(prefix) async for key in place.store.list_prefix(prefix)}

        present = sync(listed())
        return {index for index, region in enumerate(regions) if not self._whole(region, present)}

    def _whole(self, region: Region, present: set[str]) -> bool:
        """Whether all pieces of the region are there with the right checksum."""
        edges = self.array.chunks
        rows, columns = (
            range(part.start // edge, -(-part.stop // edge)) for part, edge in zip(region, edges, strict=False)
        )
        trailing = (0,) * (len(self.array.shape) - 2)
        keys = {self.array.metadata.encode_chunk_key((row, column, *trailing)) for row in rows for column in columns}
        if not keys <= present:
            return False
        try:
            self.array[region]
        except (ValueError, TypeError):  # a wrong checksum
            return False
        return True

    def write(self, region: Region, values: Tensor) -> None:
        self.array[region] = values.cpu().numpy()

    def result(self) -> Any:
        return self._zarr.open_array(self.where, mode="r")


def destination(out: Any) -> Destination:
    """The destination for what the user passed as `out`.

    Raises:
        TypeError: it is neither a path, nor a Zarr store, nor an array that can be written.
    """
    if isinstance(out, str | Path):
        return ZarrArray(out)
    if hasattr(out, "shape") and hasattr(out, "dtype") and hasattr(out, "__setitem__"):
        attributes = getattr(out, "attrs", None)
        ours = attributes is not None and hasattr(out, "store_path") and ATTRIBUTE in attributes
        return ZarrArray(out) if ours else PlainArray(out)
    if hasattr(out, "list_prefix") or hasattr(out, "store"):
        return ZarrArray(out)
    raise TypeError(f"out must be a path, a Zarr store or an array that can be written, got {type(out).__name__}")
