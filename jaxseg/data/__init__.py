"""Where images and labels come from. Imports no jax."""
