"""The attention families, one module each; see `patterns` for how to add one."""
