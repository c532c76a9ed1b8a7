"""From batches to a loss: the encoder's heads, the embeddings, and the losses over them."""
