"""The distribution ``mlc-kernels``: the package ``mlc_kernels`` alone, for those who need the loss and nothing else."""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mlc_kernels/__init__.py").read_text())
assert VERSION is not None
# Address of the repository. The release workflow knows its own.
REPOSITORY = os.environ.get("PROJECT_REPOSITORY")

setup(
    name="mlc-kernels",
    version=VERSION.group(1),
    description="The multi-lingual consistency (MLC) loss as a PyTorch operator with a fused Triton kernel",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Source": REPOSITORY, "Issues": f"{REPOSITORY}/issues"} if REPOSITORY else {},
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=["mlc_kernels"],
    package_data={"": ["py.typed"]},
    install_requires=["torch>=2.11"],
    extras_require={"triton": ["triton; sys_platform == 'linux'"]},
    keywords=["multilingual", "alignment", "safety", "triton", "pytorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
