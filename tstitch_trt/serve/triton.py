"""The batching engine behind Triton Inference Server's Python backend, and the model repository that it is in.

A request of Triton's is one request of the engine. Triton is to batch nothing: ``execute`` hands requests on and
returns, and each is answered when the engine is done with it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed, TStitchError, first_line
from tstitch_trt.request.options import SampleKeywords
from tstitch_trt.runtime.result import Result
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle

__all__ = ["ServerOptions", "TritonModel", "write_repository"]

BUNDLE: Final = "model.bundle"
_LOOK: Final = 0.25  # seconds between two looks at whether clients have gone
_SENDERS: Final = 4  # threads that copy pictures to Triton
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

MODEL: Final = '''\
"""tstitch-trt behind Triton's Python backend. Written by: tstitch-trt export-triton."""

from tstitch_trt.serve.triton import TritonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class _Input:
    """An input tensor: a keyword of a request. ``dims``: of Triton; ``[1]`` is a single value."""

    name: str
    kind: Literal["STRING", "INT32", "UINT64", "FP64", "UINT8"]
    dims: tuple[int, ...] = (1,)


_CLASSES: Final = (_Input("labels", "STRING", (-1,)),)
_TEXTS: Final = (_Input("prompt", "STRING", (-1,)), _Input("negative_prompt", "STRING", (-1,)))
_ALL: Final = (
    _Input("n", "INT32"),
    _Input("seed", "UINT64"),
    _Input("seeds", "UINT64", (-1,)),
    _Input("steps", "INT32"),
    _Input("solver", "STRING"),
    _Input("fraction", "FP64"),
    _Input("rounding", "STRING"),
    _Input("schedule", "STRING"),
    _Input("guidance", "FP64"),
    _Input("height", "INT32"),
    _Input("width", "INT32"),
)
_PICTURES: Final = (
    _Input("image", "UINT8", (-1, -1, -1)),
    _Input("mask", "UINT8", (-1, -1)),
    _Input("strength", "FP64"),
)
_SUBMITTED: Final = (_Input("latency_budget_ms", "FP64"), _Input("priority", "INT32"))


