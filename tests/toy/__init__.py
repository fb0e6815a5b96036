"""A kind of layer that is in no package: what CONTRIBUTING says a new one needs, and no more."""
