"""What programs of one launch need to share work."""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def is_last(arrivals, count):
    """Whether `count` - 1 programs came here before this one; then all that they wrote is seen, and the next round may
    begin."""
    tl.debug_barrier()
    before = tl.atomic_add(arrivals, 1, sem="acq_rel")
    if before == count - 1:
        tl.store(arrivals, 0)
    tl.debug_barrier()
    return before == count - 1
