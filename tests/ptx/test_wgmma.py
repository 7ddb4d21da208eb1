"""wgmma in the simulator: layouts of shared memory worked out element by element, and misuse that it must report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.ptx.simulator import Fault
from tests.ptx.snippets import run

THREADS = 128
B_START = 16384
SHARED_BYTES = 65536
SWIZZLE_FIELD = {16: 0, 128: 1, 64: 2, 32: 3}
"""Bytes of a swizzled row (16: not swizzled) → the descriptor's field."""
BYTES = {"bf16": 2, "f16": 2, "tf32": 4}


@dataclass(frozen=True)
class Layout:
    """How an operand [rows, depth] lies in shared memory; `swizzle` in bytes, 16 without."""

    rows: int
    depth: int
    kind: str
    swizzle: int
    mn_major: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """Leading and stride byte offset: blocks of 8 rows of `swizzle` bytes, one after another."""
        block = 8 * self.swizzle
        if self.swizzle == 16:
            along, across = 128 * self.rows // 8, 128
            return along, across
        return (2 * block, block) if self.mn_major else (0, block)

    def descriptor(self, start: int) -> int:
        leading, stride = self.strides
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLE_FIELD[self.swizzle] << 62

    def offset(self, row: int, k: int) -> int:
        """Byte of an element, by the canonical layouts of the PTX ISA: T elements are 16 bytes."""
        leading, stride = self.strides
        size = BYTES[self.kind]
        t, width = 16 // size, self.swizzle // 16
        if self.mn_major and self.swizzle == 16:
            place = row % t * size + row // t * stride + k % 8 * 16 + k // 8 * leading
        elif self.mn_major:
            place = row % (t * width) * size + row // (t * width) * leading + k % 8 * self.swizzle + k // 8 * stride
        elif self.swizzle == 16:
            place = row % 8 * 16 + row // 8 * stride + k % t * size + k // t * leading
        else:
            place = row % 8 * self.swizzle + row // 8 * stride + k * size
        return place ^ ((place >> 7) % width) << 4

    def write(self, image: NDArray[np.uint8], start: int, values: NDArray[Any]) -> None:
        encoded = words(values, self.kind)
        for row in range(self.rows):
            for k in range(self.depth):
                at = start + self.offset(row, k)
                image[at : at + BYTES[self.kind]] = encoded[row : row + 1, k].view(np.uint8)


