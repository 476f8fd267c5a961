"""The reference model: pictures to id maps and back, priors over the maps, and edits of a part of a picture."""

from fastvq.models.autoencoder import AutoencoderOutput
from fastvq.models.editing import Edited, edit
from fastvq.models.pixelcnn import PixelCNN, PixelCNNLoss
from fastvq.models.prior import Prior
from fastvq.models.vqvae import VQVAE
from fastvq.models.vqvae2 import VQVAE2

__all__ = ["VQVAE", "VQVAE2", "AutoencoderOutput", "Edited", "Output", "PixelCNN", "PixelCNNLoss", "Prior", "edit"]

Output = AutoencoderOutput  # the name of earlier versions
