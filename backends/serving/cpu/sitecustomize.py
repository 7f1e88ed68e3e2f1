"""On a machine without a GPU: torchvision has no CPU build, and its CUDA build asks at import for two operators that do not exist here.

Python imports this file by itself when the folder stands on PYTHONPATH. The operators get schemas and no code: whoever calls them fails
loudly, and nothing in serving a Qwen-class model does.
"""

import sys


class _Schemas:
    """Declares torchvision's operators the moment before torchvision is imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _Schemas.library is None:
            import torch

            _Schemas.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                _Schemas.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Schemas())
