"""The command line: python -m kd_core.time_to_quality; the head of comparison.py has its forms."""

from kd_core.time_to_quality.comparison import main
from kd_core.training.processes import end_process

end_process(main)
