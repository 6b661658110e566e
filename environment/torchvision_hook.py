"""Lets a CUDA build of torchvision be imported beside a CPU build of torch. Copied into site-packages by
setup.sh when needed.

torchvision registers fake implementations for two native operators; with its native library unloadable the
operators have no schema and the import fails. This finder declares the two schemas just before
`torchvision._meta_registrations` is loaded. It runs in every process of the environment (Ray workers, vLLM's
engine), costs nothing until torchvision is imported, and leaves the operators without an implementation:
calling them still fails, as it should.
"""

import sys


class _DeclareSchemas:
    """A finder that finds nothing: it only acts on the way."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            import torch

            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    torch.library.define(
                        f"torchvision::{operator}",
                        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    )


sys.meta_path.insert(0, _DeclareSchemas())
