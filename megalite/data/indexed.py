"""Megatron-LM's indexed datasets: the names that others use; see `indexed_format`."""

from megalite.data.indexed_format import token_dtype
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import FileSum, IndexedWriter, Written

__all__ = ["FileSum", "IndexedReader", "IndexedWriter", "Written", "token_dtype"]
