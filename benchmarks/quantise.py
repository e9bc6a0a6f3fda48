"""What 8 bits cost a member, by noise level: python benchmarks/quantise.py BUNDLE [--member large]"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Final

import msgspec
from gpubench.script import write_record

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_trt.quantise.quantise import quantise
from tstitch_trt.study.machine import describe_machine, package_version

RUNS: Final = (("int8", "max"), ("int8", "entropy"), ("fp8", "max"))
RESULTS: Final = Path(__file__).parent / "results" / "quantise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--member", default="large")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = open_bundle(options.bundle)
    document: dict[str, object] = {
        "command": shlex.join(["python", *sys.argv]),
        "bundle": source.manifest.name,
        "member": options.member,
        "machine": msgspec.to_builtins(describe_machine()),
        "nvidia-modelopt": package_version("nvidia-modelopt"),
    }
    runs = []
    with tempfile.TemporaryDirectory(prefix="tstitch-quantise-") as folder:
        for mode, method in RUNS:
            print(f"{options.member} to {mode}, {method}", file=sys.stderr)
            output = Path(folder) / f"{mode}-{method}.bundle"
            made = quantise(
                source, member=options.member, mode=mode, calibration=method, samples=options.samples, output=output
            ).members[options.member]
            words = ["--member", options.member, "--mode", mode, "--calibration", method]
            words += ["--samples", str(options.samples), "-o", "NEW"]
            runs.append(
                {
                    "command": shlex.join(["tstitch-trt", "quantise", str(options.bundle), *words]),
                    "precision": made.precision,
                    "onnx_bytes": sum(part.bytes for part in made.onnx),
                    **msgspec.to_builtins(made.quantisation),
                }
            )
    write_record(options.out / "quantise.json", document | {"runs": runs})


if __name__ == "__main__":
    main()
