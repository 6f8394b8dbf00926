"""The simulator: the control plane as it serves, over engines that are models, in virtual time."""
