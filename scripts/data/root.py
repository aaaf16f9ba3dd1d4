"""Where this bundle lies, and which version of it."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
VERSION = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["version"]
