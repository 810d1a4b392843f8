"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""
