"""Pickles assembled by opcode: tensors, and every way to run code on unpickling.

Each payload would create a file called ``ran`` in the working directory, or call a function that scanners look for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

COMMAND = "touch ran"
SOURCE = "open('ran', 'w').close()"


def name(dotted: str) -> bytes:
    """GLOBAL."""
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def several(*items: bytes) -> bytes:
    """A tuple of any length."""
    return b"(" + b"".join(items) + b"t"


def call(dotted: str, *arguments: bytes) -> bytes:
    """REDUCE."""
    return name(dotted) + several(*arguments) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(body: bytes, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."


def numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers."""
    return several(*map(number, values))


def storage(key: str, numel: int, cls: str = "torch.FloatStorage", location: str = "cpu") -> bytes:
    """A persistent id."""
    return several(text("storage"), name(cls), text(key), text(location), number(numel)) + b"Q"


def tensor(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    of: bytes,
    *,
    offset: int = 0,
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
    more: bytes = b"",
) -> bytes:
    """``_rebuild_tensor_v2``."""
    parts = (of, number(offset), numbers(shape), numbers(stride), b"\x89", hooks, *([more] if more else []))
    return call("torch._utils._rebuild_tensor_v2", *parts)


def good() -> dict[str, bytes]:
    """The tensors of a good checkpoint."""
    return {"weight": tensor((2, 3), (3, 1), storage("0", 6)), "bias": tensor((2,), (1,), storage("1", 2))}


def module(modules: bytes = b"}", parameters: bytes = b"}", buffers: bytes = b"}", *, state: bytes = b"") -> bytes:
    """An ``nn.Module``, memorized under the next free number before its state is set."""
    tables = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    return name("net.Net") + b")\x81\x94" + (state or mapping(tables)) + b"b"


