"""GLUE: tasks, jobs, tables."""
