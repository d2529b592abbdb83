"""Let pytest collect notebooks wherever it is started, and switch the network off for it and all it starts."""

import sys
from pathlib import Path

for folder in ("tools", "tests"):
    sys.path.insert(0, str(Path(__file__).resolve().parent / folder))

pytest_plugins = ["notebook_runner", "surroundings"]
