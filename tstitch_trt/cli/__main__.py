"""``python -m tstitch_trt.cli`` is ``tstitch-trt``."""

import sys

from tstitch_trt.cli import main

if __name__ == "__main__":
    sys.exit(main())
