"""The exact lab: what a gain on ε̂ does to samples where everything else is known.

``python -m benchmarks.lab --help`` lists the studies.  The rooms:

=============  =============================================================
``mixtures``   Gaussian mixtures, whose E[ε | x_t] is a formula
``linear``     a sampler on one Gaussian: its output's covariance, exactly
``criteria``   ways of choosing a gain without features and labels
``coverage``   whether the search's intervals hold
``studies``    the experiments; each returns one JSON document
``report``     the figures and the page fragment, from those documents; ``report_search``
=============  =============================================================
"""
