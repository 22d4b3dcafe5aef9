"""`python -m tests.chaos`: write `results.md` again from the results that were kept."""

from tests.chaos import report
from tests.chaos.faults import FAULTS

report.write(FAULTS)
