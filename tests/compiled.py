"""Compile what most tests run, on two cores, before workers and ranks all compile the same: ``python tests/compiled.py``."""

import os
import sys

import numpy as np
from programs import PLANS, RULES, rule_steps
from virtual import results

from mpi_ef.jobs.doctor.checks.warm_up import optimizers


def main() -> None:
    """Share the work among forks of this process: they have no kernel in common, as each is compiled for one dtype."""
    children = []
    for dtype in (np.float32, np.float64):
        child = os.fork()
        if child == 0:
            for plan in PLANS:
                for rule in RULES:
                    results(2, rule_steps(rule, plan, 1001, dtype))
            for program in optimizers() if dtype is np.float32 else ():
                results(2, program)
            os._exit(0)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(f"{len(failed)} of {len(children)} processes failed" if failed else 0)


if __name__ == "__main__":
    main()
