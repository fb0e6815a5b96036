"""How each backend is asked about a network: arrays channels first, gradients by their entries."""
