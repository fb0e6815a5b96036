"""Networks described once, as data, for every framework to build."""
