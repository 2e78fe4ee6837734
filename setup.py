"""The packages, found: setuptools can find packages in a folder, but not under another name, as three of ours have."""

from setuptools import find_packages, setup

RENAMED = ("benchmarks", "ops", "passes")
"""Folders that are installed inside `s2o_compile`; pyproject.toml says where they are."""

found = find_packages(include=["s2o_compile", "s2o_compile.*"])
for folder in RENAMED:
    found += [f"s2o_compile.{package}" for package in find_packages(include=[folder, f"{folder}.*"])]
setup(packages=sorted(set(found)))
