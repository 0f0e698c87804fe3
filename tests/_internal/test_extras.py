"""Optional packages: what is missing and what is broken are different errors."""

import importlib
import sys

import pytest

import artaug as aa
from artaug._internal.extras import optional


@pytest.mark.parametrize(
    "failure", ["ImportError('no kernel image')", "OSError('libcudart.so.12')", "RuntimeError('bad')"]
)
def test_a_broken_package_keeps_its_own_error_and_says_who_needs_it(failure, monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text(f"raise {failure}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    with (
        pytest.raises((ImportError, OSError, RuntimeError)) as caught,
        optional("broken_package", required_by="Prodigy"),
    ):
        importlib.import_module("broken_package")

    assert not isinstance(caught.value, aa.MissingExtraError)
    assert "Prodigy needs the broken_package package, which is installed but cannot" in caught.value.__notes__[0]


def test_a_package_whose_own_dependency_is_missing_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "needy_package.py").write_text("import no_such_dependency", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"), optional("needy_package", required_by="X"):
        importlib.import_module("needy_package")


@pytest.mark.parametrize(
    ("cls", "package"), [(aa.AdamW8bit, "bitsandbytes"), (aa.Prodigy, "prodigyopt"), (aa.ScheduleFree, "schedulefree")]
)
def test_an_optimizer_says_what_is_missing_when_it_is_made(cls, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        aa.MissingExtraError, match=rf'{cls.__name__} needs the {package} package.*"artaug\[optimizers\]"'
    ):
        cls()
