"""Why greedy tokens in bfloat16 may depend on who is computed beside a request: how a row is rounded.

test_engine.py allows nothing in float64, test_float32.py differences where two tokens tie within 1e-4.
"""
import os
import shutil

import pytest
import torch
from nanoinfra.kernels.cpu import decode_kernels
from torch import nn

from nanoinfra.serve.engine.packed_linear import PackedLinear

CC = os.environ.get("CC", "cc")


@pytest.mark.skipif(not shutil.which(CC), reason=f"there is no C compiler {CC} here")
@torch.inference_mode()
def test_a_row_alone_is_seldom_rounded_otherwise_than_among_others_and_by_one_step():
    torch.manual_seed(0)
    dtype = torch.bfloat16
    fast = PackedLinear(nn.Linear(576, 8192, bias=False).to(dtype),
                        gemv=decode_kernels.compile_decode_kernels(dtype, K=4, KV=1, G=1, BLOCK=4).gemv)
    x = torch.randn(16, 576).to(dtype)
    among, alone = fast(x), torch.cat([fast(row[None]) for row in x])
    differ = among != alone
    assert differ.float().mean() < 0.01                      # 7e-5 on AVX2; how others sum is theirs
    step = torch.finfo(dtype).eps * alone[differ].abs()      # at the most, from one number to the next
    assert ((among[differ] - alone[differ]).abs() <= step + 1e-5).all()
