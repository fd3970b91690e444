"""Hostile values, and the watch over a case that gets them."""

import contextlib
import dataclasses
import faulthandler
import functools
import os
import pickle
import resource
import sys
import time
import traceback
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes

import lionax

PACKAGE = os.path.dirname(lionax.__file__)
CANARY = "lionax_was_here"  # stands in each string and pickle that would run as code
SECONDS, MEBIBYTES = 120, 512  # what a case may take; the first of a kind compiles
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
          "socket.connect", "pickle.find_class")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
          "os.chmod", "os.utime", "shutil.")
_watches = []  # those that are on


def _heard(event, arguments):
    """The audit hook, which Python never removes."""
    if not _watches:
        return
    watch = _watches[-1]
    if event == "open":
        name, _, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not watch.owns(name):
            watch.heard.append((event, name))
    elif event.startswith(STARTS) or (event.startswith(WRITES) and not watch.owns(
            _whole(*arguments))):
        watch.heard.append((event, *map(repr, arguments)))
    elif event == "compile" and CANARY in str(arguments[0]):
        watch.heard.append((event, repr(arguments[0])))


def _whole(name, *others):
    """The path of a file that `shutil.rmtree` names by its folder's descriptor."""
    folder = others[-1] if others and isinstance(others[-1], int) else -1
    descriptor = f"/proc/self/fd/{folder}"
    is_relative = isinstance(name, str) and not os.path.isabs(name) and os.path.islink(descriptor)
    return os.path.join(os.readlink(descriptor), name) if is_relative else name


sys.addaudithook(_heard)


class Watch:
    """The cases of one test."""

    def __init__(self, folder=None):
        self.folder = folder and os.path.realpath(folder)  # the only one in which files may change
        self.heard, self.refused, self.accepted, self.longest, self.largest = [], 0, 0, 0.0, 0

    def owns(self, name):
        """Whether a file may change."""
        if not isinstance(name, str | bytes | os.PathLike):
            return True  # a descriptor of a file that was opened before
        path = os.path.realpath(os.fsdecode(name))
        is_inside = self.folder and (path + os.sep).startswith(self.folder + os.sep)
        return path == os.devnull or bool(is_inside)

    def run(self, call, *arguments):
        """What a call returns, or None if lionax refuses it; a hang ends the process."""
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        _watches.append(self)
        try:
            result = call(*arguments)
            self.accepted += 1
            return result
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refused += 1
            return None
        finally:
            _watches.pop()
            faulthandler.cancel_dump_traceback_later()
            self.longest = max(self.longest, time.perf_counter() - start)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024
            self.largest = max(self.largest, grown)
            assert not self.heard, self.heard
            assert grown < MEBIBYTES, f"{grown} MiB"


def is_refusal(error):
    """Whether lionax raised an error itself, of a documented kind, with more than a word."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_own = frame.filename.startswith(PACKAGE) and (frame.line or "").startswith("raise ")
    is_documented = isinstance(error, TypeError | ValueError | KeyError) or type(
        error).__module__.startswith("lionax.")
    text = str(error)
    return is_own and is_documented and len(text) > 20 and not text.startswith("Exceeds the limit")


@contextlib.contextmanager
def watched(figure, folder=None):
    """A watch whose figures are told at the end."""
    watch = Watch(folder)
    with warnings.catch_warnings():
        for category in (RuntimeWarning, FutureWarning, np.exceptions.ComplexWarning):
            warnings.simplefilter("ignore", category)  # NumPy's, and those of `re`
        yield watch
    figure("cases", watch.accepted + watch.refused)
    figure("refused", watch.refused)
    figure("accepted", watch.accepted)
    figure("largest seconds of a case", watch.longest)
    figure("largest MiB of a case", watch.largest)
    assert watch.accepted
    assert watch.refused


def each(short, long, *strategies):
    """Calls a function with drawn arguments, so many times."""
    settings = hypothesis.settings(
        max_examples=probes.sized(short, long), database=None, derandomize=True, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck))

    def decorate(function):
        settings(hypothesis.given(*strategies)(function))()

    return decorate


class Pickled:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


class Silent:
    """What has no repr."""

    def __repr__(self):
        raise RuntimeError("no repr")


NUMBERS = [-5, 0, 1, 3, 2**31 - 1, 2**31, 2**63, 2**70, -2**31, -2**70, 10**400, 10**5000, 1.5,
           -0.0, 0.5, 1e-320, 1e38, float("nan"), float("inf"), -float("inf"), True, False, 1j,
           None]
STRINGS = ["", "x", "w", "int8", "float32", "(1,2)f4", "O", "(a+)+$", "(", "a" * 5000, "../../x",
           "__class__", "os.system", f"__import__('os').system('touch {CANARY}')"]
ARRAYS = [
    np.float32(0.5), np.float64(1e300), np.int64(2**40), np.int8(-1), np.bool_(True), np.array("a"),
    np.datetime64("2020-01-01"), np.array(None, object), np.array([Pickled()], object),
    np.zeros(2, [("a", "f4")]), np.ma.masked_array([1.0, 2.0], [0, 1]), np.array(2.5),
    np.full((2, 3), 2**40), np.full((2, 3), np.nan, np.float32), np.zeros((0,), np.float32),
    np.zeros((2, 3, 1), np.float32), np.zeros(3, jax.dtypes.float0)
]
OBJECTS = [b"x", (), [], {}, object(), lambda *arguments: 0.5, pickle.dumps(Pickled()), Pickled(),
           Silent(), range(3), optax.EmptyState(), optax.MaskedNode(), [[1, 2], [3]],
           jax.ShapeDtypeStruct((10**9, 10**9), np.float32), type, lionax.lion, optax.scale(0.1)]


@functools.cache
def device_values():
    """What needs a device to be made."""
    return [jnp.zeros(2), jnp.zeros((), jnp.int32), jnp.full((2, 3), jnp.nan), jnp.ones(3, bool),
            jnp.full((2, 3), -1, jnp.int32), jnp.zeros(3, jnp.bfloat16), jax.random.key(0),
            jnp.zeros((), jnp.complex64), jnp.float32(0.5)]


def places(tree, most=400):
    """The paths of the nodes of a tree of dicts, lists, tuples and dataclasses."""
    todo, found = [(tree, ())], []
    while todo and len(found) < most:
        node, path = todo.pop()
        found.append(path)
        if len(path) < 30:
            todo += [(child, (*path, key)) for key, child in list(_children(node))[:20]]
    return found


def _children(node):
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, list | tuple):
        return enumerate(node)
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    return [(field.name, getattr(node, field.name)) for field in fields]


def put(tree, path, change):
    """A tree with one node changed."""
    if not path:
        return change(tree)
    children = {key: put(child, path[1:], change) if key == path[0] else child
                for key, child in _children(tree)}
    if isinstance(tree, dict):
        return children
    if isinstance(tree, list | tuple):
        make = tree._make if hasattr(tree, "_make") else type(tree)
        return make(children.values())
    new = object.__new__(type(tree))
    new.__dict__.update(children)
    return new
