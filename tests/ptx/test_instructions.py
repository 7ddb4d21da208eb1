"""The simulator's instructions do what the PTX ISA says, on hand-written PTX with results worked out independently."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx.simulator import PtxError, load
from tests.ptx.snippets import elementwise, run

WORDS = np.array([0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF, 12345], np.uint32)
OTHERS = np.array([5, 0xFFFFFFFF, 1, 32, 7, 31, 40, 1, 3, 2, 16, 0x80000001], np.uint32)
THIRDS = WORDS[::-1].copy()


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def quotient(a: int, b: int) -> int:
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))


INTEGER: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 %r9, %r2, %r3;": lambda a, b, c: a + b,
    "sub.s32 %r9, %r2, %r3;": lambda a, b, c: a - b,
    "mul.lo.s32 %r9, %r2, %r3;": lambda a, b, c: a * b,
    "mul.hi.u32 %r9, %r2, %r3;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r9, %r2, %r3;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r9, %r2, %r3, %r4;": lambda a, b, c: a * b + c,
    "div.u32 %r9, %r2, %r3;": lambda a, b, c: a // b,
    "div.s32 %r9, %r2, %r3;": lambda a, b, c: quotient(signed(a), signed(b)),
    "rem.u32 %r9, %r2, %r3;": lambda a, b, c: a % b,
    "rem.s32 %r9, %r2, %r3;": lambda a, b, c: signed(a) - signed(b) * quotient(signed(a), signed(b)),
    "and.b32 %r9, %r2, %r3;": lambda a, b, c: a & b,
    "or.b32 %r9, %r2, %r3;": lambda a, b, c: a | b,
    "xor.b32 %r9, %r2, %r3;": lambda a, b, c: a ^ b,
    "not.b32 %r9, %r2;": lambda a, b, c: ~a,
    "neg.s32 %r9, %r2;": lambda a, b, c: -a,
    "min.s32 %r9, %r2, %r3;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r9, %r2, %r3;": lambda a, b, c: max(a, b),
    "shl.b32 %r9, %r2, %r3;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r9, %r2, %r3;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %r9, %r2, %r3;": lambda a, b, c: signed(a) >> min(b, 31),
    "shr.s32 %r9, %r2, 4;": lambda a, b, c: signed(a) >> 4,
    "lop3.b32 %r9, %r2, %r3, %r4, 0xCA;": lambda a, b, c: (a & b) | (~a & c),
    "lop3.b32 %r9, %r2, %r3, %r4, 0x96;": lambda a, b, c: a ^ b ^ c,
    "prmt.b32 %r9, %r2, %r3, 0x5410;": lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r9, %r2, %r3, 0x7700;": lambda a, b, c: (a & 255) * 257 | (b >> 24) * 0x1010000,
    "bfe.u32 %r9, %r2, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r9, %r2, 0, 8;": lambda a, b, c: (a & 255) - 256 * (a >> 7 & 1),
    "bfe.s32 %r9, %r2, 24, 20;": lambda a, b, c: signed(a) >> 24,
    "popc.b32 %r9, %r2;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r9, %r2;": lambda a, b, c: 32 - a.bit_length(),
    "setp.lt.s32 %p1, %r2, %r3; selp.b32 %r9, %r2, %r3, %p1;": lambda a, b, c: min(signed(a), signed(b)),
    "setp.lo.u32 %p1, %r2, %r3; @%p1 mov.u32 %r9, 7; @!%p1 mov.u32 %r9, 9;": lambda a, b, c: 7 if a < b else 9,
    "setp.ne.and.s32 %p2, %r2, 1, %p1; selp.u32 %r9, 1, 0, %p2;": lambda a, b, c: 0,
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r9, {%rs2, %rs1};": lambda a, b, c: a >> 16 | a << 16,
    "cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r9, %rs1;": lambda a, b, c: (a & 0xFFFF) - ((a >> 15 & 1) << 16),
    "cvt.s64.s32 %rd9, %r2; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;": lambda a, b, c: -(a >> 31),
    "mul.wide.s32 %rd9, %r2, %r3; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;": (
        lambda a, b, c: signed(a) * signed(b) >> 32
    ),
    "cvt.u64.u32 %rd8, %r4; mad.wide.u32 %rd9, %r2, %r3, %rd8; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;": (
        lambda a, b, c: a * b + c >> 32
    ),
    "cvt.u64.u32 %rd8, %r2; shl.b64 %rd8, %rd8, 32; mul.hi.u64 %rd9, %rd8, %rd8; cvt.u32.u64 %r9, %rd9;": (
        lambda a, b, c: a * a
    ),
    "{ .reg .b32 own; add.s32 own, %r2, 1; mov.b32 %r9, own; }": lambda a, b, c: a + 1,
}


@pytest.mark.parametrize("instruction", list(INTEGER))
def test_integer_instructions(instruction: str) -> None:
    expected = [INTEGER[instruction](*map(int, row)) & 0xFFFFFFFF for row in zip(WORDS, OTHERS, THIRDS)]
    assert elementwise(instruction, WORDS, OTHERS, THIRDS).tolist() == expected


FLOATS = np.array([0.0, -0.0, 1.5, -2.25, 1e-40, 3e38, math.inf, -math.inf, math.nan, 1 / 3, 65519.9, 1e5], np.float32)
FLOAT_OTHERS = np.array([1.0, math.nan, -3.0, 0.1, 1.0, 3e38, math.inf, 2.0, 5.0, 1e-3, 2.0, -1e-38], np.float32)


def rounded(x: float) -> float:
    """Nearest float32 of an exact double; overflow to infinity."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def larger(a: float, b: float) -> float:
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


