"""Warnings stand at the caller's line, wherever the package lies and whatever the caller's folder is called."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

from hf_paged.hf import notices

PACKAGE = Path(notices.__file__).parent.parent


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("notices_again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def where(module: ModuleType, filename: str) -> str:
    """The file that a warning names whose caller is in `filename`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("warn('x')", filename, "exec"), {"warn": module.warn})
    return caught[0].filename


def test_a_package_behind_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "hf_paged").symlink_to(PACKAGE)
    assert where(loaded(tmp_path / "hf_paged" / "hf" / "notices.py"), "train.py") == "train.py"


def test_a_folder_whose_name_begins_like_the_package() -> None:
    script = f"{PACKAGE}_scripts/train.py"
    assert where(notices, script) == script
    assert where(notices, str(PACKAGE / "llm.py")) == __file__
