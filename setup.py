"""The packages of the wheel; everything else stands in pyproject.toml.

The folder of shipped configs is at the top of the source tree and becomes ``onpolicy_skd/configs`` in the wheel.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["onpolicy_skd*", "actors*", "eval*"]), "onpolicy_skd.configs"],
    package_dir={"onpolicy_skd.configs": "configs"},
    package_data={"onpolicy_skd": ["py.typed", "assets/**/*"], "onpolicy_skd.configs": ["**/*.yaml"]},
)