FLOATING: dict[str, Callable[[float, float], float]] = {
    "add.f32 %r9, %r2, %r3;": lambda a, b: rounded(a + b),
    "mul.rn.f32 %r9, %r2, %r3;": lambda a, b: rounded(a * b),
    "fma.rn.f32 %r9, %r2, %r3, %r2;": lambda a, b: rounded(a * b + a),
    "max.f32 %r9, %r2, %r3;": larger,
    "max.NaN.f32 %r9, %r2, %r3;": lambda a, b: math.nan if math.isnan(a + b) and a not in (math.inf,) else max(a, b),
    "neg.f32 %r9, %r2;": lambda a, b: -a,
    "abs.f32 %r9, %r2;": lambda a, b: abs(a),
    "setp.lt.f32 %p1, %r2, %r3; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda a, b: float(a < b),
    "setp.geu.f32 %p1, %r2, %r3; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda a, b: float(not a < b),
    "setp.ne.f32 %p1, %r2, %r3; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": (
        lambda a, b: float(a != b and not math.isnan(a) and not math.isnan(b))
    ),
    "setp.neu.f32 %p1, %r2, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda a, b: float(a != a),
    "setp.num.f32 %p1, %r2, %r3; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": (
        lambda a, b: float(not math.isnan(a) and not math.isnan(b))
    ),
    "mul.ftz.f32 %r9, %r2, %r3;": lambda a, b: (
        math.nan
        if math.isnan(a * b)
        else math.copysign(0.0, a * b)
        if min(abs(a), abs(b)) < 2**-126
        else rounded(a * b)
    ),
    "cvt.rzi.s32.f32 %r8, %r2; cvt.rn.f32.s32 %r9, %r8;": (
        lambda a, b: rounded(
            0.0 if math.isnan(a) else min(max(math.trunc(max(min(a, 1e10), -1e10)), -(2**31)), 2**31 - 1)
        )
    ),
}


@pytest.mark.parametrize("instruction", list(FLOATING))
def test_float_instructions(instruction: str) -> None:
    values = elementwise(instruction, FLOATS, FLOAT_OTHERS).view(np.float32)
    for value, a, b in zip(values, FLOATS, FLOAT_OTHERS):
        expected = FLOATING[instruction](float(a), float(b))
        assert struct.pack("f", value) == struct.pack("f", expected) or (np.isnan(value) and math.isnan(expected)), (
            a, b, value, expected,
        )  # fmt: skip


def nearest_bfloat16(x: float) -> int:
    """By search among the neighbours of the truncated word, ties to even."""
    word = struct.unpack("I", struct.pack("f", x))[0]
    if math.isnan(x):
        return 0x7FFF
    low = word >> 16
    half = word & 0xFFFF
    return low + (half > 0x8000 or (half == 0x8000 and low & 1))


def test_conversions_to_16_bits_round_to_nearest_even() -> None:
    values = np.concatenate([FLOATS, np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38], np.float32)])
    bfloat16 = elementwise("cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r9, %rs1;", values)
    assert bfloat16.tolist() == [nearest_bfloat16(float(x)) for x in values]
    packed = elementwise("cvt.rn.bf16x2.f32 %r9, %r2, %r3;", values, values[::-1].copy())
    assert (packed >> 16).tolist() == bfloat16.tolist()
    assert (packed & 0xFFFF).tolist() == bfloat16[::-1].tolist()
    back = elementwise("cvt.u16.u32 %rs1, %r2; cvt.f32.bf16 %r9, %rs1;", bfloat16)
    assert (back[~np.isnan(values)] >> 16).tolist() == bfloat16[~np.isnan(values)].tolist()
    half = elementwise("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r9, %rs1;", values).view(np.float32)
    for value, x in zip(half, values):
        exact = math.inf if abs(x) >= 65520 else abs(x)
        step = max(2.0 ** (math.floor(math.log2(exact)) - 10), 2.0**-24) if 0 < exact < math.inf else 1.0
        assert (
            np.isnan(value)
            if math.isnan(x)
            else abs(value) == (exact if exact == math.inf else round(exact / step) * step)
        )


