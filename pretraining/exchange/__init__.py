"""Weights from and for other tools: nnssl, MONAI and the like."""
