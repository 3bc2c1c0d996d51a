"""Run a script where torchvision is missing: python without_torchvision.py SCRIPT ARGUMENTS

timm imports torchvision, of which there is no build for every torch; averaging checkpoints needs nothing of it.
"""

import runpy
import sys
from unittest.mock import MagicMock

for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder"):
    sys.modules[f"torchvision{name}"] = MagicMock()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
