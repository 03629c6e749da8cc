"""The demo model: a small, real `FluxPipeline` and the code that draws its training scenes and trains it."""
