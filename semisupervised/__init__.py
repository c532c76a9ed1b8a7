"""Semi-supervised training: unlabelled images teach a network while it learns from the labelled ones.

A moving average of the network (the teacher) labels unlabelled patches; the network learns these labels, where the
teacher is sure, on strongly changed copies of the patches. Imports `nnunetv2_kaf` and `pretraining`, never the reverse.
"""