def words(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """Numbers in 16 bits or float32, as unsigned words."""
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if kind == "f16" else values.astype(np.float32).view(np.uint32)


COPY = (
    f"shl.b32 %r2, %r1, 4; mov.u32 %r3, dynamic; add.s32 %r3, %r3, %r2; cvt.u64.u32 %rd6, %r2; "
    f"add.s64 %rd6, %rd6, %rd1; mov.u32 %r8, 0; again: ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd6]; "
    f"st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; add.s32 %r3, %r3, 2048; add.s64 %rd6, %rd6, 2048; "
    f"add.s32 %r8, %r8, 1; setp.lt.s32 %p1, %r8, {SHARED_BYTES // 2048}; @%p1 bra again; "
)
"""The input into shared memory, 16 bytes of each thread at a time."""
COMMIT, WAIT = "wgmma.commit_group.sync.aligned; ", "wgmma.wait_group.sync.aligned 0; "
READY = "bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned; "


def body_of(mma: str, columns: int, before: str = "", after: str = WAIT, ready: str = READY) -> str:
    """Accumulators %d start at the thread's number; all of them are stored at the end."""
    count = columns // 2
    start = "".join(f"cvt.rn.f32.u32 %d{i}, %r1; " for i in range(count))
    stores = f"mul.wide.u32 %rd7, %r1, {4 * count}; add.s64 %rd7, %rd2, %rd7; "
    stores += "".join(f"st.global.b32 [%rd7+{4 * i}], %d{i}; " for i in range(count))
    return COPY + start + before + ready + mma + COMMIT + after + stores


def accumulators(columns: int) -> str:
    return "{" + ", ".join(f"%d{i}" for i in range(columns // 2)) + "}"


def execute(body: str, image: NDArray[np.uint8], columns: int, threads: int = THREADS) -> NDArray[np.float32]:
    """The matrix [64, columns] that the accumulators hold at the end."""
    declarations = f".reg .f32 %d<{columns // 2}>; .reg .b64 %desc<9>; .reg .b32 %a<4>;"
    stored, _ = run(
        body, image, outputs=64 * columns, threads=threads, shared_bytes=SHARED_BYTES, declarations=declarations
    )
    result = np.empty((64, columns), np.float32)
    for thread, own in enumerate(stored.view(np.float32).reshape(THREADS, -1)):
        warp, lane = divmod(thread, 32)
        for i, value in enumerate(own):
            result[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = value
    return result


def started(columns: int) -> NDArray[np.float32]:
    """What `execute` gives where nothing was computed: every element the number of its thread."""
    thread = 32 * (np.arange(64)[:, None] // 16) + 4 * (np.arange(64)[:, None] % 8) + np.arange(columns) // 2 % 4
    return thread.astype(np.float32)


def operands(a: Layout, b: Layout) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Small integers, whose products and sums are exact in every type, and the image of shared memory."""
    generator = np.random.default_rng(a.swizzle + b.rows)
    left, right = (generator.integers(-4, 5, (x.rows, x.depth)).astype(np.float32) for x in (a, b))
    image = np.zeros(SHARED_BYTES, np.uint8)
    a.write(image, 0, left)
    b.write(image, B_START, right)
    return left, right, image


def mma(a: Layout, b: Layout, scale: str = "1") -> str:
    flags = f", {int(a.mn_major)}, {int(b.mn_major)}" if a.kind != "tf32" else ""
    return (
        f"mov.b64 %desc0, {a.descriptor(0)}; mov.b64 %desc1, {b.descriptor(B_START)}; "
        f"wgmma.mma_async.sync.aligned.m64n{b.rows}k{a.depth}.f32.{a.kind}.{a.kind} {accumulators(b.rows)}, "
        f"%desc0, %desc1, {scale}, 1, 1{flags}; "
    )


@pytest.mark.parametrize("swizzle", list(SWIZZLE_FIELD))
@pytest.mark.parametrize(
    ("kind", "a_major", "b_major"),
    [("bf16", False, False), ("f16", True, False), ("bf16", False, True), ("f16", True, True), ("tf32", False, False)],
)
def test_product_out_of_every_layout(kind: str, a_major: bool, b_major: bool, swizzle: int) -> None:
    """N = 128: two blocks of 64 columns in the widest MN-major layout."""
    depth = 32 // BYTES[kind]
    a, b = Layout(64, depth, kind, swizzle, a_major), Layout(128, depth, kind, swizzle, b_major)
    left, right, image = operands(a, b)
    assert np.array_equal(execute(body_of(mma(a, b), 128), image, 128), left @ right.T + started(128))


K_MAJOR = (Layout(64, 16, "bf16", 32), Layout(16, 16, "bf16", 32))


def test_without_scale_d_the_sums_start_at_zero() -> None:
    left, right, image = operands(*K_MAJOR)
    assert np.array_equal(execute(body_of(mma(*K_MAJOR, scale="0"), 16), image, 16), left @ right.T)


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_a_in_registers_and_products_in_a_chain(kind: str) -> None:
    """Two products on the same accumulators need no fence or wait between."""
    depth, elements = 32 // BYTES[kind], 4 // BYTES[kind]
    b = Layout(16, depth, kind, 32)
    _, right, image = operands(Layout(64, depth, kind, 32), b)
    # Every thread puts its number (exact in bfloat16 below 256) into each element of its fragments.
    word = words(np.arange(THREADS), kind).astype(np.uint64)
    assert word[3] << 16 | word[3] < 2**64
    encode = "cvt.rn.f32.u32 %a0, %r1; "
    encode += "shr.b32 %r9, %a0, 16; shl.b32 %r10, %r9, 16; or.b32 %a0, %r9, %r10; " if elements == 2 else ""
    encode += "mov.b32 %a1, %a0; mov.b32 %a2, %a0; mov.b32 %a3, %a0; "
    one = f"wgmma.mma_async.sync.aligned.m64n16k{depth}.f32.{kind}.{kind} {accumulators(16)}, "
    one += "{%a0, %a1, %a2, %a3}, %desc1, 1, 1, 1" + (", 0; " if elements == 2 else "; ")
    body = body_of(f"mov.b64 %desc1, {b.descriptor(B_START)}; " + one + one, 16, before=encode)
    row, k = np.arange(64)[:, None], np.arange(depth)
    left = 32 * (row // 16) + 4 * (row % 8) + (k // elements) % 4
    assert np.array_equal(execute(body, image, 16), 2 * left @ right.T + started(16))


def outcome(body: str, threads: int = THREADS) -> NDArray[np.float32]:
    return execute(body, operands(*K_MAJOR)[2], 16, threads)


RIGHT = mma(*K_MAJOR)


def fails(message: str, body: str, threads: int = THREADS) -> None:
    with pytest.raises(Fault, match=message):
        outcome(body, threads)


def test_the_right_order_passes() -> None:
    left, right, _ = operands(*K_MAJOR)
    assert np.array_equal(outcome(body_of(RIGHT, 16)), left @ right.T + started(16))


@pytest.mark.parametrize("after", ["", WAIT.replace("0", "1")], ids=["no wait", "wait for a group too few"])
def test_accumulators_read_before_their_wait_are_nan(after: str) -> None:
    assert np.isnan(outcome(body_of(RIGHT, 16, after=after))).all()


def test_products_that_no_group_holds_are_not_waited_for() -> None:
    assert np.isnan(outcome(body_of(RIGHT, 16).replace(COMMIT, ""))).all()


def test_wrong_swizzle_or_stride_gives_other_numbers() -> None:
    right = outcome(body_of(RIGHT, 16))
    for wrong in (Layout(64, 16, "bf16", 64), Layout(64, 16, "bf16", 128)):
        assert not np.array_equal(outcome(body_of(mma(wrong, K_MAJOR[1]), 16)), right)


def test_registers_written_after_the_fence() -> None:
    late = READY + "add.f32 %d3, %d3, %d3; "
    unfenced = READY.replace("wgmma.fence.sync.aligned;", "")
    for ready in (late, unfenced):
        fails("adds to a register that was written after", body_of(RIGHT, 16, ready=ready))


def test_stores_that_the_async_proxy_does_not_see() -> None:
    fails("no fence.proxy.async", body_of(RIGHT, 16, ready=READY.replace("fence.proxy.async.shared::cta;", "")))
    early = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned; "
    outcome(body_of(RIGHT, 16, ready=early))  # each thread's fence behind its own stores will do, too


def test_stores_of_other_warps_without_a_barrier() -> None:
    fails("no barrier between", body_of(RIGHT, 16, ready=READY.replace("bar.sync 0;", "")))


def test_operands_overwritten_before_the_wait() -> None:
    store = "st.shared.b32 [dynamic+16384], 77; "
    fails("written before the wait", body_of(RIGHT, 16, after="bar.sync 0; " + store + WAIT))
    fails("race", body_of(RIGHT, 16, after=WAIT + store))  # other warps may not have waited yet
    outcome(body_of(RIGHT, 16, after=WAIT + "bar.sync 0; " + store))


def test_a_register_overwritten_before_the_wait() -> None:
    layout = K_MAJOR[1]
    one = f"mov.b64 %desc1, {layout.descriptor(B_START)}; "
    one += f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accumulators(16)}, "
    one += "{%a0, %a1, %a2, %a3}, %desc1, 1, 1, 1, 0; "
    fill = "".join(f"mov.b32 %a{i}, 0; " for i in range(4))
    outcome(body_of(one, 16, before=fill, after=WAIT + "mov.b32 %a2, 5; "))
    fails("holds A was written", body_of(one, 16, before=fill, after="mov.b32 %a2, 5; " + WAIT))


def test_accumulators_in_flight_in_another_order() -> None:
    names = accumulators(16)
    swapped = names.replace("%d0, %d1", "%d1, %d0")
    fails("another shape or order", body_of(RIGHT + RIGHT.replace(names, swapped), 16))


def test_part_of_a_warpgroup_or_warps_that_disagree() -> None:
    some = RIGHT.replace("wgmma", "setp.lt.u32 %p2, %r1, 64; @%p2 wgmma", 1)
    fails("part of a warpgroup", body_of(some, 16))
    other = RIGHT.replace("wgmma", "setp.ge.u32 %p2, %r1, 96; @%p2 add.s64 %desc0, %desc0, 2; wgmma", 1)
    fails("different descriptors", body_of(other, 16))
    fails("whole number of warpgroups", body_of(RIGHT, 16), threads=64)


def test_unwritten_shared_memory() -> None:
    far = mma(K_MAJOR[0], K_MAJOR[1]).replace(str(K_MAJOR[1].descriptor(B_START)), str(K_MAJOR[1].descriptor(32768)))
    short = body_of(far, 16).replace(f"%r8, {SHARED_BYTES // 2048}", "%r8, 9")
    fails("unwritten", short)
