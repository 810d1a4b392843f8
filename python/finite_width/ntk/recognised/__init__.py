"""The operations whose use of a parameter is recorded: one function each, and here the table of them.

Each gets the capture and the operation's own arguments. It runs the operation through `Capture.record`, or returns
NotImplemented where the arguments are none that it knows: the parameter keeps its edge then, and autograd computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norms import torchs_order
from .convolutions import conv, conv_transpose
from .dense import addmm, linear, matmul, reversed_axes, transpose
from .embeddings import embedding, embedding_bag, renormed
from .norms import batch_norm, group_norm, instance_norm, layer_norm, prelu, rms_norm
from .rectifiers import relu, reshaped
from .recurrent import RECURRENT
from .shared import added, expanded, multiplied, subtracted


def getter(name: str) -> Any:
    """What a TorchFunctionMode sees where the attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


RECOGNISED: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    torch.flatten: reshaped(torch.flatten),
    Tensor.flatten: reshaped(Tensor.flatten),
    torch.reshape: reshaped(torch.reshape),
    Tensor.reshape: reshaped(Tensor.reshape),
    Tensor.view: reshaped(Tensor.view),
    torch.matmul: matmul,
    torch.mm: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.__matmul__: matmul,
    torch.addmm: addmm,
    torch.t: transpose(torch.t),
    Tensor.t: transpose(torch.t),
    torch.transpose: transpose(torch.transpose),
    Tensor.transpose: transpose(torch.transpose),
    getter("T"): transpose(lambda value, *_: value.t() if value.dim() == 2 else value.permute(*reversed_axes(value))),
    getter("mT"): transpose(lambda value, *_: value.transpose(-2, -1)),
    torch.conv1d: conv(torch.conv1d, 1),
    torch.conv2d: conv(torch.conv2d, 2),
    torch.conv3d: conv(torch.conv3d, 3),
    torch.conv_transpose1d: conv_transpose(torch.conv_transpose1d, 1),
    torch.conv_transpose2d: conv_transpose(torch.conv_transpose2d, 2),
    torch.conv_transpose3d: conv_transpose(torch.conv_transpose3d, 3),
    torch.add: added,
    Tensor.add: added,
    torch.sub: subtracted,
    Tensor.sub: subtracted,
    torch.mul: multiplied,
    Tensor.mul: multiplied,
    Tensor.expand: expanded(Tensor.expand),
    Tensor.repeat: expanded(Tensor.repeat),
    torch.rms_norm: rms_norm,
    torch.layer_norm: layer_norm,
    torch.group_norm: group_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: torchs_order(batch_norm),
    F.instance_norm: instance_norm,
    torch.instance_norm: torchs_order(instance_norm),
    torch.prelu: prelu,
    torch.embedding: embedding,
    torch.embedding_bag: embedding_bag,
    torch.embedding_renorm_: renormed,
    **RECURRENT,
}
