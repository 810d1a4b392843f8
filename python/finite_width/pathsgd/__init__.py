"""Path-SGD: a drop-in optimizer that rescaling hidden units does not change, the path norm, and what goes with them."""

from .measures import max_norm, path_gamma, path_norm
from .operations import register_layer
from .optimizer import PathSGD
from .rescale import balance_, rescale_

__all__ = ["PathSGD", "balance_", "max_norm", "path_gamma", "path_norm", "register_layer", "rescale_"]
