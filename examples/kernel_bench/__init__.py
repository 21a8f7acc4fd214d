"""What `bench_kernels.py` is made of.

problem     an op's inputs on one size, and how a contestant is called on them
cases       every op: sizes, inputs, floor bytes, definition in high precision
rivals      who takes part, who doesn't and why; rivals_*: how each one is called
timing      graph replays after a flush of the cache, in rounds; host time; memory
measure     one case from its inputs to the lines of the table
vocab_parallel    the case that needs two GPUs
goals       what the figures should be, as data
table plot  the lines printed and written
"""
