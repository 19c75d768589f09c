"""Compilation without optimising: where a test runs a program once, compiling it takes most of the time."""

import functools

import jax

UNOPTIMISED = {"xla_backend_optimization_level": 0}

# As `jax.jit`; the values differ in the last bits.
jit = functools.partial(jax.jit, compiler_options=UNOPTIMISED)
