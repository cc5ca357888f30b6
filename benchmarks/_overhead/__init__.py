"""The parts of `benchmarks.overhead`: what is compared, how it is measured, what is written."""
