"""The torchvision guard acts when, and only when, torchvision is installed and its operators cannot load."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from equireg import torchvision_guard as guard
from tests.golden import ROOT


def spec(folder: Path) -> ModuleSpec:
    found = ModuleSpec("torchvision", None)
    found.submodule_search_locations = [str(folder)]
    return found


class Operators:
    """Stands for torch.ops: no torchvision operators until a library is loaded."""

    def __init__(self, works: bool) -> None:
        self.works = works
        self.torchvision = type("Namespace", (), {})()

    def load_library(self, path: str) -> None:
        if not self.works:
            raise OSError("libtorch_cuda.so: cannot open shared object file")
        self.torchvision.nms = object()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "_C.so").touch()
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, package: Path | None, works: bool) -> list[str]:
    """A torch whose torchvision is absent, works or does not; returns the schemas that get declared."""
    declared = []
    monkeypatch.setattr(guard, "find_spec", lambda name: None if package is None else spec(package))
    monkeypatch.setattr(guard.torch, "ops", Operators(works))

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert namespace == "torchvision"

        def define(self, schema: str) -> None:
            declared.append(schema)

    monkeypatch.setattr(guard.torch.library, "Library", Library)
    return declared


def test_it_does_nothing_where_torchvision_works(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    declared = install(monkeypatch, package, works=True)
    assert guard.declare_missing_torchvision_operators() is False
    assert declared == []


def test_it_does_nothing_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = install(monkeypatch, None, works=False)
    assert guard.declare_missing_torchvision_operators() is False
    assert declared == []


def test_it_declares_both_schemas_where_the_operators_cannot_load(
    monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    declared = install(monkeypatch, package, works=False)
    assert guard.declare_missing_torchvision_operators() is True
    assert [schema.split("(")[0] for schema in declared] == ["nms", "qnms"]
    assert all("(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in schema for schema in declared)


@pytest.mark.parametrize("entry", ["cli", "equireg.priors"])
def test_every_entry_point_imports_on_this_machine(entry: str) -> None:
    code = f"import {entry}, lightning, torchmetrics, diffusers"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
