"""Reference models."""

from fastvq.models.pixelcnn import PixelCNN, PixelCNNLoss

__all__ = ["PixelCNN", "PixelCNNLoss"]
