"""Measurements that stand beside the library: nothing here is imported by it."""
