"""Kinds of layers, one file each, and the register of them."""
