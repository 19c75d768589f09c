"""The pickles of torch.save, read as data: nothing in them is called, and nothing in them costs much.

Python's own unpickler hashes and compares whatever a file gives as a key. A tuple nested a million times overflows the
stack there, and one that holds itself twice, forty times over, is never done. Here a pickle's operations are walked one
by one, values are tuples, lists and dicts of plain numbers and strings, and only strings and integers become keys.
"""

import io
import mmap
import pickletools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# The names torch.save gives to the types of storages -> what each holds, little-endian.
STORAGES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
DAMAGED = "it is truncated, damaged, or not written by torch.save; download it again"
SAVE_AGAIN = "in PyTorch, write it again with torch.save(model.state_dict(), path)"
# ResNet-152's state_dict takes 30 thousand; so many cost at most seconds and some hundred megabytes.
_MOST_OPERATIONS = 2_000_000
# Longer names are cut where an error shows them.
_SHOWN = 80
# Longer names are refused: a file could have the same one compared again and again.
_LONGEST = 1000

# Operations that push what pickletools decodes.
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Refused(Exception):
    """Why a file is refused, and the remedy, on one line; without the file's name."""


class Storage(NamedTuple):
    """A flat piece of memory in a file; kind: a key of `STORAGES`; size: elements."""

    kind: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements. Only the storage is checked."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


class _Global(NamedTuple):
    """A reference to a class or function of the allowlist, which is never looked up."""

    name: str


def read_pickle(file: io.BytesIO | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle and leaves the file behind it; takes time and memory in proportion to its length.

    Returns:
      Its value, of plain Python values and `Tensor`; what may be nested too deeply to hash, to compare with its like or
      to print. And the storages that it names, by key.

    Raises:
      Refused: it holds anything but tensors and plain values.
      Exception: it is damaged; almost any.
    """
    reader = _Reader()
    for operation, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # an mmap is read as a file is
        reader.count(1)
        reader.step(operation.name, argument)
    return reader.stack.pop(), reader.storages


class _Reader:
    """The stack and the memory of a pickle; `step` carries out one operation."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.operations = 0

    def count(self, operations: int) -> None:
        self.operations += operations
        if self.operations > _MOST_OPERATIONS:
            raise Refused(f"its pickle is longer than any state_dict's; {SAVE_AGAIN}")

    def step(self, name: str, argument: Any) -> None:
        """Carries out an operation; pickletools describes each."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            number = int(name[-1])
            stack[-number:] = [_exactly(number, stack[-number:])]
        elif name in ("TUPLE", "SETITEMS", "APPENDS", "POP_MARK"):
            self.stack = self.marked.pop()
            self._finish(name, stack)
        elif name in ("SETITEM", "APPEND"):
            number = 2 if name == "SETITEM" else 1
            items = _exactly(number, stack[-number:])
            del stack[-number:]
            self._finish(name + "S", items)
        elif name == "GLOBAL":
            stack.append(_look_up(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_look_up(f"{_string(module)} {_string(attribute)}"))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes, as a state_dict's _metadata: nothing here needs any
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"it holds more than a state_dict (pickle operation {name}); {SAVE_AGAIN}")

    def _finish(self, name: str, items: Any) -> None:
        """Puts the items above a mark into what is below it."""
        if name == "TUPLE":
            self.stack.append(tuple(items))
        elif name == "SETITEMS":
            _fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))
        elif name == "APPENDS":
            list.extend(self.stack[-1], items)

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a function of the allowlist would return."""
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise Refused(DAMAGED)
        if function.name == _DICT:
            pairs = arguments[0] if arguments else []
            # The same list may be named again and again.
            self.count(len(pairs))
            return _fill({}, (_exactly(2, pair) for pair in pairs))
        if function.name == _TENSOR and isinstance(arguments[0], Storage):
            # Behind the view, two that loading needs not, and what the tensor is beside its numbers: a sign, say.
            if any(meaning is not None and meaning != {} for meaning in arguments[6:]):
                raise Refused("it holds a tensor that is negated or conjugated when read; save its clone() instead")
            return Tensor(*_exactly(4, arguments[:4]))
        if function.name == _PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise Refused(DAMAGED)

    def _storage(self, pid: Any) -> Storage:
        """Answers a reference to a storage: ("storage", type, key, device, number of elements[, None])."""
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise Refused(DAMAGED)
        tag, kind, key, _, size = pid[:5]
        if tag != "storage" or not isinstance(kind, _Global) or kind.name not in STORAGES or type(size) is not int:
            raise Refused(DAMAGED)
        if not 0 <= size < 2**63:
            raise Refused(DAMAGED)
        if pid[5:] not in ((), (None,)):
            raise Refused(f"it holds views of storages, as PyTorch before 0.4 wrote them; {SAVE_AGAIN}")
        storage = Storage(kind.name, _string(key), size)
        if self.storages.setdefault(key, storage) != storage:
            raise Refused(f"it gives storage {shown(key)} two types or sizes; {DAMAGED}")
        return storage


def _look_up(name: str) -> _Global:
    """Answers the names of the allowlist, each a module and an attribute with a blank between them."""
    if name not in STORAGES and name not in (_DICT, _TENSOR, _PARAMETER):
        asked = repr(name.replace(" ", ".", 1)[:_SHOWN])
        raise Refused(f"it asks for {asked}, which is not part of a state_dict; {SAVE_AGAIN}")
    return _Global(name)


def _fill(target: Any, pairs: Any) -> dict:
    """Sets a dict's items, by keys of which a file cannot make many collide."""
    if type(target) is not dict:
        raise Refused(DAMAGED)
    for key, value in pairs:
        # Of larger integers all could have the same hash, and a dict of them would take forever.
        if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
            raise Refused(f"it holds a dict with a key of type {type(key).__name__}; {SAVE_AGAIN}")
        if type(key) is str and len(key) > _LONGEST:
            raise Refused(f"its name {shown(key)} has {len(key)} characters; {SAVE_AGAIN}")
        target[key] = value
    return target


def _exactly(number: int, items: Any) -> tuple:
    if len(items) != number:
        raise Refused(DAMAGED)
    return tuple(items)


def _string(value: Any) -> str:
    if type(value) is not str or len(value) > _LONGEST:
        raise Refused(DAMAGED)
    return value


def shown(name: Any) -> str:
    """Quotes a name of a file on one short line."""
    return repr(name[:_SHOWN]) if isinstance(name, str) else f"of type {type(name).__name__}"
