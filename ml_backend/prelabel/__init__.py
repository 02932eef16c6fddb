"""Pre-labelling: the prompts of many images in, predictions out; for a `folder` here, or for a `project`."""
