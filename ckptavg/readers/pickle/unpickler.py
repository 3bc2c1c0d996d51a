"""A pickle interpreter that never imports, calls or hashes anything a pickle names.

It builds containers, numbers and strings. A global is only a name; calling one gives the result of the caller's maker
of that name or, without a maker, an `Inert` stand-in that drops the arguments. A budget bounds time and memory.

Protocols 2 to 5 of ``torch.save`` and ``pickle.dump`` are supported; the text opcodes of protocol 0 are not.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol, TypeAlias, runtime_checkable

from ckptavg.readers import Refused

MAX_INTEGER: Final = 255  # bytes
MAX_NAME: Final = 1000  # bytes of a global's module or name
BUDGET: Final = 640 << 20  # cost limit of a pickle; text and bytes, bounded by the size of the pickle, do not count

# Costs of opcodes: upper estimates of the memory of the objects made in CPython, with a minimum that bounds time as
# well: at most 10 million opcodes.
_STEP: Final = 64
_NUMBER: Final = 80
_TUPLE: Final = 96
_STRING: Final = 104
_LIST: Final = 128
_OBJECT: Final = 256
_DICT: Final = 272
_GLOBAL: Final = 512

_LARGEST_KEY: Final = 2**60  # larger integers can share hashes by the million, which makes dict insertion quadratic

Maker: TypeAlias = Callable[[tuple[object, ...]], object]


class PickleError(ValueError):
    """A damaged or unsupported pickle; the message continues a sentence that starts with the name of the pickle."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """Dotted name of a class or function; never looked up."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """Stand-in for an object of an unknown class, or for the result of a function; it keeps the name and the state."""

    name: str
    called: bool  # whether unpickling would call ``name`` rather than make an instance of it
    attributes: dict[object, object] | None = None  # its state, if that is a dict

    def set_state(self, state: object) -> None:
        """Set the attributes from BUILD's argument, a dict or (dict, slots); a state of another type is dropped."""
        state = state[0] if type(state) is tuple and len(state) == 2 else state
        self.attributes = state if type(state) is dict else None


@runtime_checkable
class Stateful(Protocol):
    """An object made by a maker whose state the pickle may set."""

    def set_state(self, state: object) -> None:
        """Set the state from the argument of the BUILD opcode."""
        ...


def load(data: bytes, makers: Mapping[str, Maker], persistent: Callable[[object], object], budget: int = 0) -> object:
    """Return the object in the pickle ``data``, made of dict, list, tuple, numbers, strings, bytes and stand-ins.

    Sets become lists in the order of the file. A dict's keys are str, int, float, bool, None, bytes, `Stateful`, or
    `Inert` for any other key.

    Args:
        makers: dotted name of a global → function of its call's arguments; may raise PickleError.
        persistent: persistent id → object; may raise PickleError.
        budget: the cost limit; 0 is `BUDGET`.
    Raises:
        PickleError: if it is damaged or exceeds a limit.
    """
    machine = _Machine(data, makers, persistent)
    try:
        return machine.run(budget or BUDGET)
    except IndexError as error:  # only the stack and the marks raise it: every read of the data is checked
        raise PickleError(f"is damaged: byte {machine.position} pops from an empty stack") from error
    except UnicodeDecodeError as error:
        raise PickleError(f"is damaged: the text before byte {machine.position} is not UTF-8") from error


