"""Print those of the given notebooks that no test runs in a browser: all of them, where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import test_notebooks  # noqa: F401  (the classes with a notebook each)
from conftest import ABSENT
from every_notebook import EveryNotebook

opened = set() if ABSENT else {"app", *(cls.name for cls in EveryNotebook.__subclasses__())}
print(*(path for path in sys.argv[1:] if Path(path).stem not in opened))
