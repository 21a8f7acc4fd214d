"""The kernels, one operation per file: `megalite_kernels` decides when they are called."""
