"""What the loss does to samples: one experiment runner, from a README run to the paper's networks.

``python -m benchmarks.quality run digits`` is the README's main job; every larger experiment is
another preset of the same runner.  The rooms, each about one thing:

=================  =================================================================
``data``           real images as one uint8 tensor
``networks``       ε-models, small and large
``objectives``     what a network is trained on, and what is put on it afterwards
``streams``        the random numbers that all objectives share
``training``       one training run that survives being killed
``samplers``       diffusers' samplers, set up alike
``features``       the feature space in which samples are compared with data
``metrics``        the distances (torchmetrics)
``presets``        the experiments, as data
``runner``         objective x seed -> network -> sampler x steps -> one JSON per cell
``statistics``     improvements over plain training, paired by seed, with intervals
``report``         the table and the pictures of one run
``page``           ``docs/evidence.md``, from the committed results
=================  =================================================================
"""
