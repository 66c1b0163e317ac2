"""Packaging of dpo_ds. Exact, tested versions are in constraints.txt; tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dpo_ds/__init__.py").read_text(encoding="utf-8")).group(1)
README = ROOT / "README.md"

setup(
    name="dpo-ds",
    version=VERSION,
    description="Distributed Direct Preference Optimization of large language models on DeepSpeed ZeRO-3",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dpo_ds", "dpo_ds.*"]),
    package_data={"dpo_ds.commands.evaluate": ["*.jinja"], "dpo_ds.config.peers": ["*.yaml"]},
    entry_points={"console_scripts": ["dpo-ds = dpo_ds.__main__:program"]},
    install_requires=[
        "torch>=2.11",  # the lowest that is tested
        "deepspeed>=0.19.8",  # earlier ones lose all-gather handles under gloo
        "transformers>=5",
        "accelerate",  # transformers' HfDeepSpeedConfig is behind it
        "datasets",
        "filelock",
        "jinja2",  # chat templates, reports
        "matplotlib",  # reports
        "numpy",
        "pyarrow",
        "pydantic>=2",
        "PyYAML",
        "safetensors",
        "shtab",  # dpo-ds --completion
        "tensorboard",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "lora": ["peft"],
        "quantize": ["bitsandbytes", "peft"],  # model.quantize 4bit
        "flash": ["flash-attn-4>=4.0.0b36"],  # CUDA only; a wheel, no compiler is needed
        "bench": ["trl"],  # the peer that tests/benchmarks measures against
        "dev": [
            'bitsandbytes; platform_machine == "x86_64" and sys_platform == "linux"',
            "hypothesis",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scikit-learn",  # the reward of launch_scripts/recipes/sentiment
            # The CUDA kernels' tests run in Triton's interpreter on a CPU; torch brings it along only on CUDA.
            'triton; platform_machine == "x86_64" and sys_platform == "linux"',
        ],
    },
)
