"""Packaging. `pip install -e .` is all that a user needs; see README.md."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="megalite",
    version="0.1.0",
    description="Megatron-style 3D-parallel training of LLaMA-family language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # An explicit list: `kernels/` is a plain folder, not a package. Hugging Face ships a package
    # of that name, and one of ours would shadow it in every user's environment.
    packages=[
        "megalite",
        "megalite.checkpoint",
        "megalite.data",
        "megalite.diagnosis",
        "megalite.layers",
        "megalite.models",
        "megalite.optim",
        "megalite.parallel",
        "megalite.pipeline",
        "megalite.planning",
        "megalite.preprocessing",
        "megalite.reading",
        "megalite.tokenizer",
        "megalite.verification",
        "megalite_kernels",
        "megalite_kernels.fused",
    ],
    package_dir={"megalite": "megalite", "megalite_kernels": "kernels/megalite_kernels"},
    # No upper caps, and never `apex`: the package of that name on PyPI is a stranger's.
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "sentencepiece>=0.2.1",
        "regex",
        "safetensors>=0.4.3",
        # The first in which a kernel can start before the one it waits for has ended.
        "triton>=3.4; platform_system == 'Linux'",
    ],
    extras_require={
        "test": [
            *("pytest>=8", "transformers>=4.45", "ruff>=0.9", "mypy>=1.14"),
            *(
                "hypothesis>=6",
                "tiktoken>=0.9",
                "tokenizers>=0.20",
                "pyarrow",
                "zstandard",
                "numba",
                "orjson",
            ),
            # Its dataset code is the oracle of the format. It needs torch, numpy and packaging.
            "megatron-core>=0.12; platform_system == 'Linux'",
        ],
        "data": ["pyarrow", "zstandard", "orjson"],
        "hf": ["tokenizers>=0.20"],
        "log": ["tensorboard"],
        "blend": ["numba"],
        "bench": ["matplotlib"],
    },
    entry_points={
        "console_scripts": [
            "megalite-pretrain=megalite.pretrain:cli_main",
            "megalite-verify=megalite.verify:cli_main",
            "megalite-doctor=megalite.doctor:cli_main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
