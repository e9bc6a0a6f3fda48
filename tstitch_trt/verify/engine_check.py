"""One engine under test: checks its identity and loads it where it can run here."""

from __future__ import annotations

import msgspec

from tstitch_engines.backends import for_gpu, open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.identity import check_identity, digest, model_digest
from tstitch_engines.bundle.manifest import SCHEMA, EngineRecord, Network
from tstitch_engines.compile.bundle import compile_command
from tstitch_engines.device.base import Device
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadEngine, Unavailable
from tstitch_engines.host_call import HostRunner
from tstitch_trt.verify.compare import LIMITS, Comparison, EngineCheck, Status

__all__ = ["EngineUnderTest", "place_of"]


class EngineUnderTest:
    """``runner`` is ``None`` until ``open`` has loaded the engine."""

    def __init__(self, bundle: Bundle, name: str, record: EngineRecord, gpu: str, threads: int) -> None:
        self.name = name
        self.record = record
        self.network: Network = bundle.manifest.networks()[name]
        self.limit, self.why = LIMITS[self.network.precision]
        self.runner: HostRunner | None = None
        self.plan: str | None = None
        self._bundle = bundle
        self._gpu = gpu  # cpu: leave out
        self._threads = threads

    def open(self) -> tuple[Status, str | None]:
        """The status before the engine has run, and the reason. Never raises ``BadEngine`` or ``Unavailable``."""
        try:
            self._check_record()
            engine, device = self._load()
        except Unavailable as error:
            return "not checked", error.message
        except BadEngine as error:
            return "failed", error.message
        self.runner = HostRunner(engine, device)
        return "passed", None

    def _check_record(self) -> None:
        """Checks the manifest's record and a plan's header, without running the engine. Raises ``BadEngine``."""
        identity, network = self.record.identity, self.network
        want = msgspec.structs.replace(
            identity, schema=SCHEMA, onnx_sha256=model_digest(network.onnx), precision=network.precision
        )
        check_identity(identity, want, what=f"the {identity.backend} engine", rebuild=self._again)
        if identity.backend != "tensorrt-rtx":
            return
        from tstitch_engines.backends.tensorrt import read_plan_header
        from tstitch_engines.backends.tensorrt.flavour import RTX
        from tstitch_engines.backends.tensorrt.options import DEFAULT_LIST
        from tstitch_engines.backends.tensorrt.plan import check_plan

        path = self._bundle.path(self.record.files[0])
        check_plan(RTX, identity.backend_version, path, None)
        header = read_plan_header(path)
        assert header is not None, "check_plan has read it"
        self.plan = f"TensorRT-RTX {header.version}, compute capability {header.gpus()}"
        listed = ",".join(f"sm_{major}{minor}" for major, minor in header.capabilities)
        if identity.arch not in (DEFAULT_LIST, listed):
            raise BadEngine(f"the plan is for {listed}, the manifest says {identity.arch}", hint=self._again)

    @property
    def _again(self) -> str:
        return compile_command(self._bundle, self.record.identity.backend, place_of(self.record, self._gpu))

    def _load(self) -> tuple[Engine, Device]:
        identity = self.record.identity
        backend = open_backend(identity.backend)
        if (place := place_of(self.record, self._gpu)) == "cpu" and for_gpu(identity.backend, identity.arch):
            raise Unavailable(
                f"it is for GPUs ({identity.arch}), and the device asked for is {self._gpu}", hint="ask for cuda"
            )
        device = open_device(place)
        arch = backend.arch(device.name)
        path = self._bundle.path(self.record.files[0])
        try:
            check_identity(identity, backend.current_identity(identity, arch), what="it", rebuild=self._again)
            if identity.backend == "tensorrt-rtx":
                from tstitch_engines.backends.tensorrt import read_plan_header

                header, number = read_plan_header(path), int(arch.removeprefix("sm_"))
                if header is not None and not header.runs_on((number // 10, number % 10)):
                    raise BadEngine(
                        f"the plan is for compute capability {header.gpus()}; this GPU is {arch}", hint=self._again
                    )
        except BadEngine as error:  # a sound engine for another machine or version
            raise Unavailable(error.message, hint=error.hint) from None
        engine = backend.load(path, member=self.network, identity=identity, device=device, threads=self._threads)
        return engine, device

    def check(self, status: Status, reason: str | None, comparisons: tuple[Comparison, ...]) -> EngineCheck:
        identity = self.record.identity
        return EngineCheck(
            member=self.name,
            kind="member" if self.name in self._bundle.manifest.members else "part",
            backend=identity.backend,
            backend_version=identity.backend_version,
            arch=identity.arch,
            precision=identity.precision,
            identity=digest(identity),
            status=status,
            reason=reason,
            plan=self.plan,
            limit=self.limit,
            limit_reason=self.why,
            comparisons=comparisons,
        )

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
        self.runner = None


def place_of(record: EngineRecord, gpu: str) -> str:
    return gpu if for_gpu(record.identity.backend, record.identity.arch) else "cpu"
