"""What clipkit keeps for a user between two runs, in a folder that may be deleted at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder for one kind of thing; it need not exist.

    It lies in `CLIPKIT_CACHE`, else where the system keeps caches: `XDG_CACHE_HOME` or ~/.cache on Linux,
    ~/Library/Caches on macOS, `LOCALAPPDATA` on Windows; there in a folder `clipkit`.

    Args:
        name: of the kind, such as ``verified``.
    """
    own = os.environ.get("CLIPKIT_CACHE")
    if own:
        return Path(own).expanduser() / name
    if sys.platform == "darwin":
        caches = Path("~/Library/Caches")
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return caches.expanduser() / "clipkit" / name
