"""Where OpenRLHF is installed, and flash-attn and vLLM are not, it finds the stand-ins."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("openrlhf.cli") is not None:
    # At the end, so that installed ones come first.
    sys.path.append(str(Path(__file__).with_name("stand_ins")))
