"""Recipes for the tests of the loop."""
