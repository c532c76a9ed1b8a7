"""Self-supervised pretraining of the keypoint-augmented encoder on nnU-Net's preprocessed images."""
