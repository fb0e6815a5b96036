"""The formats of checkpoint files that need no framework, and what all formats share."""
