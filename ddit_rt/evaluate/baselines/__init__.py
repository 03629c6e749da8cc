"""What an evaluation compares with: a file per baseline."""
