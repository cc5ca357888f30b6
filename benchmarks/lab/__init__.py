"""The exact lab: what a gain on ε̂ does to samples where everything else is known.

`python -m benchmarks.lab --help` lists the studies.

============  =============================================================
`mixtures`    Gaussian mixtures, whose E[ε | x_t] is a formula
`linear`      a sampler on one Gaussian: its output's covariance, exactly
`flow`        Euler's method on the straight path, likewise
`coverage`    whether the search's intervals hold
`studies`     the experiments; each returns one JSON document
`best_pair`   how far a search is from the best pair; `pairs` is its command
`holes`       the numbers, tables and a figure of the pages
============  =============================================================
"""
