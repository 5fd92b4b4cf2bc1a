"""mmkit: teach and research masked image+text training, in Jupyter."""
