"""Run a script without torchvision: python without_torchvision.py SCRIPT ARGUMENTS

timm imports torchvision, which has no build for every torch; averaging checkpoints does not use it.
"""

import runpy
import sys
from unittest.mock import MagicMock

for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder"):
    sys.modules[f"torchvision{name}"] = MagicMock()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
