"""Pairs from the Hub: which are known, what is on disk, what fits this machine."""
