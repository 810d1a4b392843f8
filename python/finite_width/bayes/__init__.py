"""Variational Bayesian layers."""
