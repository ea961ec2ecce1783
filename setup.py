"""What pyproject.toml can't say: passes/ and schedules/ become sub-packages of qcompiler, and targets.yaml goes into it."""

import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OUTSIDE = ("passes", "schedules")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads the checkout's own
            shutil.copy(ROOT / "targets.yaml", Path(self.build_lib) / "qcompiler" / "targets.yaml")


def packages_of(name: str, folder: str) -> list[str]:
    """`name` and everything below `folder`, folders of data among them."""
    return [name, *(f"{name}.{p}" for p in find_namespace_packages(folder, exclude=["*__pycache__*"]))]


places = {"qcompiler": "qcompiler", **{f"qcompiler.{folder}": folder for folder in OUTSIDE}}
setup(
    packages=[package for name, folder in places.items() for package in packages_of(name, folder)],
    package_dir=places,
    package_data={"": ["*"]},
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    cmdclass={"build_py": BuildPy},
)