def _inputs(manifest: Manifest) -> tuple[_Input, ...]:
    """What a request to this bundle may have; all of them are optional."""
    what = _TEXTS if manifest.conditioning.kind == "text" else _CLASSES
    return (*what, *_ALL, *_PICTURES, *_SUBMITTED)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How Triton runs the model: one engine on the CPU, or one on each GPU."""

    device: Literal["cpu", "cuda"] = "cpu"
    backend: str | None = None
    threads: int | None = None
    trust: bool = False
    max_lanes: int | None = None
    max_queue: int = 256

    def parameters(self) -> dict[str, str]:
        """As the parameters of a Triton model."""
        said = {name: getattr(self, name) for name in ("backend", "threads", "max_lanes", "max_queue")}
        return {name: str(value) for name, value in said.items() if value is not None} | (
            {"trust": "yes"} if self.trust else {}
        )


def write_repository(bundle: Bundle, repository: Path, *, name: str, options: ServerOptions) -> Path:
    """Writes the model ``name`` into a model repository, with a copy of the bundle, and returns its folder.

    It appears whole or not at all. Raises ``BadInput`` for a name that Triton can't have or that is taken.
    """
    folder = repository / name
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"name {name[:80]!r} can't be a model's; allowed are letters, digits, '_', '-' and '.'",
            hint="e.g. --name fashion",
        )
    if folder.exists():
        raise BadInput(f"{str(folder)!r} is there already", hint="remove it, or choose another --name")
    repository.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=repository))
    try:
        scratch.chmod(0o755)
        version = scratch / "1"
        version.mkdir()
        (version / "model.py").write_text(MODEL)
        shutil.copytree(bundle.root, version / BUNDLE)
        (scratch / "config.pbtxt").write_text(_config(bundle.manifest, name, options))
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _config(manifest: Manifest, name: str, options: ServerOptions) -> str:
    """``config.pbtxt``."""
    decoded = manifest.decoder.kind != "none"
    outputs = [("images", "UINT8", 4) if decoded else ("latents", "FP32", 4), ("seeds", "UINT64", 1)]
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 0"]
    for each in _inputs(manifest):
        dims = ", ".join(map(str, each.dims))
        lines.append(f'input {{ name: "{each.name}" data_type: TYPE_{each.kind} dims: [ {dims} ] optional: true }}')
    for output, kind, rank in outputs:
        dims = ", ".join(["-1"] * rank)
        lines.append(f'output {{ name: "{output}" data_type: TYPE_{kind} dims: [ {dims} ] }}')
    lines.append(f"instance_group {{ count: 1 kind: KIND_{'CPU' if options.device == 'cpu' else 'GPU'} }}")
    for key, value in options.parameters().items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}')
    return "\n".join(lines) + "\n"


class TritonModel:
    """What ``model.py`` gives to Triton. Its types are those of ``triton_python_backend_utils``, which only Triton's
    own processes have."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle beside ``model.py``, and warms it up before Triton says that it is ready."""
        import triton_python_backend_utils as triton

        self._triton = triton
        config = json.loads(args["model_config"])
        said = {key: value["string_value"] for key, value in config["parameters"].items()}
        gpu = args["model_instance_kind"] == "GPU"
        load = {
            "device": f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            "backend": said.get("backend"),
            "threads": int(said["threads"]) if "threads" in said else None,
            "trust": said.get("trust") == "yes",
        }
        most = said.get("max_lanes")
        self._engine = Engine(
            Path(args["model_repository"]) / args["model_version"] / BUNDLE,
            max_lanes=None if most is None else int(most),
            max_queue=int(said.get("max_queue", "256")),
            load=load,
        )
        self._inputs = _inputs(self._engine.runtime().manifest)
        self._open: dict[Handle, Any] = {}
        self._over = threading.Event()
        self._engine.warm_up()
        self._senders = ThreadPoolExecutor(_SENDERS, thread_name_prefix="tstitch-send")
        self._watch = threading.Thread(target=self._watch_clients, name="tstitch-watch", daemon=True)
        self._watch.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hands the requests to the engine. Their answers are sent later, by other threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                handle = self._engine.submit(**self._keywords(request))
            except Exception as error:
                self._send(sender, self._failure(error))
                continue
            self._open[handle] = sender
            handle.add_done_callback(lambda handle: self._senders.submit(self._answer, handle))

    def finalize(self) -> None:
        """Triton calls it when it has the last answer."""
        self._over.set()
        self._watch.join()
        self._engine.close(cancel=True)
        self._senders.shutdown()

    def _keywords(self, request: Any) -> SampleKeywords:
        found: dict[str, object] = {}
        for each in self._inputs:
            tensor = self._triton.get_input_tensor_by_name(request, each.name)
            if tensor is None:
                continue
            value = tensor.as_numpy()
            if each.kind == "STRING":
                value = [_text(item, each.name) for item in value.reshape(-1).tolist()]
            found[each.name] = value[0] if each.dims == (1,) else value
        return cast("SampleKeywords", found)

    def _answer(self, handle: Handle) -> None:
        sender = self._open.pop(handle)
        try:
            response = self._response(handle.result())
        except Exception as error:
            response = self._failure(error)
        self._send(sender, response)

    def _response(self, result: Result) -> Any:
        drawn = ("latents", result.latents) if result.images is None else ("images", result.images)
        outputs = (drawn, ("seeds", np.array(result.seeds, np.uint64)))
        tensors = [self._triton.Tensor(name, np.ascontiguousarray(value)) for name, value in outputs]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _failure(self, error: BaseException) -> Any:
        codes = self._triton.TritonError
        kinds = {BadInput: codes.INVALID_ARG, Busy: codes.UNAVAILABLE, Closed: codes.UNAVAILABLE,
                 Cancelled: codes.CANCELLED}  # fmt: skip
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), codes.INTERNAL)
        text = str(error) if isinstance(error, TStitchError) else first_line(error)
        return self._triton.InferenceResponse(error=codes(text, code))

    def _send(self, sender: Any, response: Any) -> None:
        sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _watch_clients(self) -> None:
        while not self._over.wait(_LOOK):
            for handle, sender in list(self._open.items()):
                if sender.is_cancelled():
                    handle.cancel("its client has gone")


def _text(item: object, name: str) -> str:
    try:
        return cast("bytes", item).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{name} is no UTF-8", hint="encode texts as UTF-8") from None
