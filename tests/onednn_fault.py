"""Plain PyTorch that corrupts its heap: oneDNN's weight gradient of a 1x1 convolution of stride 2.

    DNNL_MAX_CPU_ISA=AVX2 python tests/onednn_fault.py

aborts in glibc's allocator ("corrupted double-linked list" or similar) if PyTorch has the fault,
else it prints "no fault". A processor with AVX-512 shows the fault only with the variable set.
"""

import torch

torch.set_num_threads(1)
weight = torch.randn(1, 2, 1, 1)
kept = []
for i in range(400):
    x = torch.randn(2, 2, 16, 30).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 1, 8, 15).contiguous(memory_format=torch.channels_last)
    torch.ops.aten.convolution_backward(
        grad, x, weight, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    kept = [*kept[-50:], torch.empty(1 + 37 * i % 2000)]
print("no fault", torch.__version__)
