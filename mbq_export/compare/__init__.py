"""Quality per byte: a bundle beside other ways to store the same model, in one harness."""
