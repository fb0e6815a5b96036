"""What a layer and a whole network cost, in parameters and operations."""

from doconv_core.cost.layer import Cost, LayerCost, layer_cost
from doconv_core.cost.network import CountedLayer, NetworkCost, count

__all__ = ["Cost", "CountedLayer", "LayerCost", "NetworkCost", "count", "layer_cost"]
