"""The mathematics: arrays in, arrays out; no layer, no model, no file."""
