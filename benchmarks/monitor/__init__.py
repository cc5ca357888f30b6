"""The monitor on the digits: what a training loop sees, and what it costs."""
