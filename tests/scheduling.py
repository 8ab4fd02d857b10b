"""How tests are dealt out to processes (pytest-xdist): one at a time, those of a group to the same process."""

from typing import Any

from xdist.scheduler import LoadGroupScheduling


class Scheduler(LoadGroupScheduling):
    """What ``--dist loadgroup`` is, but for the death of a process.

    That of pytest-xdist 3.8 deals out again whatever the process has had. The test that it died of then kills the next
    one; and groups whose tests have all run go to processes that wait for one more test to begin their last: they wait
    for ever.
    """

    def remove_node(self, node: Any) -> str | None:
        """Forget a process, deal out again what it has not begun, and return the test that it died of."""
        waiting = [(scope, test) for scope, unit in self.assigned_work.pop(node).items()
                   for test, done in unit.items() if not done]
        for scope, test in waiting[1:]:
            self.workqueue.setdefault(scope, {})[test] = False
        for other in self.assigned_work if waiting else ():
            self._reschedule(other)
        return waiting[0][1] if waiting else None
