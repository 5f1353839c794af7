"""Llama-style generators: raster order, rotary positions, the class before all codes."""
