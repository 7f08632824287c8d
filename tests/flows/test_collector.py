"""The garbage collector of a flow: what is imported is left alone, what is made later is collected."""

import subprocess
import sys

PROGRAM = """
import gc, weakref
usual = gc.get_threshold()
from flows.collector import imported
rare = gc.get_threshold()
kept = [[] for _ in range(100_000)]
assert rare != usual
imported()
assert gc.get_threshold() == usual
frozen = gc.get_freeze_count()
assert frozen > 100_000

class Node:
    pass

one = Node()
one.itself = one
seen = weakref.ref(one)
imported()
assert gc.get_freeze_count() <= frozen, "a second call froze what was made since"
del one
gc.collect()
assert seen() is None, "what is made later is still collected"
"""


def test_what_is_made_after_the_imports_is_collected_and_what_was_there_is_left_alone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
