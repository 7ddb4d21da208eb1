"""The memory spaces: global memory as the regions handed over, shared memory with its races, local and parameters.

Global addresses are those of this process, so tensors and arrays are used in place. Anything outside the regions, or
not aligned to the access, is a Fault. Regions may be mapped lazily by the operating system: an address space far beyond
2³¹ elements costs only the pages touched.

A race on shared memory is found by which warps touched a byte since the last barrier, not by an unlucky order: two
warps, one of them writing another value, no barrier between. Reading what nothing has written is a Fault as well.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.simulator.counters import SECTOR
from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import UNSIGNED, Lanes

SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = 1 << 57, 1 << 58, 1 << 59
"""Where the other spaces begin among generic addresses."""


def gather(data: NDArray[Any], places: Lanes, size: int, count: int) -> Lanes:
    """[n, count] words of `size` bytes at byte places [n] of uint8 `data`; places are multiples of `size`."""
    words = data[: data.size // size * size].view(UNSIGNED[8 * size])
    index = places // size
    return words[index[:, None] + np.arange(count)] if count > 1 else words[index][:, None]


def scatter(data: NDArray[Any], places: Lanes, values: Lanes) -> None:
    """The reverse: of lanes that write one place, the last wins."""
    size, count = values.dtype.itemsize, values.shape[1]
    words = data[: data.size // size * size].view(values.dtype)
    words[(places // size)[:, None] + np.arange(count)] = values


class Touched:
    """Which sectors were touched; looks only between the first and the last, as address space may be vast."""

    def __init__(self, sectors: int) -> None:
        self.marks, self.first, self.last = np.zeros(sectors, bool), sectors, -1

    def add(self, sectors: Lanes) -> None:
        self.marks[sectors] = True
        self.first, self.last = min(self.first, int(sectors.min())), max(self.last, int(sectors.max()))

    def count(self) -> int:
        return int(np.count_nonzero(self.marks[self.first : self.last + 1]))


class Region:
    """Bytes [start, start + size) of this process's memory, and which of its sectors were loaded and stored."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.end = start, start + size
        # Whole words of 16 bytes around it, so that every aligned access lies in one array; checks come before.
        self.base = start // 16 * 16
        bytes_around = self.end - self.base
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * bytes_around).from_address(self.base))
        sectors = self.end // SECTOR - start // SECTOR + 1
        self.loaded, self.stored = Touched(sectors), Touched(sectors)


