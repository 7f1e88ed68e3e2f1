"""Stand-in for SGLang's CUDA kernels on a machine without a GPU: what a Qwen-class model needs there, in plain PyTorch.

Two functions of the key-value pool's book-keeping are written out. Everything else that is looked up at import is declared and raises
when it is called. ``convert_weight_packed`` is not declared on purpose: its absence is how SGLang knows to take its own native paths.
"""

import torch


def assign_req_to_token_pool_cpu(req, table, start, end, loc, _len):
    at = 0
    for row, first, last in zip(req.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = loc[at : at + last - first].to(table.dtype)
        at += last - first


def assign_extend_cache_locs_cpu(req, table, start, end, out, _len):
    at = 0
    for row, first, last in zip(req.tolist(), start.tolist(), end.tolist(), strict=True):
        out[at : at + last - first] = table[row, first:last].to(out.dtype)
        at += last - first


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return missing


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_gdn_gating_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    _library.define(_name + "(Tensor x) -> Tensor")

if not torch.cuda.is_available():  # LoRA layers pin memory without asking whether that is possible

    def _unpinned(make):
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    for _name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, _name, _unpinned(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
