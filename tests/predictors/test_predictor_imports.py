"""The room needs numpy alone until something is fitted."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_predictors_imports_no_heavy_library():
    code = (
        "import sys, archsmith.predictors; print(sorted({'torch', 'sklearn', 'scipy', 'lightgbm'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
