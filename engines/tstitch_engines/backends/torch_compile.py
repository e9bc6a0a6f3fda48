"""TorchInductor for members: a program compiled for one set of sizes into a function that writes its outputs in place.

The graph goes to the compiler as ``torch.export`` traced it, without TorchDynamo. So a call checks no guards, no
setting of the process (TF32, threads) makes it compile again during a recording, and the number of sizes is not limited
(``torch.compile`` gives up after eight).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.manifest import Option
from tstitch_engines.errors import BadInput, BuildFailed, Unavailable, first_line, unknown_name
from tstitch_engines.quiet import silence_output

__all__ = ["MODES", "compile_program", "mode_of", "need_toolchain"]

# What is asked for -> TorchInductor's own name. Its modes that record CUDA graphs are left out: a graph can't be
# launched into the recording of another, and a whole step is recorded, kernels and engine
# (tstitch_trt/runtime/step_graphs.py).
MODES: Final = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_SWITCH: Final = {"true": "default", "false": None}
_WORDS: Final = {**_SWITCH, **{name: name for name in MODES}, **{inner: name for name, inner in MODES.items()}}
_OWN_GRAPHS: Final = ("reduce-overhead",)

_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"
_TRITON_CACHE: Final = "TRITON_CACHE_DIR"  # TorchInductor sets it below its own folder when it is not set

_NO_COMPILER: Final = "the option compile needs {what}, which is not there"
_EAGER: Final = "or leave out --option compile: the same program then runs operator by operator"


def mode_of(option: Option | None) -> str | None:
    """A key of ``MODES``, or ``None`` for a program that runs as it is. Raises ``UnknownName`` and ``BadInput``."""
    if option is None or isinstance(option, bool):
        return "default" if option else None
    word = str(option)
    if word in _WORDS:
        return _WORDS[word]
    if word in _OWN_GRAPHS:
        raise BadInput(
            f"compile = {word}: this mode is PyTorch's own CUDA graphs, which can't run inside ours; "
            f"allowed are {', '.join(MODES)}",
            hint="use compile=default: on a GPU every step is recorded as a CUDA graph anyway (load: graph='step')",
        )
    raise unknown_name("compile mode", word, [*MODES, *_SWITCH])


def need_toolchain(kind: str) -> None:
    """Raises ``Unavailable`` when what TorchInductor generates for ``kind`` (``cpu``, ``cuda``) can't be compiled."""
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise Unavailable(_NO_COMPILER.format(what="Triton on a GPU"), hint=f"pip install triton, {_EAGER}")
    # On a GPU Triton compiles a launcher in C for every kernel.
    language, variable, known = ("C++", "CXX", ["g++"]) if kind == "cpu" else ("C", "CC", ["gcc", "clang", "cc"])
    if chosen := os.environ.get(variable):
        known = [chosen]
    if not any(shutil.which((shlex.split(name) or [""])[0]) for name in known):
        raise Unavailable(
            _NO_COMPILER.format(what=f"a {language} compiler ({known[0]!r})"),
            hint=f"install g++ (apt-get install g++), name another in {variable}, {_EAGER}",
        )


def compile_program(
    torch: Any, module: Any, *, mode: str, results: Sequence[Any], arguments: Sequence[Any], threads: int, what: str
) -> Callable[..., None]:
    """A function of ``(*results, *arguments)`` that writes what ``module(*arguments)`` gives into ``results``.

    For tensors of exactly these shapes, dtypes and alignments; the given ones are overwritten and not kept. The store
    into the results is part of the generated code, mostly without a copy. Takes seconds to minutes where the cache
    (``TORCHINDUCTOR_CACHE_DIR``, else ``torch-inductor`` in ours) has nothing. Compiles and runs once on PyTorch's
    current stream, and waits. One at a time, which ``RECORDING`` sees to: folders are told through the environment.

    Raises ``BuildFailed``, or ``Unavailable`` without a compiler.
    """
    inductor = _inductor()
    options = {
        **inductor.list_mode_options(MODES[mode]),
        "triton.cudagraphs": False,
        "freezing": False,  # it copies the weights, which may be replaced later (Engine.refit)
        # Baked into the code, so it has to be part of the cache's key.
        "cpp.threads": threads or torch.get_num_threads(),
    }
    tensors = [*results, *arguments]
    try:
        with _own_cache(), silence_output(stderr=True), torch.inference_mode():
            run: Callable[..., Any] = inductor.compile(
                _writing(torch, module, len(results), len(arguments)), tensors, options=options
            )
            run(*tensors)  # kernels are chosen and loaded by their first call
            if tensors[0].is_cuda:
                torch.cuda.current_stream().synchronize()
    except Exception as error:
        raise _explained(torch, error, what) from error
    return run


