"""Tensor operations of the StyleGAN2 family, each with its definition in plain PyTorch."""
