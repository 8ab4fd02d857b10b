"""How tests are dealt out when a process that runs them dies."""

from types import SimpleNamespace

import pytest
from scheduling import Scheduler
from xdist.scheduler import LoadGroupScheduling

TESTS = [f"test_x.py::test[{n}]" for n in range(40)] + [f"test_x.py::test_of[{n}]@programs" for n in range(9)]


class Process:
    """It begins a test when it knows the next one, or that there is none."""

    def __init__(self):
        self.waiting, self.shutting_down = [], False
        self.gateway = SimpleNamespace(id="gw")

    def send_runtest_some(self, tests):
        self.waiting += tests

    def shutdown(self):
        self.shutting_down = True


def run_all(kind, deadly):
    """Run all tests in three processes and return those that have run, and those that a process died of."""
    config = SimpleNamespace(getvalue=lambda _: ["popen"] * 3, option=SimpleNamespace(loadscopereorder=True))
    scheduler, done, died_of = kind(config, None), [], []

    def another():
        process = Process()
        scheduler.add_node(process)
        scheduler.add_node_collection(process, TESTS)
        return process

    processes = [another() for _ in range(3)]
    scheduler.schedule()
    for _ in range(10 * len(TESTS)):
        if scheduler.tests_finished:
            for process in processes:
                process.shutdown()
        for process in [*processes]:
            if len(process.waiting) + process.shutting_down > 1:
                number = process.waiting.pop(0)
                if TESTS[number] in deadly:
                    processes.remove(process)
                    died_of.append(scheduler.remove_node(process))
                    processes.append(another())
                    scheduler.schedule()
                else:
                    done.append(TESTS[number])
                    scheduler.mark_test_complete(process, number)
    return done, died_of


@pytest.mark.parametrize("deadly", [[], [TESTS[15]], [TESTS[0], TESTS[39], TESTS[-1]], [TESTS[44]], TESTS[30:34]])
def test_a_process_that_dies_costs_one_test(deadly):
    done, died_of = run_all(Scheduler, deadly)
    assert sorted(died_of) == sorted(deadly)
    assert sorted(done) == sorted(set(TESTS) - set(deadly))


def test_that_is_needed():
    """When this fails, what comes with pytest-xdist will do."""
    done, died_of = run_all(LoadGroupScheduling, [TESTS[15]])
    assert len(done) < len(TESTS) - 1 or died_of != [TESTS[15]]
