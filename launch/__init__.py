"""Jobs and launchers that train with Conda: the outermost layer of the package."""
