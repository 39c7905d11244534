"""`localspec tune`: load a pair with each sensible set of runtime options, measure, keep what wins, say why."""
