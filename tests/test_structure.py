"""The figures of `tests.structure`, for a sample package and for ours."""

from tests import structure

FILES = {
    "__init__.py": '"""A package."""\n__all__ = ["Policy"]\n',
    "policy.py": '"""What a policy is."""\nfrom made_up import errors\n\n'
    'class BillingOptions:\n    """Options."""\n\n    one: int = 1\n    two = 2\n',
    "errors.py": '"""Errors."""\nfrom typing import TYPE_CHECKING\n\n'
    "if TYPE_CHECKING:\n    from made_up.policy import Policy\n\n"
    'def fail():\n    """Say why it failed, or what else."""\n',
}


def test_figures_are_read_from_the_source(tmp_path):
    package = tmp_path / "made_up"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)

    found = structure.figures(package)

    assert found["the package"] == "3 modules, 18 lines"
    assert found["the request path"] == "1 modules, 8 lines"
    assert found["import depth"] == "2 modules"
    assert found["public names"] == found["options"] == "1"
    assert found["docstrings that begin with what, who, which, …"].startswith("1 of 5")
    assert found["docstrings with such a clause behind the verb"].startswith("0 of 5")


def test_the_package_itself_has_all_modules_of_a_request():
    found = structure.figures(structure.PACKAGE)

    modules = len(structure.REQUEST_PATH)
    assert found["the request path"].startswith(f"{modules} modules")
