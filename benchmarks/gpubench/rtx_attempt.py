"""One attempt with one version of TensorRT-RTX, in a process of its own; a JSON object per step on stdout.

Plain calls of the library, so that its own words are what is recorded. Started by ``gpubench.rtx``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOLERANCE = 2e-2  # fp16, relative L2 to ONNX Runtime on the CPU


def main() -> int:
    said = json.loads(sys.argv[1])
    try:
        import tensorrt_rtx as trt  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            import tensorrt_rtx_bindings as trt  # type: ignore[import-untyped,import-not-found,no-redef,unused-ignore]
        except Exception as error:
            return say(missing=f"TensorRT-RTX can't be imported: {error}")
    if not trt.__version__.startswith(said["needs"]):
        return say(missing=f"TensorRT-RTX {said['needs']} is not here (installed is {trt.__version__})")
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append(f"{severity.name if hasattr(severity, 'name') else severity}: {text}")

    logger = Logger()

    def step(name: str, work: Callable[[], Any], **more: Any) -> Any:
        """Runs it, and says what came of it and every message from it that is not mere chatter."""
        messages.clear()
        start = time.perf_counter()
        try:
            value = work()
            problem = "it returned nothing" if value is None or value is False else None
        except Exception as error:
            value, problem = None, f"{type(error).__name__}: {error}"
        kept = [m for m in messages if not m.startswith("VERBOSE") or "capab" in m.lower()][:40]
        say(step=name, ms=1e3 * (time.perf_counter() - start), problem=problem, messages=kept, **more)
        return value if problem is None else None

    if said["cuda"]:
        from cuda.bindings import runtime as cuda

        step("cuda", lambda: cuda.cudaSetDevice(0)[0] == 0 and cuda.cudaFree(0)[0] == 0)
    with np.load(said["model"].replace("model.onnx", "case.npz"), allow_pickle=False) as stored:
        arrays = dict(stored)
    feeds = {name: value for name, value in arrays.items() if not name.startswith("want_")}
    plan = step("build", lambda: build(trt, logger, said, feeds), version=trt.__version__)
    if plan is None:
        return 0
    runtime = trt.Runtime(logger)
    header = plan[:64]
    if hasattr(runtime, "get_engine_validity"):
        step("validity", lambda: say(validity=[str(part) for part in runtime.get_engine_validity(header)]) == 0)
    engine = step("deserialise", lambda: runtime.deserialize_cuda_engine(plan), plan_bytes=len(plan))
    if engine is None or not said["cuda"]:
        return 0
    context = step("context", lambda: make_context(trt, engine, said))
    if context is not None:
        got = step("run", lambda: run(trt, engine, context[0], feeds, cuda))
        if got is not None:
            want = arrays["want_model_output"].astype(np.float64)
            off = float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
            say(step="compare", error=off if np.isfinite(off) else "not finite", equal=bool(off <= TOLERANCE))
    return 0


def say(**what: Any) -> int:
    print(json.dumps(what), flush=True)
    return 0


def build(trt: Any, logger: Any, said: dict[str, Any], feeds: dict[str, Any]) -> bytes | None:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(said["model"]):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if said["capabilities"]:
        config.num_compute_capabilities = 1
        kind = getattr(trt.ComputeCapability, said["capabilities"])
        if not config.set_compute_capability(kind, 0):
            raise RuntimeError(f"set_compute_capability({kind}) refused")
    if said["refit"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    profile = builder.create_optimization_profile()
    for name, value in feeds.items():
        rest = value.shape[1:]
        low, high = (2, 2) if said["static"] else (1, 4)
        profile.set_shape(name, (low, *rest), (2, *rest), (high, *rest))
    if config.add_optimization_profile(profile) < 0:
        raise RuntimeError("add_optimization_profile refused")
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(memoryview(plan))


def make_context(trt: Any, engine: Any, said: dict[str, Any]) -> tuple[Any, Any] | None:
    """The context and what it does not keep alive itself."""
    config = engine.create_runtime_config()
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, said["strategy"])
    context = engine.create_execution_context(config)
    return None if context is None else (context, config)


def run(trt: Any, engine: Any, context: Any, feeds: dict[str, Any], cuda: Any) -> Any:
    """One call on plain device memory. Raises ``RuntimeError`` with CUDA's or the library's refusal."""

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise RuntimeError(cuda.cudaGetErrorString(result[0])[1].decode())
        return result[1] if len(result) > 1 else None

    kinds = cuda.cudaMemcpyKind
    stream = check(cuda.cudaStreamCreate())
    for name, value in feeds.items():
        held = np.ascontiguousarray(value)
        pointer = check(cuda.cudaMalloc(held.nbytes))
        check(cuda.cudaMemcpy(pointer, held.ctypes.data, held.nbytes, kinds.cudaMemcpyHostToDevice))
        if not (context.set_input_shape(name, held.shape) and context.set_tensor_address(name, int(pointer))):
            raise RuntimeError(f"{name} {held.shape} refused")
    if missing := context.infer_shapes():
        raise RuntimeError(f"shapes not inferred: {missing}")
    out = np.full(tuple(context.get_tensor_shape("model_output")), np.nan, np.float16)
    target = check(cuda.cudaMalloc(out.nbytes))
    check(cuda.cudaMemcpy(target, out.ctypes.data, out.nbytes, kinds.cudaMemcpyHostToDevice))
    context.set_tensor_address("model_output", int(target))
    if not context.execute_async_v3(int(stream)):
        raise RuntimeError("execute_async_v3 refused")
    check(cuda.cudaStreamSynchronize(stream))
    check(cuda.cudaMemcpy(out.ctypes.data, target, out.nbytes, kinds.cudaMemcpyDeviceToHost))
    return out


if __name__ == "__main__":
    sys.exit(main())
