"""Small predictors on frozen decoder features, their Laplace posteriors, and what those say about each pixel."""
