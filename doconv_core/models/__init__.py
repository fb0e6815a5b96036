"""What is done to whole models, whatever the framework."""
