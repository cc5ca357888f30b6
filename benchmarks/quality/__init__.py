"""What the loss does to samples: one experiment runner, from a README run to the paper's networks.

`python -m benchmarks.quality run digits` is the README's main job; every larger experiment is
another preset of the same runner.  The rooms, each about one thing:

==================  ================================================================
`catalogue`         the presets' names, and what each takes
`data`              real images as one uint8 tensor
`paths`             ε on the discrete schedule, or a flow
`networks`          networks, small and large
`objectives`        what a network is trained on
`corrections`       what is put on a trained one
`named`             settings whose name says all of them
`streams`           the random numbers that all objectives share
`budget`            how a network is trained
`checkpoint`        the state of a training under way
`training`          one training run that survives being killed
`samplers`          diffusers' samplers, set up alike
`spectra`           octaves of frequencies of images
`features`          the feature space in which samples are compared with data
`metrics`           the distances
`presets`           the experiments, as data
`layout`            the folder of a run
`plan`              what a run has to do
`runner`            objective x seed -> network -> sampler x steps -> one JSON per cell
`search`            what the library's search recommends for a run's networks
`gpu`               what is planned for minutes on a GPU
`record`            a run's results in one record
`report`            the report of one run, with `pictures`
`statistics`        improvements over plain training, paired by seed, with intervals
`committed`         the committed records by short names
`holes`             what pages can say of them, with `evidence_figures`
==================  ================================================================
"""