def test_tf32_rounding_goes_to_nearest_away_from_zero() -> None:
    values = np.array([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, math.inf], np.float32)
    result = elementwise("cvt.rna.tf32.f32 %r9, %r2;", values).view(np.float32)
    assert result.tolist() == [1 + 2**-10, -1 - 2**-10, 1.0, math.inf]


def test_divergent_lanes_meet_again() -> None:
    body = """
      and.b32 %r2, %r1, 3; mov.u32 %r3, 0;
    loop:
      setp.eq.s32 %p1, %r2, 0;
      @%p1 bra done;
      add.s32 %r3, %r3, %r1; sub.s32 %r2, %r2, 1;
      bra.uni loop;
    done:
      shfl.sync.idx.b32 %r4, %r3, 31, 31, -1;
      add.s32 %r3, %r3, %r4;
      st.global.b32 [%rd5], %r3;
    """
    result, counters = run(body, np.zeros(1, np.uint32))
    assert result.tolist() == [lane * (lane % 4) + 31 * 3 for lane in range(32)]
    assert counters.opcodes["shfl"] == 1


def shuffled(kind: str, b: int, c: int) -> list[int]:
    body = f"shfl.sync.{kind}.b32 %r9|%p1, %r1, {b}, {c}, -1; @!%p1 add.s32 %r9, %r9, 100; st.global.b32 [%rd5], %r9;"
    return run(body, np.zeros(1, np.uint32))[0].tolist()


