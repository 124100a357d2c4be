"""What every recipe shares: kernels, losses, teachers, data, DeepSpeed engine and run records.

Nothing is re-exported here: import from the module that defines it.
"""
