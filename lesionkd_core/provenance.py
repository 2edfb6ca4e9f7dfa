"""Where a result comes from: commit, versions, device and threads."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from .config import StageConfig

CHECKOUT = Path(__file__).resolve().parents[1]


def environment(cfg: StageConfig) -> dict[str, Any]:
    """Commit, versions, device and threads: what a reader needs to run it again."""
    from importlib.metadata import version

    import torch

    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device.replace("auto", "cpu")
    packages = ("torch", "numpy", "scipy", "pandas", "monai", "lightning-fabric", "scikit-image", "pillow")
    return {
        "commit": commit(), "python": platform.python_version(), "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device,
        "threads": cfg.threads or torch.get_num_threads(), "processes": int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1,
        "seeds": {n: v for n, v in cfg if n.endswith("seed")},
    }


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; empty outside git."""
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(CHECKOUT), *args], capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""
