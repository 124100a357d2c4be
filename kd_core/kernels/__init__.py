"""One file per kernel: formula, reference, implementations, autograd, checks. Imports torch and triton only."""
