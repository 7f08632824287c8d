"""Gate and rotation beside PyTorch, on a GPU or in Triton's interpreter; run by test_kernels.py as a program."""

import torch
import torch.nn.functional as F

from hass_core.kernels.many_rows import COLUMNS, gate, rotate
from hass_core.target_model.block import rotated

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROTATIONS = [(5, 9, 3, 64), (3, 32, 8, 128), (1, 4, 4, 20), (7, 2, 1, 16)]  # tokens, heads, key-value heads, head size


def check_gate() -> None:
    for tokens, inner in [(1, 96), (6, COLUMNS + 300), (3, 2 * COLUMNS)]:
        gate_up = torch.randn(tokens, 2 * inner, device=DEVICE)
        expected = F.silu(gate_up[:, :inner]) * gate_up[:, inner:]
        torch.testing.assert_close(gate(gate_up), expected, atol=1e-5, rtol=1e-5)
    exact = torch.randn(4, 2 * COLUMNS, device=DEVICE).bfloat16()
    expected = F.silu(exact[:, :COLUMNS]) * exact[:, COLUMNS:]
    torch.testing.assert_close(gate(exact), expected, atol=0.0, rtol=0.016)  # two bits: the interpreter rounds down


def check_rotation() -> None:
    for tokens, heads, groups, size in ROTATIONS:
        qkv = torch.randn(tokens, heads + 2 * groups, size, device=DEVICE)
        rotation = torch.randn(tokens, 2, size, device=DEVICE)
        expected = rotated(qkv[None, :, : heads + groups], rotation[None, :, :1], rotation[None, :, 1:])[0]
        torch.testing.assert_close(rotate(qkv, rotation, heads + groups), expected, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_gate()
    check_rotation()