def _inductor() -> Any:
    """TorchInductor, which `import torch` does not import; on a thread that Ctrl-C does not reach.

    A module of its own whose import is interrupted can't be imported again ("duplicate template name"), so that the
    next compilation in this process would fail.
    """

    def load() -> None:
        with contextlib.suppress(Exception):  # raised again below
            importlib.import_module("torch._inductor.compile_fx")

    loading = threading.Thread(target=load, name="import torch._inductor", daemon=True)
    loading.start()
    loading.join()
    return importlib.import_module("torch._inductor")


def _writing(torch: Any, module: Any, results: int, arguments: int) -> Any:
    """``module`` as a graph that takes its outputs' memory as the first inputs and gives nothing."""
    graph = torch.fx.Graph()
    targets = [graph.placeholder(f"result_{index}") for index in range(results)]
    values = graph.call_module("module", tuple(graph.placeholder(f"argument_{index}") for index in range(arguments)))
    root = torch.nn.Module()
    root.module = module
    for index, target in enumerate(targets):
        graph.call_method("copy_", (target, graph.call_function(_item, (values, index))))
    graph.output(())
    return torch.fx.GraphModule(root, graph)


def _item(values: Any, index: int) -> Any:
    """An output of a program, which gives a lone one as it is."""
    return values[index] if isinstance(values, (tuple, list)) else values


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """PyTorch's default is a folder in /tmp, gone with the next start of the machine."""
    if not _is_default(os.environ.get(_CACHE, "")):
        yield
        return
    before = {name: os.environ.get(name) for name in (_CACHE, _TRITON_CACHE)}
    os.environ[_CACHE] = str(default_root().absolute() / "torch-inductor")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_default(folder: str) -> bool:
    """Whether nobody chose a folder: importing TorchInductor sets the variable, to its default."""
    path = Path(folder)
    return not folder or (path.name.startswith("torchinductor_") and path.parent == Path(tempfile.gettempdir()))


def _explained(torch: Any, error: Exception, what: str) -> Exception:
    """The error of ours for one of the compiler's, whose text names the cause somewhere inside."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or getattr(chain[-1], "inner_exception", None)) and inner not in chain:
        chain.append(inner)
    text = first_line(error)
    told = " ".join([*(type(link).__name__ for link in chain), text])
    if any(name in told for name in ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")):
        return Unavailable(f"PyTorch {torch.__version__} can't compile {what}: {text}", hint=f"install it, {_EAGER}")
    if "OutOfMemoryError" in told or "out of memory" in told:
        return BuildFailed(
            f"PyTorch {torch.__version__} has no memory to compile {what}: {text}",
            hint="a smaller batch needs less; compile=default tries fewer kernels than compile=max-autotune",
        )
    if "CppCompileError" in told:
        reason = next((line.strip() for line in str(error).splitlines() if "error:" in line), text)
        return BuildFailed(
            f"the C++ compiler refuses what PyTorch {torch.__version__} made of {what}: {reason}",
            hint=f"it needs g++ 9 or newer and Python's headers (apt-get install g++ python3-dev), {_EAGER}",
        )
    return BuildFailed(
        f"PyTorch {torch.__version__} can't compile {what}: {text}",
        hint=f"tstitch-trt doctor lists the versions of torch and triton, which must fit each other; {_EAGER}",
    )
