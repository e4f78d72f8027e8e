"""Slow, literal versions of the methods, written from their papers with loops over tokens, and builders of inputs."""
