"""Fine-tune an ImageNet ResNet into a per-pixel classifier, in pure-functional JAX."""

__version__ = "0.1.0"
