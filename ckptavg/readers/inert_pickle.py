"""A pickle interpreter that never imports, calls or hashes anything a pickle names.

It knows containers, numbers and strings. A global is only its name; calling one yields what the caller's ``makers``
make of that name, or else an `Inert` stand-in that forgets its arguments. Time and memory are bounded by a budget.

Protocols 2 to 5 are read, as ``torch.save`` and ``pickle.dump`` write them; the text opcodes of protocol 0 are not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, runtime_checkable

from ckptavg.readers import Refused

MAX_INTEGER: Final = 255  # bytes
MAX_NAME: Final = 1000  # characters of a global's module or name
BUDGET: Final = 640 << 20  # what a pickle may cost, in bytes as estimated below

# Upper estimates of the memory CPython needs. Each opcode is charged, which bounds the time as well: 20 million of them.
_OPCODE: Final = 32
_TUPLE: Final = 64
_LIST: Final = 96
_DICT: Final = 240
_ITEM: Final = 96
_STRING: Final = 72
_OBJECT: Final = 160

# int keys of more than 60 bits share hashes by the million, tuples may be too deep to hash, the rest are no keys at all
_LARGEST_KEY: Final = 2**60

Maker: TypeAlias = Callable[[tuple[object, ...]], object]


class PickleError(ValueError):
    """What is wrong with a pickle, as the end of a sentence that starts with its name."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or function, dotted and never looked up."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Inert:
    """What stands where a pickle has an object of a class that is not known; it remembers only the name.

    Attributes:
        name: of the class, or of the function that would have made the object.
        called: whether it would have been made by calling ``name`` rather than as an instance of a class.
    """

    name: str
    called: bool


@runtime_checkable
class Stateful(Protocol):
    """What a maker may make when the pickle then sets its state."""

    def set_state(self, state: object) -> None:
        """Take what the BUILD opcode brings."""
        ...


def load(data: bytes, makers: Mapping[str, Maker], persistent: Callable[[object], object]) -> object:
    """What the pickle ``data`` describes, made of dict, list, tuple, numbers, strings, bytes and stand-ins.

    Sets are lists in the order of the file. A dict's keys are str, int, float, bool, None, bytes, or `Inert` for any
    other key.

    Args:
        data: the pickle.
        makers: dotted name of a global → what is made when it is called; may refuse by raising PickleError.
        persistent: what a persistent id stands for; may raise PickleError as well.
    Raises:
        PickleError: if it is damaged or exceeds a limit.
    """
    machine = _Machine(data, makers, persistent)
    try:
        return machine.run()
    except IndexError as error:  # from the stack's pop: every read of the data is checked
        raise PickleError(f"is damaged: byte {machine.position} takes more from the stack than is on it") from error
    except UnicodeDecodeError as error:
        raise PickleError(f"is damaged: the text before byte {machine.position} is not UTF-8") from error