class GlobalMemory:
    """The regions that a kernel may touch."""

    def __init__(self, extents: list[tuple[int, int]]) -> None:
        """Args: (address, bytes) of each buffer; overlapping ones are merged."""
        merged: list[list[int]] = []
        for start, size in sorted(extents):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            elif size:
                merged.append([start, start + size])
        self.regions = [Region(start, end - start) for start, end in merged]
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def load(self, addresses: Lanes, size: int, count: int) -> Lanes:
        """[n, count] words of `size` bytes."""
        values = np.empty((addresses.size, count), UNSIGNED[8 * size])
        for region, chosen in self._regions(addresses, size * count, "load"):
            values[chosen] = gather(region.data, addresses[chosen] - region.base, size, count)
            region.loaded.add(addresses[chosen] // SECTOR - region.start // SECTOR)
        return values

    def store(self, addresses: Lanes, values: Lanes) -> None:
        """Store [n, count] words."""
        for region, chosen in self._regions(addresses, values.dtype.itemsize * values.shape[1], "store"):
            scatter(region.data, addresses[chosen] - region.base, values[chosen])
            region.stored.add(addresses[chosen] // SECTOR - region.start // SECTOR)

    def _regions(self, addresses: Lanes, size: int, what: str) -> list[tuple[Region, Any]]:
        """The regions that the addresses lie in, each with its lanes; all of them are checked."""
        if (addresses % size).any():
            lane = int(np.flatnonzero(addresses % size)[0])
            raise Fault(f"{what} of {size} bytes is not aligned, first at lane {lane} of those active")
        numbers = np.searchsorted(self.starts, addresses, side="right") - 1
        low = int(numbers.min(initial=0))
        if low < 0:
            raise Fault(f"{what} of {size} bytes out of bounds below all buffers, {int((numbers < 0).sum())} lanes")
        parts: list[tuple[Region, Any]] = []
        same = bool((numbers == numbers[0]).all())
        for number in [int(numbers[0])] if same else np.unique(numbers).tolist():
            region = self.regions[number]
            chosen: Any = slice(None) if same else numbers == number
            beyond = addresses[chosen] + size - region.end
            if (beyond > 0).any():
                raise Fault(
                    f"{what} of {size} bytes out of bounds, {int((beyond > 0).sum())} lanes, up to"
                    f" {int(beyond.max())} bytes behind a buffer of {region.end - region.start} bytes"
                )
            parts.append((region, chosen))
        return parts

    def distinct_sectors(self) -> tuple[int, int]:
        """Sectors loaded and stored at least once."""
        return (
            sum(region.loaded.count() for region in self.regions),
            sum(region.stored.count() for region in self.regions),
        )


class BlockMemory:
    """Bytes that each of several blocks (or lanes) has for itself, one after another: parameters, local memory."""

    def __init__(self, owners: int, size: int, what: str) -> None:
        self.size, self.stride, self.what = size, -(-max(size, 1) // 16) * 16, what
        self.data = np.zeros(owners * self.stride, np.uint8)

    def places(self, owners: Lanes, addresses: Lanes, size: int, what: str) -> Lanes:
        """Byte places of accesses, checked."""
        if ((addresses < 0) | (addresses + size > self.size)).any():
            raise Fault(f"{what} of {size} bytes out of bounds of {self.what} memory ({self.size} bytes)")
        if (addresses % size).any():
            raise Fault(f"{what} of {size} bytes of {self.what} memory is not aligned")
        return owners * self.stride + addresses

    def load(self, owners: Lanes, addresses: Lanes, size: int, count: int) -> Lanes:
        """[n, count] words of `size` bytes."""
        return gather(self.data, self.places(owners, addresses, size * count, "load"), size, count)

    def store(self, owners: Lanes, addresses: Lanes, values: Lanes) -> None:
        """Store [n, count] words."""
        scatter(self.data, self.places(owners, addresses, values.dtype.itemsize * values.shape[1], "store"), values)


class SharedMemory(BlockMemory):
    """Shared memory of several blocks, with a shadow of who touched what since the block's last barrier.

    The shadow has one entry for each `granule` bytes, the smallest access of the kernel. NOBODY, a warp's number + 1,
    or SEVERAL.
    """

    NOBODY, SEVERAL = 0, -1

    def __init__(self, blocks: int, size: int, granule: int) -> None:
        super().__init__(blocks, size, "shared")
        self.data[:] = 0xFF
        self.granule = granule
        entries = self.data.size // granule
        self.written = np.zeros(entries, bool)
        self.writer, self.reader = np.zeros(entries, np.int8), np.zeros(entries, np.int8)
        self.atomic = np.zeros(entries, bool)
        self.unfenced = np.zeros(entries, bool)

    @property
    def chunks(self) -> Lanes:
        """The bytes as [chunks, 16]."""
        return self.data.reshape(-1, 16)

    def barrier(self, blocks: Lanes) -> None:
        """What came before is visible to all threads of these blocks."""
        for shadow in (self.writer, self.reader, self.atomic):
            shadow.reshape(-1, self.stride // self.granule)[blocks] = 0

    def _entries(self, places: Lanes, size: int) -> Lanes:
        return (places // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def shared_load(self, owners: Lanes, warps: Lanes, addresses: Lanes, size: int, count: int) -> Lanes:
        """[n, count] words read by lanes of `warps` (numbered within the block)."""
        places = self.places(owners, addresses, size * count, "load")
        entries, name = self._entries(places, size * count), (warps + 1).astype(np.int8)[:, None]
        if not self.written[entries].all():
            raise Fault(f"load of {np.count_nonzero(~self.written[entries].all(1))} lanes from unwritten shared memory")
        writer = self.writer[entries]
        bad = ((writer != self.NOBODY) & (writer != name)) | self.atomic[entries]
        if bad.any():
            raise Fault(f"race on shared memory: {int(bad.any(1).sum())} lanes read what another warp wrote")
        reader = self.reader[entries]
        self.reader[entries] = np.where((reader == self.NOBODY) | (reader == name), name, self.SEVERAL)
        met = self.reader[entries] != name
        self.reader[entries[met]] = self.SEVERAL
        return gather(self.data, places, size, count)

    def shared_store(self, owners: Lanes, warps: Lanes, addresses: Lanes, values: Lanes) -> None:
        """Store [n, count] words; a value that was there already is no race."""
        size = values.dtype.itemsize * values.shape[1]
        places = self.places(owners, addresses, size, "store")
        entries, name = self._entries(places, size), (warps + 1).astype(np.int8)[:, None]
        changed = (gather(self.data, places, values.dtype.itemsize, values.shape[1]) != values).any(1)
        scatter(self.data, places, values)
        lost = (gather(self.data, places, values.dtype.itemsize, values.shape[1]) != values).any(1)
        writer, reader = self.writer[entries], self.reader[entries]
        others = ((writer != self.NOBODY) & (writer != name)) | ((reader != self.NOBODY) & (reader != name))
        # Where the last of several writers of this very instruction won, the others must be of its warp.
        self.writer[entries] = name
        clash = lost[:, None] & (self.writer[entries] != name)
        bad = (others | self.atomic[entries]) & changed[:, None] | clash
        if bad.any():
            raise Fault(f"race on shared memory: {int(bad.any(1).sum())} lanes write what another warp reads or writes")
        unchanged = ~changed[:, None] & (writer != self.NOBODY)
        self.writer[entries[unchanged]] = writer[unchanged]
        self.written[entries] = True
        self.unfenced[entries] = True

    def shared_atomic(self, owner: int, warp: int, address: int, size: int) -> Lanes:
        """The place of one atomic, which may meet other atomics but no plain access of another warp."""
        place = self.places(np.array([owner]), np.array([address]), size, "atomic")
        entries = self._entries(place, size)[0]
        if not self.written[entries].all():
            raise Fault("atomic on unwritten shared memory")
        for shadow in (self.writer[entries], self.reader[entries]):
            if ((shadow != self.NOBODY) & (shadow != warp + 1)).any():
                raise Fault("race on shared memory: an atomic meets a plain access of another warp")
        self.atomic[entries] = self.unfenced[entries] = True
        return place

    def warpgroup_load(self, owners: Lanes, addresses: Lanes) -> tuple[Lanes, Lanes]:
        """Numbers and bytes [n, count, 16] of the chunks at addresses [n, count], read by whole warpgroups through the
        async proxy."""
        places = self.places(owners[:, None], addresses, 16, "wgmma")
        entries = self._entries(places.reshape(-1), 16)
        if not self.written[entries].all():
            raise Fault("wgmma reads unwritten shared memory")
        if (self.writer[entries] != self.NOBODY).any() or self.atomic[entries].any():
            raise Fault("race on shared memory: wgmma reads what a warp wrote, no barrier between")
        if self.unfenced[entries].any():
            raise Fault("wgmma reads what was written through the generic proxy, no fence.proxy.async between")
        self.reader[entries] = self.SEVERAL
        return places // 16, self.chunks[places // 16]

    def proxy_fence(self, owners: Lanes, warps: Lanes) -> None:
        """What these warps wrote, and all that a barrier made visible to them, is visible to the async proxy."""
        unfenced, writer = (shadow.reshape(-1, self.stride // self.granule) for shadow in (self.unfenced, self.writer))
        for owner in np.unique(owners):
            seen = (self.NOBODY, *(np.unique(warps[owners == owner]) + 1))
            unfenced[owner] &= ~np.isin(writer[owner], seen)