class _Machine:
    """State of the interpreter: the stack since the last mark, the stacks below the marks, and the memo."""

    def __init__(self, data: bytes, makers: Mapping[str, Maker], persistent: Callable[[object], object]) -> None:
        self.data = data
        self.makers = makers
        self.persistent = persistent
        self.position, self.end = 0, len(data) - 1  # STOP is at the end
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: list[object] = []

    def run(self, budget: int) -> object:
        """Execute the pickle within ``budget`` and return its object."""
        data, end, rows = self.data, self.end, _ROWS
        if data[:1] != b"\x80" or data[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
            raise PickleError("is damaged: it does not start like a pickle of protocol 2 to 5")
        while (at := self.position) < end:
            width, cost, opcode = rows[data[at]]
            self.position = following = at + 1 + width
            if following > end:
                _cut_off()
            budget -= cost
            if budget < 0:
                raise PickleError("takes more memory than a checkpoint needs")
            opcode(self, int.from_bytes(data[at + 1 : following], "little") if width else 0)
        if data[end:] != b".":
            _cut_off()
        value = self.stack.pop()
        if self.stack or self.below:
            raise PickleError("is damaged: it ends before it is complete")
        return value

    def take(self, size: int) -> bytes:
        self.position += size
        if self.position > self.end:
            _cut_off()
        return self.data[self.position - size : self.position]

    def line(self) -> str:
        """Return the text up to the next line feed."""
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME + 1)
        if end < 0:
            raise PickleError(f"is damaged: the name at byte {self.position} does not end")
        line = self.take(end - self.position)
        self.position += 1
        return line.decode("utf-8")

    def mark(self, _: int) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        """Remove the last mark and return the items above it."""
        items = self.stack
        self.stack = self.below.pop()
        return items

    def gather(self, kind: Callable[[list[object]], object]) -> None:
        """Replace the items above the last mark by one list or tuple of them."""
        items = self.since_mark()  # first, because it replaces the stack
        self.stack.append(kind(items))

    def put(self, index: int) -> None:
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            raise PickleError(f"is damaged: memo {index} follows {len(self.memo) - 1}")

    def get(self, index: int) -> None:
        if index >= len(self.memo):
            raise PickleError(f"is damaged: memo {index} is missing")
        self.stack.append(self.memo[index])

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert | Refused):
            raise PickleError(f"is damaged: it appends to a {type(target).__name__}")

    def store(self, items: list[object]) -> None:
        """Set items of the dict on top of the stack from alternating keys and values."""
        target = self.stack[-1]
        if len(items) % 2:
            raise PickleError("is damaged: it has a key without a value")
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if type(key) is str else _key(key)] = value
        elif not isinstance(target, Inert | Refused):
            raise PickleError(f"is damaged: it sets an item of a {type(target).__name__}")

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise PickleError("is damaged: a global's name is not a name")
        self.stack.append(Global(f"{module}.{name}"))

    def make(self, function: object, arguments: object, *, called: bool) -> None:
        """Push the stand-in for ``function(*arguments)``."""
        if type(arguments) is not tuple or not isinstance(function, Global | Inert):
            raise PickleError("is damaged: it calls something that is not callable")
        maker = self.makers.get(function.name) if isinstance(function, Global) else None
        self.stack.append(maker(arguments) if maker else _stand_in(function.name, called))

    def proto(self, version: int) -> None:
        if version > 5:
            raise PickleError("is damaged: it is of a protocol above 5")

    def frame(self, size: int) -> None:
        if size > self.end + 1 - self.position:
            _cut_off()

    def long(self, size: int) -> None:
        if size > MAX_INTEGER:
            raise PickleError(f"has an integer of {size} bytes, more than {MAX_INTEGER}")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))

    def pack(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.stack.append(items)

    def new_dict(self, _: int) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.store(items)

    def new_object_with_keywords(self, _: int) -> None:
        self.stack.pop()
        self.make(self.stack.pop(-2), self.stack.pop(), called=False)

    def obj(self, _: int) -> None:
        cls, *arguments = self.since_mark() or [None]
        self.make(cls, tuple(arguments), called=False)

    def inst(self, _: int) -> None:
        arguments = tuple(self.since_mark())
        self.name(self.line(), self.line())
        self.make(self.stack.pop(), arguments, called=False)

    def build(self, _: int) -> None:
        """Set the state of the object on top of the stack; of a dict, attributes of an OrderedDict: _metadata."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state)
        elif not isinstance(target, dict | Refused):
            raise PickleError(f"is damaged: it sets the state of a {type(target).__name__}")

    def unknown(self, _: int) -> NoReturn:
        at = self.position - 1
        raise PickleError(f"is damaged: byte {at} is {self.data[at]:#04x}, which is not an opcode of protocols 2 to 5")


def _cut_off() -> NoReturn:
    raise PickleError("is damaged: it is cut off")


def _key(key: object) -> object:
    if key is None or type(key) in (str, float, bool, bytes) or (type(key) is int and abs(key) < _LARGEST_KEY):
        return key
    if isinstance(key, Stateful):  # compared by identity, so no content of the file is compared
        return key
    return Inert(key.name if isinstance(key, Inert | Global) else type(key).__name__, called=False)


def _stand_in(name: str, called: bool) -> Inert | Refused:
    # an object that may be a tensor must not be dropped from a state dict as other objects are
    last = name.rpartition(".")[2]
    if last.startswith("_rebuild") or last.endswith(("Tensor", "Parameter", "Storage")):
        return Refused(f"is made by {name}; only plain dense tensors are supported")
    return Inert(name, called)


_Action: TypeAlias = Callable[[_Machine, int], object]

# (cost, action on the operand n, an unsigned number, and its opcodes: code → bytes of the operand)
_ACTIONS: Final[Sequence[tuple[int, _Action, Mapping[bytes, int]]]] = (
    (_STEP, _Machine.proto, {b"\x80": 1}),
    (_STEP, _Machine.frame, {b"\x95": 8}),
    (_LIST, _Machine.mark, {b"(": 0}),
    (_STEP, lambda machine, _: machine.stack.pop(), {b"0": 0}),
    (_STEP, lambda machine, _: machine.since_mark(), {b"1": 0}),
    (_STEP, lambda machine, _: machine.stack.append(machine.stack[-1]), {b"2": 0}),
    (_STEP, _Machine.put, {b"q": 1, b"r": 4}),
    (_STEP, lambda machine, _: machine.memo.append(machine.stack[-1]), {b"\x94": 0}),
    (_STEP, _Machine.get, {b"h": 1, b"j": 4}),
    (_STEP, lambda machine, _: machine.stack.append(None), {b"N": 0}),
    (_STEP, lambda machine, _: machine.stack.append(True), {b"\x88": 0}),
    (_STEP, lambda machine, _: machine.stack.append(False), {b"\x89": 0}),
    (_STEP, lambda machine, n: machine.stack.append(n), {b"K": 1}),
    (_NUMBER, lambda machine, n: machine.stack.append(n), {b"M": 2}),
    (_NUMBER, lambda machine, n: machine.stack.append(n - (1 << 32) if n >> 31 else n), {b"J": 4}),
    (_NUMBER, _Machine.long, {b"\x8a": 1, b"\x8b": 4}),
    (_NUMBER, lambda machine, n: machine.stack.extend(struct.unpack(">d", n.to_bytes(8, "little"))), {b"G": 8}),
    (_STRING, _Machine.text, {b"X": 4, b"\x8c": 1, b"\x8d": 8}),
    (_STRING, lambda machine, n: machine.stack.append(machine.take(n)), {b"B": 4, b"C": 1, b"\x8e": 8, b"\x96": 8}),
    (_STEP, lambda machine, _: machine.stack.append(()), {b")": 0}),
    (_TUPLE, lambda machine, _: machine.pack(1), {b"\x85": 0}),
    (_TUPLE, lambda machine, _: machine.pack(2), {b"\x86": 0}),
    (_TUPLE, lambda machine, _: machine.pack(3), {b"\x87": 0}),
    (_TUPLE, lambda machine, _: machine.gather(tuple), {b"t": 0}),
    # sets (the codes from 0x8f on) are read as lists, so nothing is hashed
    (_LIST, lambda machine, _: machine.stack.append([]), {b"]": 0, b"\x8f": 0}),
    (_LIST, lambda machine, _: machine.gather(list), {b"l": 0, b"\x91": 0}),
    (_STEP, lambda machine, _: machine.extend([machine.stack.pop()]), {b"a": 0}),
    (_STEP, lambda machine, _: machine.extend(machine.since_mark()), {b"e": 0, b"\x90": 0}),
    (_DICT, lambda machine, _: machine.stack.append({}), {b"}": 0}),
    (_DICT, _Machine.new_dict, {b"d": 0}),
    (_STEP, lambda machine, _: machine.store([machine.stack.pop(-2), machine.stack.pop()]), {b"s": 0}),
    (_STEP, lambda machine, _: machine.store(machine.since_mark()), {b"u": 0}),
    (_GLOBAL, lambda machine, _: machine.name(machine.line(), machine.line()), {b"c": 0}),
    (_GLOBAL, lambda machine, _: machine.name(machine.stack.pop(-2), machine.stack.pop()), {b"\x93": 0}),
    (_GLOBAL, lambda machine, n: machine.stack.append(Global(f"extension {n}")), {b"\x82": 1, b"\x83": 2, b"\x84": 4}),
    (_OBJECT, lambda machine, _: machine.make(machine.stack.pop(-2), machine.stack.pop(), called=True), {b"R": 0}),
    (_OBJECT, lambda machine, _: machine.make(machine.stack.pop(-2), machine.stack.pop(), called=False), {b"\x81": 0}),
    (_OBJECT, _Machine.new_object_with_keywords, {b"\x92": 0}),
    (_OBJECT, _Machine.obj, {b"o": 0}),
    (_GLOBAL + _OBJECT, _Machine.inst, {b"i": 0}),
    (_STEP, _Machine.build, {b"b": 0}),
    (_OBJECT, lambda machine, _: machine.stack.append(machine.persistent(machine.stack.pop())), {b"Q": 0}),
)
_OPCODES: Final = {code[0]: (width, cost, do) for cost, do, codes in _ACTIONS for code, width in codes.items()}
_ROWS: Final = [_OPCODES.get(code, (0, _STEP, _Machine.unknown)) for code in range(256)]
