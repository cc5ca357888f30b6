"""What the loss costs, on a CPU or a GPU: `python -m benchmarks.overhead run`.

Losses on identical tensors, in one process, in turn.

==============  ===========================================================
`contenders`    what is compared
`measure`       times, memory, operators, bytes, syncs, the gradient's error
`settings`      how large and how long
`levels`        the levels of the benchmark
`step`          the level of a whole training step
`figures`       the measured figures, read and put into words
`goals`         the goals, and what was measured against them
`details`       tables and text of the levels
`page`          `docs/overhead.md`, from the committed figures
==============  ===========================================================
"""
