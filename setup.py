"""The distribution ``lightning-mlc``. From a clone it installs ``mlc_kernels`` too, which needs torch only."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lightning_mlc/__init__.py").read_text())
assert VERSION is not None
# A clone has both packages. A release is built from a tree without kernels/, and requires the distribution mlc-kernels
# (kernels/setup.py), so that no file is installed twice. .ci/release builds both.
HAS_KERNELS = (ROOT / "kernels").is_dir()
# Address of the repository, such as https://github.com/OWNER/NAME. The release workflow knows its own.
REPOSITORY = os.environ.get("PROJECT_REPOSITORY")


def readme() -> str:
    """README.md. If the repository is known, links have its address, because on PyPI relative ones lead nowhere."""

    def whole(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
        return f"]({REPOSITORY}/{kind}/v{VERSION[1]}/{link[1]})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", whole, text) if REPOSITORY else text


# transformers reads GGUF files with both.
GGUF = ["gguf>=0.10", "accelerate"]
# Quantised models under adapters; transformers loads them with both.
QLORA = ["peft>=0.17", "bitsandbytes>=0.50", "accelerate"]
# `lightning-mlc lint` recognises languages and wrong encodings with them.
LINT = ["py3langid>=0.4,<0.5", "ftfy>=6.3"]
# `lightning-mlc translate` checks with lint. sacrebleu has chrF, and the tokenizer of M2M-100 needs sentencepiece.
TRANSLATE = [*LINT, "sacrebleu>=2.4", "sentencepiece>=0.2"]
BENCH = ["trl>=1.16", "PyYAML>=6", "scipy>=1.11"]
# What notebooks/ imports, and what runs it in an editor or in the tests.
NOTEBOOK = [*GGUF, "peft>=0.17", "pandas>=2", "ipykernel>=7", "nbclient>=0.11"]
TEST = [
    *GGUF,
    *QLORA,
    *TRANSLATE,
    *BENCH,
    *NOTEBOOK,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "kernels",
    "tensorboard",
    "wandb",
]

setup(
    name="lightning-mlc",
    version=VERSION.group(1),
    description="Align a language model with data in one language, and keep it consistent in the others",
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls={
        "Source": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }
    if REPOSITORY
    else {},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    # `kernels` is also the name of a Hugging Face package, so the folder is not one of ours: it only
    # holds `mlc_kernels`. The recipes travel inside the package, so that `--config NAME` finds them.
    packages=[
        *find_packages(include=["lightning_mlc*"]),
        "lightning_mlc.configs",
        *(["mlc_kernels"] if HAS_KERNELS else []),
    ],
    package_dir={"lightning_mlc.configs": "configs"} | ({"mlc_kernels": "kernels/mlc_kernels"} if HAS_KERNELS else {}),
    package_data={
        "": ["py.typed"],
        "lightning_mlc": ["chat_templates/*.jinja"],
        "lightning_mlc.configs": ["*.yaml", "*/*.yaml"],
        "lightning_mlc.data": ["sample/*"],
        "lightning_mlc.evaluation.reporting": ["*.jinja", "*.css"],
        "lightning_mlc.lint": ["*.jinja"],
    },
    install_requires=[
        *([] if HAS_KERNELS else [f"mlc-kernels=={VERSION.group(1)}"]),
        "torch>=2.11",
        "transformers>=5.17,<6",
        # Earlier versions carried malware (2.6.2, 2.6.3) or a code-execution hole (up to 2.6.5).
        "lightning>=2.6.6,<2.7",
        "pytorch-lightning>=2.6.6,<2.7",
        "jsonargparse[signatures]>=4.41,<5",
        "torchmetrics>=1.5",
        "numpy>=2",
        "jinja2>=3.1",
        "tokenizers>=0.22",
        "datasets>=4",
        "pyarrow",
        "langcodes>=3.4",
        "fonttools>=4.50",
        "regex",
        "safetensors",
        "huggingface_hub>=1",
        "httpx>=0.27",
        "pydantic>=2",
        "matplotlib>=3.8",
        "rich>=13",
        "tqdm>=4.60",
        "triton; sys_platform == 'linux'",
    ],
    extras_require={
        "quickstart": GGUF,
        "lint": LINT,
        "translate": TRANSLATE,
        "lora": ["peft>=0.17"],
        "trl": ["trl>=1.16"],
        "qlora": QLORA,
        "bench": BENCH,
        "notebook": NOTEBOOK,
        "test": TEST,
        "docs": ["sphinx>=8", "myst-parser>=4", "furo", "sphinx-copybutton"],
        "dev": [*TEST, "ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["lightning-mlc = lightning_mlc.cli:main"]},
    keywords=["multilingual", "alignment", "safety", "dpo", "preference optimization", "lightning", "language model"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
)
