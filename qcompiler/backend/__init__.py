"""Integer module -> Program -> Artifact, and what a device needs of it."""
