"""What `bench_eight_gpus.py` is made of.

layouts     the layouts, their runs, and which of them computes activations again
speed       what the ranks do: train, then one step under the profiler
agreement   losses of all layouts and of one rank
rows        what a row holds, how it is printed
goals       what the figures should be, and which of them are
"""
