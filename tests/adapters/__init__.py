"""One module for each backend: how the contract's cases are put to that framework."""
