"""What `pip install -e` makes of a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BUILD = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"


def test_a_checkout_of_any_name_is_a_plain_path_entry(tmp_path: Path) -> None:
    """With an import hook instead, a folder named `tandem` would hide the package from scripts in the folder above."""
    checkout, wheels = tmp_path / "tandem", tmp_path / "wheels"
    (checkout / "tandem").mkdir(parents=True)
    (checkout / "tandem" / "__init__.py").touch()
    wheels.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run([sys.executable, "-c", _BUILD, str(wheels)], cwd=checkout, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if "/" not in name]
        assert archive.read(path).decode().split() == [str(checkout)]
