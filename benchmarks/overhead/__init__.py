"""What the loss costs, on a CPU or a GPU: `python -m benchmarks.overhead --help`.

Losses on identical tensors, in one process, in turn.

==============  ===========================================================
`contenders`    what is compared, the loss of another version too
`measure`       times, memory, operators, bytes, syncs, the gradient's error
`levels`        the loss alone: times at every size, counts, a copy
`step`          a whole training step: eager, compiled, in a CUDA graph
`plan`          all of it on a GPU within minutes, the most useful first
`holes`         the numbers, tables and figures of `docs/overhead.md`
==============  ===========================================================
"""
