"""Adapters: the loss in a trainer's own terms, one module a trainer.

Each imports its trainer only when it is used. Import them as `s2dm_loss.adapters.<name>`.
"""