def test_shuffles() -> None:
    lanes = range(32)
    assert shuffled("bfly", 5, 31) == [lane ^ 5 for lane in lanes]
    assert shuffled("up", 3, 0) == [lane - 3 if lane >= 3 else lane + 100 for lane in lanes]
    assert shuffled("down", 2, 31) == [lane + 2 if lane < 30 else lane + 100 for lane in lanes]
    # In segments of 8 lanes.
    assert shuffled("idx", 6, 0x181F) == [lane // 8 * 8 + 6 for lane in lanes]
    assert shuffled("down", 1, 0x181F) == [lane + 1 if lane % 8 < 7 else lane + 100 for lane in lanes]


def test_votes_reductions_and_masks() -> None:
    body = """
      setp.lt.u32 %p1, %r1, 5;
      vote.sync.ballot.b32 %r2, %p1, -1;
      vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
      selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 1, 0, %p3;
      sub.s32 %r5, %r1, 20; redux.sync.max.s32 %r6, %r5, -1; redux.sync.min.s32 %r7, %r5, -1;
      @%p1 bra some;
      bra.uni end;
    some: activemask.b32 %r8;
    end:
      add.s32 %r9, %r2, %r3; add.s32 %r9, %r9, %r4; add.s32 %r9, %r9, %r6; add.s32 %r9, %r9, %r7;
      @%p1 add.s32 %r9, %r9, %r8;
      st.global.b32 [%rd5], %r9;
    """
    result, _ = run(body, np.zeros(1, np.uint32))
    assert result.tolist() == [31 + 1 + 11 - 20 + (31 if lane < 5 else 0) for lane in range(32)]


def test_vector_loads_and_stores_and_narrow_types() -> None:
    words = np.arange(128, dtype=np.uint32) * 0x01010101
    body = """
      mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6;
      ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd7];
      st.global.v2.b32 [%rd8], {%r5, %r4};
      ld.global.s8 %r6, [%rd7+4]; ld.global.u8 %rs1, [%rd7+8]; cvt.u32.u16 %r7, %rs1;
      st.global.b32 [%rd8+8], %r6; st.global.b32 [%rd8+12], %r7;
    """
    result, counters = run(body, words, outputs=128)
    source = words.reshape(32, 4)
    bytes_of = source.view(np.int8).reshape(32, 16)
    assert np.array_equal(result.reshape(32, 4)[:, :2], source[:, [3, 2]])
    assert np.array_equal(result.reshape(32, 4)[:, 2].view(np.int32), bytes_of[:, 4])
    assert np.array_equal(result.reshape(32, 4)[:, 3], bytes_of[:, 8].astype(np.uint8))
    assert (counters.global_load_bytes, counters.global_store_bytes) == (32 * 18, 32 * 16)


def test_shared_local_and_generic_addresses() -> None:
    body = """
      shl.b32 %r2, %r1, 2; mov.u32 %r3, table; add.s32 %r4, %r3, %r2;
      mul.lo.s32 %r5, %r1, 3; st.shared.u32 [%r4], %r5;
      bar.sync 0;
      xor.b32 %r6, %r2, 128; add.s32 %r6, %r6, %r3; cvt.u64.u32 %rd6, %r6;
      cvta.shared.u64 %rd7, %rd6; ld.u32 %r7, [%rd7];
      mov.u64 %rd8, kept; cvta.local.u64 %rd9, %rd8; st.u32 [%rd9+4], %r7; ld.local.u32 %r8, [%rd8+4];
      st.u32 [%rd5], %r8;
    """
    declarations = ".shared .align 4 .b8 table[256]; .local .align 8 .b8 kept[8];"
    result, _ = run(body, np.zeros(1, np.uint32), threads=64, declarations=declarations)
    assert result.tolist() == [3 * (thread ^ 32) for thread in range(64)]


def test_atomics_on_global_and_shared_memory() -> None:
    body = """
      st.shared.u32 [sum], 5;
      bar.sync 0;
      atom.shared.add.u32 %r2, [sum], %r1;
      bar.sync 0;
      ld.shared.u32 %r3, [sum];
      red.global.max.s32 [%rd2], %r3;
      setp.eq.s32 %p1, %r1, 0;
      @%p1 atom.global.cas.b32 %r4, [%rd2+4], -1, 17;
      @%p1 st.global.b32 [%rd2+8], %r4;
    """
    result, counters = run(
        body, np.zeros(1, np.uint32), outputs=3, threads=64, declarations=".shared .align 4 .u32 sum;"
    )
    assert result.tolist() == [5 + 64 * 63 // 2, 17, 0xFFFFFFFF]
    assert counters.atomics == 64 + 1


def test_asynchronous_copies_arrive_at_the_wait() -> None:
    body = """
      shl.b32 %r2, %r1, 2; mov.u32 %r3, dynamic; add.s32 %r3, %r3, %r2;
      setp.lt.s32 %p1, %r1, 30; selp.u32 %r4, 4, 0, %p1;
      cp.async.ca.shared.global [%r3], [%rd4], 4, %r4;
      cp.async.commit_group;
      cp.async.wait_group 0;
      bar.sync 0;
      ld.shared.b32 %r5, [%r3]; st.global.b32 [%rd5], %r5;
    """
    words = np.arange(7, 39, dtype=np.uint32)
    assert run(body, words, shared_bytes=128)[0].tolist() == [*range(7, 37), 0, 0]
    too_late = body.replace("wait_group 0", "wait_group 1")
    assert run(too_late, words, shared_bytes=128)[0].tolist() == [0xFFFFFFFF] * 32


def product(shape: str, kind: str, left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """D = A·B + C by one mma.sync; words of the fragments are laid out by the formulas of the PTX ISA, lane by lane."""
    k, elements = left.shape[1], 1 if kind == "tf32" else 2
    bits = {"f16": lambda x: x.astype(np.float16).view(np.uint16), "tf32": lambda x: x.view(np.uint32)}
    bits["bf16"] = lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)
    registers_a, registers_b = 16 * k // (32 * elements), 8 * k // (32 * elements)
    a_words, b_words = np.zeros((32, registers_a), np.uint32), np.zeros((32, registers_b), np.uint32)
    c_words = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(registers_a * elements):
            if elements == 2:
                row = group if i < 2 or 4 <= i < 6 else group + 8
                column = member * 2 + (i & 1) + (8 if i >= 4 else 0)
            else:
                row, column = group + 8 * (i & 1), member + (4 if i >= 2 else 0)
            a_words[lane, i // elements] |= np.uint32(bits[kind](left[row : row + 1, column])[0]) << np.uint32(
                16 * (i % elements)
            )
        for i in range(registers_b * elements):
            row = member * 2 + (i & 1) + (8 if i >= 2 else 0) if elements == 2 else member + 4 * i
            b_words[lane, i // elements] |= np.uint32(bits[kind](right[row : row + 1, group])[0]) << np.uint32(
                16 * (i % elements)
            )
        for i in range(4):
            c_words[lane, i] = sums[group + 8 * (i >> 1), member * 2 + (i & 1)].view(np.uint32)
    words = np.concatenate([a_words, b_words, c_words], 1)
    count = words.shape[1]
    names = [f"%r{10 + i}" for i in range(count)]
    a, b = names[:registers_a], names[registers_a : registers_a + registers_b]
    c = names[registers_a + registers_b :]
    body = f"mul.wide.u32 %rd6, %r1, {4 * count}; add.s64 %rd6, %rd1, %rd6;"
    body += "mul.wide.u32 %rd7, %r1, 16; add.s64 %rd7, %rd2, %rd7;"
    body += "".join(f"ld.global.b32 {name}, [%rd6+{4 * i}];" for i, name in enumerate(names))
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r50, %r51, %r52, %r53}}, "
    body += ", ".join("{" + ", ".join(part) + "}" for part in (a, b, c)) + ";"
    body += "".join(f"st.global.b32 [%rd7+{4 * i}], %r5{i};" for i in range(4))
    fragments = run(body, words, outputs=128)[0].view(np.float32).reshape(32, 4)
    result = np.empty((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            result[(lane >> 2) + 8 * (i >> 1), lane % 4 * 2 + (i & 1)] = fragments[lane, i]
    return result


@pytest.mark.parametrize(
    ("shape", "kind"), [("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32")]
)
def test_matrix_product_of_a_warp(shape: str, kind: str) -> None:
    generator, k = np.random.default_rng(0), int(shape[6:])
    # Small integers: every product and sum is exact in every type, so any misplaced element shows.
    left, right, sums = (generator.integers(-9, 9, size).astype(np.float32) for size in ((16, k), (k, 8), (16, 8)))
    assert np.array_equal(product(shape, kind, left, right, sums), left @ right + sums)


def test_tf32_products_leave_out_13_bits() -> None:
    left, right = np.full((16, 8), 1 + 2**-11, np.float32), np.ones((8, 8), np.float32)
    assert (product("m16n8k8", "tf32", left, right, np.zeros((16, 8), np.float32)) == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_part_of_a_row(transposed: bool) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    body = f"""
      shl.b32 %r2, %r1, 4; mov.u32 %r3, dynamic; add.s32 %r3, %r3, %r2;
      mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6;
      ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd7]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
      bar.sync 0;
      ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r3];
      st.global.v4.b32 [%rd8], {{%r8, %r9, %r10, %r11}};
    """
    result, counters = run(body, matrices, outputs=128, shared_bytes=512)
    expected = np.swapaxes(matrices, 1, 2) if transposed else matrices
    halves = result.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            assert halves[lane, matrix].tolist() == expected[matrix, lane // 4, lane % 4 * 2 :][:2].tolist()
    assert counters.bank_conflicts == 0


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32), (0, 1), (132, 1)])
def test_bank_conflicts_are_counted(stride: int, wavefronts: int) -> None:
    body = f"mul.lo.s32 %r2, %r1, {stride}; st.shared.b32 [%r2], 0; ld.shared.b32 %r3, [%r2];"
    _, counters = run(body, np.zeros(1, np.uint32), shared_bytes=32 * 132)
    assert (counters.shared_phases, counters.shared_wavefronts) == (2, 2 * wavefronts)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_global_sectors_are_counted(stride: int, sectors: int) -> None:
    body = f"mul.lo.s32 %r2, %r1, {stride}; cvt.u64.u32 %rd6, %r2; add.s64 %rd6, %rd6, %rd1; ld.global.b32 %r3, [%rd6];"
    # numpy aligns to 16 bytes only: one more sector may be met.
    _, counters = run(body, np.zeros(32 * 32 // 4 + 8, np.uint32))
    assert counters.global_load_bytes == 128
    assert sectors <= counters.global_load_sectors <= sectors + 1


def test_counts_are_for_each_warp_that_takes_part() -> None:
    body = "setp.lt.u32 %p1, %r1, 40; @%p1 fma.rn.f32 %r2, %r3, %r4, %r5; @%p1 ex2.approx.ftz.f32 %r6, %r2;"
    _, counters = run(body, np.zeros(1, np.uint32), threads=96, blocks=2)
    assert counters.blocks == 2
    assert counters.opcodes["fma"] == counters.opcodes["ex2"] == 2 * 2
    assert counters.float_flops == 2 * 2 * 40


def test_unknown_text_and_instructions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="tcgen05"):
        run("tcgen05.wait::ld.sync.aligned;", np.zeros(1, np.uint32))
    with pytest.raises(PtxError, match="label"):
        run("bra nowhere;", np.zeros(1, np.uint32))
    with pytest.raises(PtxError):
        load(".visible .entry broken(.param .u64 a) { ld.param.u64 %rd1, [a] }")
