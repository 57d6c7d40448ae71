"""A GPU on a CPU, as far as devices go: its tensors are CPU tensors whose storage is marked.

Operations raise where CUDA would, and those that wait for the GPU are counted.  Arithmetic is the CPU's,
bfloat16 by its autocast.  Not seen: memory, speed, kernels.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def on_gpu(tensor):
    return hasattr(tensor.untyped_storage(), "gpu")


class Rules(TorchDispatchMode):
    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        some = any(map(on_gpu, given))
        backward = torch._C._current_graph_task_id() >= 0            # which asks for zeros without a device
        to_gpu = some or backward if device is None or backward else device == GPU
        index = args[1] if name in ("index", "index_put", "index_put_") and on_gpu(args[0]) else []
        strangers = [t for t in given if not on_gpu(t) and not any(t is one for one in index)]
        if torch.Tag.pointwise in func.tags and "foreach" not in name:
            strangers = [t for t in strangers if t.dim() > 0]        # a number may lie on the CPU
        assert not (some and strangers and "copy" not in name), f"{func} mixes devices"
        assert not (to_gpu and kwargs.get("generator")), f"{func} draws by a CPU generator"
        slow_index = [i for i in index if i is not None and (i.dtype == torch.bool or not on_gpu(i))]
        crosses = "copy" in name and {to_gpu, *map(on_gpu, given)} == {True, False}
        self.waits += some and (name in ("_local_scalar_dense", "nonzero") or len(slow_index) > 0)
        self.waits += crosses and not kwargs.get("non_blocking")
        out = func(*args, **kwargs)
        for new in tree_leaves(out):
            if to_gpu and isinstance(new, torch.Tensor) and not any(new is old for old in given):
                new.untyped_storage().gpu = True
        return out


def pretend(monkeypatch):
    """A GPU with bfloat16, for all that the program asks by name.  Its rules hold inside `with Rules():`"""
    tensor, autocast, numpy = torch.tensor, torch.autocast, torch.Tensor.numpy

    def to_numpy(t):
        assert not on_gpu(t), "numpy() of a GPU tensor"
        return numpy(t)
    answers = {
        "torch.Tensor.device": property(lambda t: GPU if on_gpu(t) else CPU),
        "torch.Tensor.is_cuda": property(on_gpu), "torch.Tensor.pin_memory": lambda t: t,
        "torch.Tensor.cpu": lambda t: torch.ops.aten._to_copy(t, device=CPU), "torch.Tensor.numpy": to_numpy,
        "torch.tensor": lambda data, device=CPU, **options: tensor(data, **options).to(device),
        "torch.autocast": lambda device, *dtype, **options: autocast("cpu", *dtype, **options),
        "torch.cuda._lazy_init": lambda: None, "torch.cuda.get_device_name": lambda: "pretended",
        "torch.cuda.is_bf16_supported": lambda **options: True,
        "compute.pick_device": lambda name: GPU, "run.pick_device": lambda name: GPU}
    for name, answer in answers.items():
        monkeypatch.setattr(name, answer)
