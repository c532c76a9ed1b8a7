"""`kaf-report`: what a model or a pretraining has learned, as pictures in one page.

It reads through `nnunetv2_kaf.inspect` and `pretraining`; nothing imports it.
"""
