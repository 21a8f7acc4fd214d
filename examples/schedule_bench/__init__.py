"""What `bench_schedules.py` is made of.

case        a schedule with its stages, as one writes it
figures     what a recorded run shows: bubble, prediction, waiting
measure     a run as pretrain makes it: what its steps took, and why
ranks       one start of the ranks, which train under one schedule after the other
executor    the executor's own host time, and that of its sends and receives
rows        what a row holds, how it is printed; rows that are there already
goals       what the figures should be, and which of them are
"""
