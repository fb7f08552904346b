"""The image: what can be held without a builder, and a real build with buildah (`python -m tests.image.build`)."""