class _Machine:
    def __init__(self, data: bytes, makers: Mapping[str, Maker], persistent: Callable[[object], object]) -> None:
        self.data = data
        self.position = 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: list[object] = []
        self.budget = BUDGET
        self.makers = makers
        self.persistent = persistent

    def run(self) -> object:
        if self.data[:1] != b"\x80" or self.data[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
            raise PickleError("is damaged: it does not start like a pickle of protocol 2 to 5")
        data, end, opcodes = self.data, len(self.data), _OPCODES
        while True:
            at = self.position
            if at >= end:
                raise PickleError("is damaged: it is cut off")
            self.position = at + 1
            code = data[at]
            opcode = opcodes.get(code)
            if opcode is None:
                break
            opcode(self)
            self.budget -= _OPCODE
            if self.budget < 0:
                raise PickleError("takes more memory than any checkpoint's should")
        if code != ord("."):
            raise PickleError(f"is damaged: byte {at} is {code:#04x}, no opcode of protocol 2 to 5")
        value = self.stack.pop()
        if self.stack or self.marks or self.position < end:
            raise PickleError(f"is damaged: it ends at byte {at}, but is not complete there")
        return value

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        start = self.position
        self.position = start + size
        if self.position > len(self.data):
            raise PickleError("is damaged: it is cut off")
        return self.data[start : self.position]

    def number(self, size: int) -> int:
        """The next ``size`` bytes as an unsigned number."""
        return int.from_bytes(self.take(size), "little")

    def spend(self, cost: int) -> None:
        """Charge ``cost`` before it is spent."""
        self.budget -= cost
        if self.budget < 0:
            raise PickleError("takes more memory than any checkpoint's should")

    def text(self, size: int) -> None:
        self.spend(_STRING + 4 * size)
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))

    def raw(self, size: int) -> None:
        self.spend(_STRING + size)
        self.stack.append(self.take(size))

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME + 1)
        if end < 0:
            raise PickleError(f"is damaged: the name at byte {self.position} does not end")
        line = self.take(end - self.position)
        self.position += 1
        return line.decode("utf-8")

    def remember(self, index: int) -> None:
        value = self.stack[-1]
        if index == len(self.memo):
            self.memo.append(value)
        elif index < len(self.memo):
            self.memo[index] = value
        else:
            raise PickleError(f"is damaged: memo {index} follows {len(self.memo) - 1}")

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            raise PickleError(f"is damaged: memo {index} is missing")
        self.stack.append(self.memo[index])

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []
        self.spend(_LIST)

    def since_mark(self) -> list[object]:
        """Everything since the last mark, which goes."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert | Refused):
            raise PickleError(f"is damaged: it appends to a {type(target).__name__}")

    def store(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise PickleError("is damaged: a key without a value")
        self.spend(_ITEM * len(items) // 2)
        if isinstance(target, Inert | Refused):
            return
        if type(target) is not dict:
            raise PickleError(f"is damaged: it sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def make(self, function: object, arguments: object, *, called: bool) -> None:
        """Push what stands for ``function(*arguments)``."""
        if type(arguments) is not tuple or not isinstance(function, Global | Inert):
            raise PickleError("is damaged: it calls what cannot be called")
        self.spend(_OBJECT)
        maker = self.makers.get(function.name) if isinstance(function, Global) else None
        self.stack.append(maker(arguments) if maker else _stand_in(function.name, called))

    def pop_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.spend(_TUPLE)
        self.stack.append(items)

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > 2 * MAX_NAME:
            raise PickleError("is damaged: a global's name is not a name")
        self.spend(_OBJECT + 4 * (len(module) + len(name)))
        self.stack.append(Global(f"{module}.{name}"))

    def push(self, value: object, cost: int) -> None:
        self.spend(cost)
        self.stack.append(value)


def _key(key: object) -> object:
    if type(key) is int and abs(key) < _LARGEST_KEY:
        return key
    if key is None or type(key) in (str, float, bool, bytes):
        return key
    return Inert(type(key).__name__, called=False)


def _stand_in(name: str, called: bool) -> Inert | Refused:
    # what may be a tensor must not vanish from a state dict as other objects do
    last = name.rpartition(".")[2]
    if last.startswith("_rebuild") or last.endswith(("Tensor", "Parameter", "Storage")):
        return Refused(f"is made by {name}; only plain dense tensors are read")
    return Inert(name, called)


def _proto(m: _Machine) -> None:
    if m.number(1) > 5:
        raise PickleError("is damaged: it is of a protocol above 5")


def _frame(m: _Machine) -> None:
    if m.number(8) > len(m.data) - m.position:
        raise PickleError("is damaged: it is cut off")


def _integer(m: _Machine, size: int) -> None:
    if size > MAX_INTEGER:
        raise PickleError(f"has an integer of {size} bytes, more than {MAX_INTEGER}")
    m.spend(size)
    m.stack.append(int.from_bytes(m.take(size), "little", signed=True))


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.store([key, value])


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    m.extend([item])


def _dict(m: _Machine) -> None:
    items = m.since_mark()
    m.push({}, _DICT)
    m.store(items)


def _reduce(m: _Machine) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    m.make(function, arguments, called=True)


def _new_object(m: _Machine) -> None:
    arguments, cls = m.stack.pop(), m.stack.pop()
    m.make(cls, arguments, called=False)


def _new_object_with_keywords(m: _Machine) -> None:
    m.stack.pop()
    arguments, cls = m.stack.pop(), m.stack.pop()
    m.make(cls, arguments, called=False)


def _object(m: _Machine) -> None:
    cls, *arguments = m.since_mark() or [None]
    m.make(cls, tuple(arguments), called=False)


def _instance(m: _Machine) -> None:
    arguments = tuple(m.since_mark())
    m.name(m.line(), m.line())
    m.make(m.stack.pop(), arguments, called=False)


def _build(m: _Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if isinstance(target, Stateful):
        target.set_state(state)
    elif not isinstance(target, dict | Inert | Refused):  # a dict's is OrderedDict's, such as _metadata
        raise PickleError(f"is damaged: it sets the state of a {type(target).__name__}")


def _extension(m: _Machine, size: int) -> None:
    m.push(Global(f"extension {m.number(size)}"), _OBJECT)


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.name(module, name)


_OPCODES: Final[Mapping[int, Callable[[_Machine], object]]] = {
    # structure
    0x80: _proto,
    0x95: _frame,
    ord("("): _Machine.mark,
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _Machine.since_mark,
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    # the memo
    ord("q"): lambda m: m.remember(m.number(1)),
    ord("r"): lambda m: m.remember(m.number(4)),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number(1)),
    ord("j"): lambda m: m.recall(m.number(4)),
    # constants, numbers, text and bytes
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.number(1)),
    ord("M"): lambda m: m.stack.append(m.number(2)),
    ord("J"): lambda m: _integer(m, 4),
    0x8A: lambda m: _integer(m, m.number(1)),
    0x8B: lambda m: _integer(m, m.number(4)),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.text(m.number(4)),
    0x8C: lambda m: m.text(m.number(1)),
    0x8D: lambda m: m.text(m.number(8)),
    ord("B"): lambda m: m.raw(m.number(4)),
    ord("C"): lambda m: m.raw(m.number(1)),
    0x8E: lambda m: m.raw(m.number(8)),
    0x96: lambda m: m.raw(m.number(8)),
    # containers
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.pop_tuple(1),
    0x86: lambda m: m.pop_tuple(2),
    0x87: lambda m: m.pop_tuple(3),
    ord("t"): lambda m: m.push(tuple(m.since_mark()), _TUPLE),
    ord("]"): lambda m: m.push([], _LIST),
    ord("l"): lambda m: m.push(m.since_mark(), _LIST),
    ord("a"): _append,
    ord("e"): lambda m: m.extend(m.since_mark()),
    ord("}"): lambda m: m.push({}, _DICT),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda m: m.store(m.since_mark()),
    0x8F: lambda m: m.push([], _LIST),
    0x90: lambda m: m.extend(m.since_mark()),
    0x91: lambda m: m.push(m.since_mark(), _LIST),
    # names and objects
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _stack_global,
    0x82: lambda m: _extension(m, 1),
    0x83: lambda m: _extension(m, 2),
    0x84: lambda m: _extension(m, 4),
    ord("R"): _reduce,
    0x81: _new_object,
    0x92: _new_object_with_keywords,
    ord("o"): _object,
    ord("i"): _instance,
    ord("b"): _build,
    ord("Q"): lambda m: m.push(m.persistent(m.stack.pop()), _OBJECT),
}  # fmt: skip
