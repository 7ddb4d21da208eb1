"""PTX text to kernels: parameters, registers, shared and local variables, instructions with labels resolved.

Reads what nvcc and Triton (LLVM) write: one statement to a semicolon, vectors in braces, scopes of inline assembly with
registers of their own. Debug lines (.loc, .file, .section) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.ptx.simulator.faults import PtxError
from tests.ptx.simulator.formats import bits_of

Operand = str | tuple[str, ...]
"""Register, number, symbol, "[address + offset]", or the registers of a vector."""

_TYPE = r"\.(pred|[busf]\d+|f16x2|bf16x2|bf16)"
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_VARIABLE = re.compile(rf"(?:\.align\s+(\d+)\s+)?{_TYPE}\s+([\w$%]+)((?:\[\d*\])*)")


@dataclass(frozen=True)
class Parameter:
    """One kernel argument: its bytes within the block of all arguments."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Register:
    """Its row in the register file and its width (0: predicate)."""

    slot: int
    bits: int


@dataclass
class Instruction:
    """One instruction; `text` is as written, `target` the index a branch goes to."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False
    target: int | None = None

    @property
    def type(self) -> str:
        """The last suffix, which for most instructions is the type they compute in."""
        return self.modifiers[-1] if self.modifiers else ""


@dataclass
class Kernel:
    """One .entry."""

    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    threads: tuple[int, int, int] | None
    """From .reqntid; None where the launch says how many."""
    registers: dict[str, Register] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic_shared: set[str] = field(default_factory=set)
    """Shared symbols of unknown size: they begin after the static ones."""
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)

    def register(self, name: str) -> Register | None:
        """The register of this name, or None for special registers, symbols and numbers."""
        return self.registers.get(name)


def parse(ptx: str) -> dict[str, Kernel]:
    """All kernels of a module by name.

    Raises:
        PtxError: text that is not understood.
    """
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", ptx, flags=re.MULTILINE)
    module_variables = re.findall(r"^\s*(?:\.extern\s+|\.visible\s+)?\.shared\s+([^;]*);", _outside(ptx), re.MULTILINE)
    kernels = {}
    for entry in _ENTRY.finditer(ptx):
        kernel = _header(entry[1], entry[2], entry[3])
        body = ptx[entry.end() : _closing(ptx, entry.end())]
        for text in module_variables:
            if _VARIABLE.search(text + " ") and re.search(rf"{re.escape(_variable(text)[0])}\b", body):
                _declare_shared(kernel, text)
        _Body(kernel).read(body)
        kernels[kernel.name] = kernel
    return kernels


def _outside(ptx: str) -> str:
    """The text outside all braces."""
    parts, depth = [], 0
    for piece in re.split(r"([{}])", ptx):
        if piece in "{}" and piece:
            depth += 1 if piece == "{" else -1
        elif depth == 0:
            parts.append(piece)
    return "".join(parts)


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxError("a kernel's body does not end")


def _header(name: str, parameters: str, directives: str) -> Kernel:
    offset, listed = 0, []
    for text in filter(None, (part.strip() for part in parameters.split(","))):
        match = re.fullmatch(
            rf"\.param\s+(?:\.align\s+(\d+)\s+)?{_TYPE}(?:\s+\.ptr[^\n]*?\s|\s+)([\w$]+)(?:\[(\d+)\])?", text
        )
        if match is None:
            raise PtxError(f"parameter of {name}: {text}")
        element = bits_of(match[2]) // 8
        align, size = int(match[1] or element), element * int(match[4] or 1)
        offset = -(-offset // align) * align
        listed.append(Parameter(match[3], offset, size))
        offset += size
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    shape = (int(threads[1]), int(threads[2] or 1), int(threads[3] or 1)) if threads else None
    return Kernel(name, listed, offset, shape)


def _variable(text: str) -> tuple[str, int, int | None]:
    """Name, alignment and size in bytes (None: not given) of a declared variable."""
    match = _VARIABLE.search(text)
    if match is None:
        raise PtxError(f"declaration: {text}")
    element = max(bits_of(match[2]) // 8, 1)
    size: int | None = element
    for extent in re.findall(r"\[(\d*)\]", match[4]):
        size = None if extent == "" or size is None else size * int(extent)
    return match[3], int(match[1] or element), size


def _declare_shared(kernel: Kernel, text: str) -> None:
    name, align, size = _variable(text)
    if size is None:
        kernel.dynamic_shared.add(name)
        return
    start = -(-kernel.shared_bytes // align) * align
    kernel.shared[name] = start
    kernel.shared_bytes = start + size


class _Body:
    """Reads the statements of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.labels: dict[str, int] = {}
        self.slots = 0
        self.scopes: list[dict[str, str]] = [{}]
        self.ranges: dict[str, int] = {}
        self.scope_count = 0

    def read(self, body: str) -> None:
        for statement in self._statements(body):
            if statement.startswith("."):
                self._directive(statement)
            else:
                self._instruction(statement)
        for instruction in self.kernel.instructions:
            if instruction.opcode == "bra":
                label = str(instruction.operands[0])
                if label not in self.labels:
                    raise PtxError(f"no label for {instruction.text}")
                instruction.target = self.labels[label]

    def _statements(self, body: str) -> Iterator[str]:
        at = 0
        while True:
            at = re.compile(r"\s*").match(body, at).end()  # type: ignore[union-attr]
            if at == len(body):
                return
            label = re.compile(r"([\w$]+):(?!:)").match(body, at)
            if body[at] == "{":
                self.scopes.append({})
                self.scope_count += 1
                at += 1
            elif body[at] == "}":
                self.scopes.pop()
                at += 1
            elif body[at] == ";":
                at += 1
            elif label:
                self.labels[label[1]] = len(self.kernel.instructions)
                at = label.end()
            else:
                end = body.find(";", at)
                if end < 0:
                    raise PtxError(f"no semicolon after {body[at : at + 60]!r}")
                yield " ".join(body[at:end].split())
                at = end + 1

    def _directive(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == ".reg":
            ptx_type, _, names = rest.strip().removeprefix(".").partition(" ")
            for name in (part.strip() for part in names.split(",")):
                self._declare_register(name, bits_of(ptx_type))
        elif word == ".shared":
            _declare_shared(self.kernel, rest)
        elif word == ".local":
            name, align, size = _variable(rest)
            start = -(-self.kernel.local_bytes // align) * align
            self.kernel.local[name] = start
            self.kernel.local_bytes = start + (size or 0)
        else:
            raise PtxError(f"directive {text!r}")

    def _declare_register(self, name: str, bits: int) -> None:
        span = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
        if span:
            self.ranges[span[1]] = bits
            return
        own = name if len(self.scopes) == 1 else f"{name}@{self.scope_count}"
        self.scopes[-1][name] = own
        self._add(own, bits)

    def _add(self, name: str, bits: int) -> None:
        self.kernel.registers[name] = Register(self.slots, bits)
        self.slots += 1

    def _resolve(self, word: str) -> str:
        """The register that a name means here; registers of a range come to life at their first use."""
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        if word not in self.kernel.registers:
            span = re.fullmatch(r"(%[A-Za-z_$]+)\d+", word)
            if span and span[1] in self.ranges:
                self._add(word, self.ranges[span[1]])
        return word

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(self._resolve(part.strip()) for part in text[1:-1].split(","))
        return re.sub(r"[%A-Za-z_$][\w$.%]*", lambda word: self._resolve(word[0]), text)

    def _instruction(self, text: str) -> None:
        match = re.match(r"(?:@(!?)([\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if match is None:
            raise PtxError(f"statement {text!r}")
        opcode, *modifiers = match[3].split(".")
        operands = tuple(self._operand(part) for part in _split_operands(match[4]))
        predicate = self._resolve(match[2]) if match[2] else None
        self.kernel.instructions.append(
            Instruction(text, opcode, tuple(modifiers), operands, predicate, bool(match[1]))
        )


def _split_operands(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return parts
