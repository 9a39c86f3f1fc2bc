"""Speaks as ``benchmarks.gpu_worker`` does and measures nothing: without torch it starts at once.

STUB_FAULT=KIND:CANDIDATE lets a candidate crash, hang or lose the device; in place of a candidate,
SHAPE fails the job and timing kills the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def answer(job: dict[str, Any]) -> bool:
    """Whether there is a device left."""
    kind, _, name = os.environ.get("STUB_FAULT", ":").partition(":")
    if job["kind"] == "copy":
        say(copy={"bytes": [1], "bytes_per_s": [1.0], "float16_flops": 1.0})
        return True
    if name == "SHAPE":
        say(failed="RuntimeError: out of memory")
        return True
    rows, shape = [], job["shape"]
    activation = "linear" if shape["activation"] == "none" else shape["activation"]
    for candidate in job["candidates"]:
        row = {
            "mode": job["label"], "dtype": job["dtype"], "batch": job["batch"], "group": "g",
            "shape": f"{shape['inp']}-{shape['oup']}@{shape['size']}-{activation}",
            "provider": candidate, "median_s": 1e-6, "call_s": 1e-6, "share_of_copy": 1.0,
            "share_of_largest_copy": 1.0,
        }  # fmt: skip
        rows.append(row)
        if reason := job["avoid"].get(candidate):
            row |= {"median_s": None, "note": f"failed: {reason}"}
            continue
        say(at=candidate)
        if candidate == name:
            print("what libraries print", file=sys.stderr, flush=True)
            if kind == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif kind == "hang":
                time.sleep(60)
            elif kind == "lose":
                say(lost="RuntimeError: an illegal memory access")
                return False
    say(at="timing")
    if name == "timing":
        os.kill(os.getpid(), signal.SIGKILL)
    say(rows=[] if job["kind"] == "warm" else rows)
    return True


def main() -> int:
    say(ready=True)
    for line in sys.stdin:
        if not answer(json.loads(line)):
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
