import subprocess
import sys

SCRIPT = """
import pkgutil, sys
import archsmith.core
for module in pkgutil.iter_modules(archsmith.core.__path__, "archsmith.core."):
    __import__(module.name)
print(*sorted(name for name in sys.modules if name.split(".")[0] in {"torch", "scipy", "sklearn"}))
"""


def test_the_core_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
