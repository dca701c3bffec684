"""The packages of the wheel: the folders below, under their import names, with every package inside them."""

from setuptools import find_packages, setup

FOLDERS = {
    "zoo": "zoo",
    "zoo.kernels": "kernels",
    "zoo.manifest": "checkpoints",
    "zoo.recipes": "recipes",
    "zoo.tools": "tools",
}

inner = [f"{package}.{name}" for package, folder in FOLDERS.items() for name in find_packages(folder)]
setup(packages=[*FOLDERS, *inner], package_dir=FOLDERS)
