"""megalite: 3D-parallel training of LLaMA-family language models.

Importing this package imports nothing else: `--help` and `--dry-run` need no torch.
"""

__version__ = "0.1.0"
