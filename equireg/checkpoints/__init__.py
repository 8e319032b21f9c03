"""Readers of published checkpoints that run no code from them."""

from equireg.checkpoints.edm_pickle import EDMPickle, read_edm_pickle

__all__ = ["EDMPickle", "read_edm_pickle"]
