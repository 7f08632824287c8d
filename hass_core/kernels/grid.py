"""What programs of one launch need to work in stages: a barrier for all of them, and weights on their way meanwhile.

A launch whose programs wait for each other must have all of them running at once: `launch_cooperative_grid=True`, with
no more programs than the GPU holds.
"""

# where Triton is installed, a type checker takes its language for Python
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def wait_for_all(arrivals, target, PTX: tl.constexpr):
    """Go on when `arrivals`, which every program raises by one here, has reached `target`; what each wrote before is
    then seen by all. The count goes on from launch to launch and wraps around, so it is compared by difference.

    With PTX one thread of a program counts and looks; Triton's own atomic operations, which compute the same, wait for
    an answer each time and pass it to all threads.
    """
    tl.debug_barrier()
    if PTX:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 t; .reg .s32 v;
            mov.u32 t, %tid.x;
            setp.ne.u32 p, t, 0;
            @p bra DONE;
            red.release.gpu.global.add.s32 [$1], 1;
            WAIT: ld.acquire.gpu.global.s32 v, [$1];
            sub.s32 v, v, $2;
            setp.lt.s32 p, v, 0;
            @p bra WAIT;
            DONE: mov.u32 $0, 0;
            }""",
            "=r,l,r,~{memory}",
            [arrivals.to(tl.int64), target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        left = target - 1 - tl.atomic_add(arrivals, 1, sem="acq_rel")
        while left > 0:
            left = target - tl.atomic_add(arrivals, 0, sem="acquire")
    tl.debug_barrier()


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


@triton.jit
def fetch(address, row, BYTES_A_ROW: tl.constexpr, LINES: tl.constexpr):
    """Start bringing the first LINES lines of 128 bytes of rows `row` [n] at `address` into the L2 cache."""
    line = tl.arange(0, LINES)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address + row.to(tl.int64)[:, None] * BYTES_A_ROW + line[None, :] * 128],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
