"""Bugs that the simulator must report, each next to the right version of the same code, which must pass."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.simulator import Fault
from tests.ptx.snippets import run

NOTHING = np.zeros(64, np.uint32)
ADDRESS = "shl.b32 %r2, %r1, 2; mov.u32 %r3, dynamic; add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 128;"
"""%r4: this thread's shared word; %r5: that of a thread of the other warp."""


def fails(body: str, message: str, threads: int = 64, shared_bytes: int = 256, declarations: str = "") -> None:
    with pytest.raises(Fault, match=message):
        run(body, NOTHING, threads=threads, shared_bytes=shared_bytes, declarations=declarations)


def passes(body: str, threads: int = 64) -> None:
    run(body, NOTHING, threads=threads, shared_bytes=256)


def test_global_access_behind_or_before_a_buffer() -> None:
    passes("ld.global.b32 %r2, [%rd4];")
    fails("ld.global.b32 %r2, [%rd4+4];", "load of 4 bytes out of bounds, 1 lanes, up to 4 bytes behind")
    fails("st.global.b32 [%rd5+-256], %r1;", "store of 4 bytes out of bounds")
    fails("sub.s64 %rd6, %rd4, %rd1; ld.global.b32 %r2, [%rd6];", "out of bounds below all buffers")


def test_a_predicate_keeps_lanes_out() -> None:
    passes("setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r2, [%rd4+4];")


def test_misaligned_access() -> None:
    fails("ld.global.b32 %r2, [%rd4+2];", "not aligned")
    fails("ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", "not aligned|out of bounds")
    fails("st.shared.b32 [dynamic+2], %r1;", "not aligned")


def test_shared_access_out_of_bounds() -> None:
    fails("st.shared.b32 [dynamic+256], %r1;", "out of bounds of shared memory")
    fails(
        "st.shared.b32 [small+8], %r1;", "shared memory", shared_bytes=0, declarations=".shared .align 4 .b8 small[8];"
    )


def test_local_access_out_of_bounds() -> None:
    fails("st.local.u32 [kept+8], %r1;", "out of bounds of local", declarations=".local .align 4 .b8 kept[8];")


def test_read_of_unwritten_shared_memory() -> None:
    fails("ld.shared.b32 %r2, [dynamic];", "unwritten")
    fails(f"{ADDRESS} atom.shared.add.u32 %r9, [%r4], 1;", "unwritten")


def test_missing_barrier_before_a_read_of_another_warp() -> None:
    body = f"{ADDRESS} st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r6, [%r5];"
    passes(body)
    fails(body.replace("bar.sync 0;", ""), "race|unwritten")


def test_missing_barrier_before_a_second_write() -> None:
    body = (
        f"{ADDRESS} st.shared.b32 [%r4], 1; bar.sync 0; ld.shared.b32 %r6, [%r5]; bar.sync 0; st.shared.b32 [%r4], 2;"
    )
    passes(body)
    without_second = body.replace("ld.shared.b32 %r6, [%r5]; bar.sync 0;", "ld.shared.b32 %r6, [%r5];")
    fails(without_second, "race on shared memory: 64 lanes write")


def test_two_warps_write_one_word() -> None:
    passes("st.shared.b32 [dynamic], 7;")
    fails("st.shared.b32 [dynamic], %r1;", "race")
    passes("st.shared.b32 [dynamic], %r1;", threads=32)


def test_plain_access_beside_atomics() -> None:
    body = "st.shared.b32 [dynamic], 0; bar.sync 0; atom.shared.add.u32 %r9, [dynamic], 1; bar.sync 0;"
    body += "ld.shared.b32 %r6, [dynamic];"
    passes(body)
    fails(body.replace("1; bar.sync 0;", "1;"), "race")


def test_barrier_that_only_some_threads_reach() -> None:
    body = """
      setp.lt.u32 %p1, %r1, 32;
      @%p1 bra first;
      bar.sync 0;
      bra.uni end;
    first: bar.sync 0;
    end: st.global.b32 [%rd5], %r1;
    """
    fails(body, "wait at different barriers")


def test_shuffle_from_a_lane_that_left() -> None:
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;"
    fails(body, "does not take part", threads=32)


def test_matrix_instruction_of_a_part_of_a_warp() -> None:
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 ret; redux.sync.max.s32 %r2, %r1, -1;"
    fails(body, "part of a warp", threads=32)


def test_asynchronous_copy_read_before_its_wait_or_by_others_without_a_barrier() -> None:
    copy = f"{ADDRESS} cp.async.ca.shared.global [%r4], [%rd4], 4; cp.async.commit_group;"
    wait, barrier, read = "cp.async.wait_group 0;", "bar.sync 0;", "ld.shared.b32 %r6, [%r5];"
    passes(copy + wait + barrier + read)
    fails(copy + wait + read, "race|unwritten")
    # Waiting after the barrier orders only one's own copy.
    fails(copy + barrier + wait + read, "race")


def test_asynchronous_copy_into_a_buffer_still_read() -> None:
    body = f"{ADDRESS} st.shared.b32 [%r4], 1; bar.sync 0; ld.shared.b32 %r6, [%r5];"
    fails(f"{body} cp.async.ca.shared.global [%r4], [%rd4], 4;", "race")
    passes(f"{body} bar.sync 0; cp.async.ca.shared.global [%r4], [%rd4], 4;")


def test_store_through_a_32_bit_address_of_a_64_bit_space() -> None:
    """An index times a width that wraps in 32 bits leaves the buffer: the fault of a kernel without 64-bit offsets."""
    wraps = "mov.u32 %r2, 0x40000001; mul.lo.s32 %r3, %r2, 4; cvt.u64.u32 %rd6, %r3;"
    wraps += "add.s64 %rd6, %rd6, %rd1; ld.global.b32 %r4, [%rd6];"
    passes(wraps)  # wrapped to a valid address, so only the value is wrong
    wide = wraps.replace("mul.lo.s32 %r3, %r2, 4; cvt.u64.u32 %rd6, %r3;", "mul.wide.u32 %rd6, %r2, 4;")
    fails(wide, "out of bounds")


def test_program_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.simulator.machine.MOST_STEPS", 1000)
    fails("again: bra.uni again;", "more than 1000 instructions")


def test_the_message_names_the_instruction_and_the_thread() -> None:
    with pytest.raises(
        Fault, match=r"snippet: .*at 'ld.global.b32 %r2, \[%rd4\+4\]'.*block 0 of the wave, warp 0, lane 0"
    ):
        run("ld.global.b32 %r2, [%rd4+4];", NOTHING, threads=64)
