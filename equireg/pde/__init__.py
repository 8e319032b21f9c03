"""Partial differential equations: random fields, solvers, the linear estimator."""