CALLS: dict[str, tuple[bytes, ...]] = {
    "os.system": (text(COMMAND),),
    "posix.system": (text(COMMAND),),
    "nt.system": (text(COMMAND),),
    "os.popen": (text(COMMAND),),
    "os.execvp": (text("touch"), several(text("touch"), text("ran"))),
    "os.posix_spawnp": (text("touch"), several(text("touch"), text("ran")), b"}"),
    "os.remove": (text("ckpts/step-1.safetensors"),),
    "os.kill": (number(0), number(15)),
    "builtins.exec": (text(SOURCE),),
    "builtins.eval": (text(SOURCE),),
    "__builtin__.eval": (text(SOURCE),),
    "__builtin__.execfile": (text("payload.py"),),
    "builtins.compile": (text(SOURCE), text("x"), text("exec")),
    "builtins.open": (text("ran"), text("w")),
    "builtins.__import__": (text("antigravity"),),
    "builtins.getattr": (name("os.system"), text("__call__")),
    "builtins.input": (),
    "builtins.breakpoint": (),
    "builtins.bytearray": (number(2**33),),
    "builtins.range": (number(2**60),),
    "subprocess.Popen": (text(COMMAND),),
    "subprocess.check_output": (several(text("touch"), text("ran")),),
    "subprocess.getoutput": (text(COMMAND),),
    "runpy.run_path": (text("payload.py"),),
    "runpy._run_code": (text(SOURCE), b"}"),
    "pty.spawn": (text(COMMAND),),
    "importlib.import_module": (text("antigravity"),),
    "pickle.loads": (b"C\x0ccos\nsystem\n0",),
    "_pickle.loads": (b"C\x0ccos\nsystem\n0",),
    "marshal.loads": (b"C\x02\xe3\0",),
    "types.FunctionType": (b"N", b"}"),
    "types.CodeType": (number(0),),
    "operator.attrgetter": (text("system"),),
    "operator.methodcaller": (text("system"), text(COMMAND)),
    "functools.partial": (name("os.system"), text(COMMAND)),
    "functools.reduce": (name("os.system"), several(text(COMMAND))),
    "shutil.rmtree": (text("ckpts"),),
    "socket.create_connection": (several(text("127.0.0.1"), number(9)),),
    "urllib.request.urlretrieve": (text("file:///etc/passwd"), text("ran")),
    "webbrowser.open": (text("file:///dev/null"),),
    "ctypes.CDLL": (text("libc.so.6"),),
    "code.InteractiveInterpreter": (),
    "timeit.timeit": (text(SOURCE),),
    "cProfile.run": (text(SOURCE),),
    "pdb.run": (text(SOURCE),),
    "doctest.debug_script": (text(SOURCE),),
    "trace.Trace": (),
    "logging.config.listen": (number(0),),
    "multiprocessing.util.spawnv_passfds": (b"C\x05touch", several(), several()),
    "asyncio.unix_events._UnixSubprocessTransport._start": (),
    "ensurepip._run_pip": (several(text("--version")),),
    "site.main": (),
    "pip.main": (several(text("--version")),),
    "idlelib.run.Executive": (),
    "lib2to3.pgen2.grammar.Grammar.loads": (b"C\x01.",),
    "numpy.load": (text("x.npy"),),
    "numpy.testing._private.utils.runstring": (text(SOURCE), b"}"),
    "torch.load": (text("payload.pt"),),
    "torch.hub.load": (text("x/y"), text("z")),
    "torch.jit.load": (text("payload.pt"),),
    "torch.serialization.load": (text("payload.pt"),),
    "torch.utils.collect_env.run": (text(COMMAND),),
    "torch._inductor.codecache.compile_file": (text("payload.py"),),
    "torch.fx.graph_module.reduce_graph_module": (b"}", b"}"),
    "torch.storage._load_from_bytes": (b"C\x0ccos\nsystem\n0",),
    "torch.Tensor": (number(2**40),),
    "torch.UntypedStorage": (number(2**40),),
    "torch._utils._rebuild_sparse_tensor": (number(0), several()),
    "torch._utils._rebuild_qtensor": (number(0), several()),
    "torch._utils._rebuild_meta_tensor_no_storage": (number(0), several()),
    "torch._utils._rebuild_wrapper_subclass": (number(0), several()),
    "torch._utils._rebuild_device_tensor_from_numpy": (number(0), several()),
    "dill._dill._eval_repr": (text(SOURCE),),
    "cloudpickle.cloudpickle._make_function": (text(SOURCE),),
    "joblib.load": (text("payload.pkl"),),
    "transformers.dynamic_module_utils.get_class_in_module": (text("x"), text("payload.py")),
}
INNER = b"cos\nsystem\n(S'touch ran'\ntR."
_SYSTEM = name("os.system")
_WORD = text(COMMAND)
SHAPES: dict[str, bytes] = {
    "reduce": _SYSTEM + _WORD + b"\x85R",
    "stack-global": b"\x8c\x02os\x8c\x06system\x93" + _WORD + b"\x85R",
    "object": b"(" + _SYSTEM + _WORD + b"o",
    "instance": b"(" + _WORD + b"ios\nsystem\n",
    "new-object": _SYSTEM + _WORD + b"\x85\x81",
    "new-object-with-keywords": _SYSTEM + _WORD + b"\x85}\x92",
    "set-state": name("collections.abc.Callable") + b")\x81}" + text("__setstate__") + _SYSTEM + b"sb" + b"N0",
    "state-of-a-class": name("argparse.Namespace") + b")\x81" + mapping({"__reduce__": _SYSTEM, "x": _WORD}) + b"b",
    "state-with-slots": name("argparse.Namespace") + b")\x81N" + mapping({"__class__": _SYSTEM}) + b"\x86b",
    "extension-1": b"\x82\x01" + _WORD + b"\x85R",
    "extension-2": b"\x83\x01\x00" + _WORD + b"\x85R",
    "extension-4": b"\x84\x01\x00\x00\x00" + _WORD + b"\x85R",
    "from-the-memo": _SYSTEM + b"q\x000h\x00" + _WORD + b"\x85R",
    "called-on-a-result": name("builtins.getattr") + name("os.path") + text("os") + b"\x86R" + _WORD + b"\x85R",
    "in-a-list": b"](" + _SYSTEM + _WORD + b"\x85Re",
    "in-a-set": b"\x8f(" + _SYSTEM + _WORD + b"\x85R\x90",
    "in-a-frozen-set": b"(" + _SYSTEM + _WORD + b"\x85R\x91",
    "default-factory": name("collections.defaultdict") + _SYSTEM + b"\x85R",
    "state-of-an-ordered-dict": b"ccollections\nOrderedDict\n)R" + mapping({"_metadata": _SYSTEM}) + b"b",
    "encoded": call("_codecs.encode", text("cos\nsystem\n"), text("latin1")),
    "bytes-with-a-pickle": b"C%c" % len(INNER) + INNER,
    "whole-model": name("__main__.Model") + b")\x81" + mapping({"forward": _SYSTEM + _WORD + b"\x85R"}) + b"b",
    "getter": name("builtins.__dict__.__getitem__") + text("exec") + b"\x85R" + text(SOURCE) + b"\x85R",
    "function-in-extras": name("torch._utils._rebuild_parameter_with_state") + several(b"N", b"\x89", b"}", _SYSTEM)
    + b"R",
}  # fmt: skip
# tensors with code in one field of their description
TENSORS: dict[str, bytes] = {
    "hooks": tensor((2, 3), (3, 1), storage("0", 6), hooks=SHAPES["reduce"]),
    "storage": tensor((2, 3), (3, 1), SHAPES["reduce"]),
    "persistent-id": tensor((2, 3), (3, 1), SHAPES["reduce"] + b"Q"),
    "storage-class": tensor((2, 3), (3, 1), storage("0", 6, cls="os.system")),
    "type-of-a-subclass": call(
        "torch._tensor._rebuild_from_type_v2", _SYSTEM, name("torch.Tensor"), several(_WORD), b"}"
    ),
    "class-of-a-subclass": call(
        "torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_tensor_v2"), _SYSTEM, several(_WORD), b"}"
    ),
    "parameter": call("torch._utils._rebuild_parameter", SHAPES["reduce"], b"\x88", b"}"),
}
