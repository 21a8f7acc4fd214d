"""Parts of `examples/bench_sharding.py`.

- cases: what is measured, by name, and the row that it gives
- ranks: what the ranks do: train one case after the other
- rival: torch's own `fully_shard` over the same model
- overlap: how much of the communication nothing hides
"""
