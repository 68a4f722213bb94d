"""Devices and processes: the mesh and its rules, the other hosts, the compilation cache."""
