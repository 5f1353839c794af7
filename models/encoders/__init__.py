"""Encoders: images to a grid of features; frozen networks with given weights, or fitted statistics."""
