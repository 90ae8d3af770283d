"""Rays, depth sampling, marching and the volume renderer, in plain PyTorch."""
