"""One file per model, read top to bottom. A recipe imports kd_core and never another recipe."""
