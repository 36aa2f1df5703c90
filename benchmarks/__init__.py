"""What arc_ao is measured with, run from the root of the repository: see README.md beside this."""
